"""The files of checkpoints: damage, full disks, other processes."""

import resource
import subprocess
import sys

import pytest

from swa_dist.resume.checkpoints import CheckpointError, Checkpoints
from tests.helpers.devices import mirrored
from tests.helpers.interruptions import spoil
from tests.helpers.variables import average_of, mirrored_variables


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_any_damage_is_noticed_before_anything_is_restored(tmp_path, ending, damage):
    strategy = mirrored(2)
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average, backup = average_of(variables, strategy), Checkpoints(tmp_path, writes=True)
    backup.open()
    average.update()
    for epoch in (3, 4):
        backup.save(
            epoch, {"average": average}, {"configuration": {}, "layout": {}, "epoch": epoch}
        )
    spoil(tmp_path, 4, ending, damage)
    restored = average_of(variables, strategy)
    with pytest.warns(UserWarning, match="swa-epoch-00004' is damaged"):
        epoch, record = backup.newest(5, {}, {})
    backup.restore(epoch, {"average": restored})
    assert (epoch, record["epoch"], restored.n_averaged) == (3, 3, 1)
    spoil(tmp_path, 3, ending, damage)
    restored = average_of(variables, strategy)
    with pytest.warns(UserWarning, match="swa-epoch-00003' is damaged"):
        assert backup.newest(3, {}, {}) is None
    assert restored.n_averaged == 0
    backup.remove()


def test_what_a_failed_write_leaves_is_an_earlier_state(tmp_path):
    strategy = mirrored(2)
    average = average_of(mirrored_variables(strategy, ["float32"] * 4), strategy)
    backup = Checkpoints(tmp_path, writes=True)
    backup.open()
    for epoch in (1, 2):
        backup.save(epoch, {"average": average}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written to: .*File too large"):
            backup.save(3, {"average": average}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert backup.epochs == [1, 2]
    assert sorted({p.name.partition(".")[0] for p in tmp_path.iterdir()}) == [
        "swa", "swa-epoch-00001", "swa-epoch-00002"
    ]  # fmt: skip
    backup.remove()
    assert not tmp_path.exists()


HOLD = """
import sys
from swa_dist.resume.checkpoints import Checkpoints
Checkpoints(sys.argv[1], writes=True).open()
print("held", flush=True)
sys.stdin.read()  # until it is killed, or its parent ends
"""


def test_a_folder_that_another_process_uses_is_refused_until_that_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"process {process.pid} is using it"):
            Checkpoints(tmp_path, writes=True).open()
        process.kill()
        process.wait()
    Checkpoints(tmp_path, writes=True).open()


def test_a_second_run_of_the_process_takes_the_folder_over(tmp_path):
    first, second = Checkpoints(tmp_path, writes=True), Checkpoints(tmp_path, writes=True)
    first.open()
    second.open()
    second.save(3, {}, {})
    with pytest.raises(CheckpointError, match="another run of this process"):
        first.save(4, {}, {})
    first.remove()
    assert second.epochs == [3]
    second.remove()
    assert not tmp_path.exists()


def test_a_folder_that_tensorflow_takes_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"`backup_dir` must not have a '\['"):
        Checkpoints(tmp_path / "rate=[0.1]", writes=True).open()
