"""An interrupted run is resumed with its average, and ends as if it had not been interrupted."""

import contextlib
import functools
import json
import re
import resource
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import SWAWarning
from swa_dist.resume.checkpoints import Checkpoints
from tests.helpers.assertions import assert_bitwise, assert_weights
from tests.helpers.callbacks import at, stop
from tests.helpers.data import batched, data, held_out
from tests.helpers.devices import NO_STRATEGY, mirrored, on
from tests.helpers.fits import Fit, fit
from tests.helpers.forks import Fork
from tests.helpers.interrupted_runs import POINTS
from tests.helpers.interruptions import KilledError, kill, spoil
from tests.helpers.kit import KITS
from tests.helpers.models import build

pytestmark = pytest.mark.either_keras


START, EPOCHS = 2, 7


def run(kit, folder, strategy=NO_STRATEGY, model=None, before=(), restore=True, **arguments):
    """A run that takes up whatever is in the folder: model, recorder, callback, history.

    Args:
        before: Callbacks between BackupAndRestore, which is there if `restore` is true, and SWA.
    """
    model = model or build(kit, strategy)
    swa = arguments.pop("swa", None)
    swa = swa or kit.SWA(START, "constant", 0.02, backup_dir=folder / "swa")
    others = [kit.keras.callbacks.BackupAndRestore(str(folder / "model"))] if restore else []
    given = {"fed": data(20), "epochs": EPOCHS, **arguments}
    trained = Fit(kit.Recorder(), swa, None)
    with contextlib.suppress(KilledError):
        trained = fit(kit, model, [*others, *before], recorder=trained.recorder, swa=swa, **given)
    return model, *trained


@functools.cache
def never(kit, n=0):
    """What an uninterrupted run ends with, and its learning rates."""
    with tempfile.TemporaryDirectory() as folder:
        model, *_, history = run(kit, Path(folder), on(n))
    return state(kit, model), history["learning_rate"]


def state(kit, model):
    statistics = [*model.layers[0].non_trainable_variables]
    return [*kit.trainable(model), *(r for v in statistics for r in kit.replicas(v))]


def epochs_in(folder):
    return Checkpoints(folder / "swa", writes=False).epochs


@pytest.mark.parametrize("kit", [kit.name for kit in KITS])
def test_a_run_interrupted_anywhere_ends_like_an_uninterrupted_one(tmp_path, kit):
    program = f"from tests.helpers.interrupted_runs import main; main({kit!r}, {str(tmp_path)!r})"
    result = Fork(program).result()
    assert result.returncode == 0, result.stderr[-4000:]
    histories = [json.loads(line) for line in result.stdout.splitlines() if line[:1] == "{"]
    points = [(tuple(point), code) for h in histories for point, code in h["lives"]]
    assert len(points) == POINTS * len(histories)
    assert len(histories) in (5, 10)
    for point, code in points:
        assert code == -9, point
    for history in histories:
        assert history["different"] == [], history
        assert history["n_averaged"] > 1


@pytest.mark.exactness
@pytest.mark.parametrize("n", [0, 2])
def test_a_run_resumed_by_hand(kit, tmp_path, n):
    """With `initial_epoch`, and a model of the user's own saving."""
    strategy, path = on(n), str(tmp_path / "model.keras")

    def save(model):
        model.save(path)

    run(
        kit, tmp_path, strategy, restore=False,
        before=[at(kit, 4, save)], after=[at(kit, 5, kill, "on_epoch_end")],
    )  # fmt: skip
    assert epochs_in(tmp_path) == [4, 5]
    with strategy.scope():
        model = kit.keras.models.load_model(path)
    model, _, swa, resumed = run(
        kit, tmp_path, strategy, model=model, restore=False, initial_epoch=4
    )
    assert swa.n_averaged == 5
    weights, rates = never(kit, n)
    assert resumed["learning_rate"] == rates[4:]
    assert_bitwise(state(kit, model), weights)
    assert not (tmp_path / "swa").exists()


def test_what_is_saved_when(kit, tmp_path):
    """One write for each epoch that changes something; two states; none when `fit` is over."""
    seen = []

    class Look(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(epochs_in(tmp_path))

    swa = kit.SWA(3, swa_freq=2, backup_dir=tmp_path / "swa")
    (tmp_path / "swa").mkdir()
    theirs = ["theirs", "swa-epoch-00099.keras", "swa-epoch-notes"]
    for name in theirs:
        (tmp_path / "swa" / name).write_text("not ours")
    run(kit, tmp_path, swa=swa, after=[Look()], epochs=8, restore=False)
    # The start; what was learned of the data in epoch 1; the snapshots of epochs 4 and 6.
    assert seen == [[0], [0, 1], [0, 1], [0, 1], [1, 4], [1, 4], [4, 6], [4, 6]]
    assert sorted(p.name for p in (tmp_path / "swa").iterdir()) == sorted(theirs)


def test_a_state_holds_the_buffers_and_no_weights(kit, tmp_path):
    run(kit, tmp_path, after=[at(kit, 3, kill)])
    names = dict(tf.train.list_variables(Checkpoints(tmp_path / "swa", writes=False).path(3)))
    value, state = ".ATTRIBUTES/VARIABLE_VALUE", ".ATTRIBUTES/py_state"
    assert names == {
        "_CHECKPOINTABLE_OBJECT_GRAPH": [],
        f"record/{state}": [],
        f"weights/_own_weights/{state}": [],
        f"weights/buffers_layout/{state}": [],
        f"weights/buffers/0/{value}": [10],
        f"weights/count/{value}": [],
        f"weights/divisor/{value}": [],
        f"batch_norm/buffers_layout/{state}": [],
        f"batch_norm/groups/0/averages/{value}": [2, 3],
        f"batch_norm/groups/0/weights/{value}": [1],
    }


@pytest.mark.parametrize("order", [1, -1])
def test_checkpoints_are_the_same_in_keras_3_and_tf_keras_on_any_number_of_replicas(
    tmp_path, order
):
    one, other = KITS[::order]
    _, first, *_ = run(one, tmp_path, mirrored(4), after=[at(one, 4, kill)], restore=False)
    model, second, swa, _ = run(
        other, tmp_path, mirrored(1), restore=False, initial_epoch=4
    )  # fmt: skip
    assert swa.n_averaged == 5
    snapshots = first.weights[START - 1 :] + second.weights[:2]
    expected = [np.mean(np.float64(ws), 0) for ws in zip(*snapshots, strict=True)]
    assert_weights(other.trainable(model), expected)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_epoch_end"])
def test_an_early_stop_is_not_forgotten(kit, tmp_path, hook):
    """Stopped at the end of epoch 4, interrupted in or after the BN pass that follows."""
    stopped, *_ = run(kit, tmp_path / "never", before=[at(kit, 4, stop)])
    run(kit, tmp_path, before=[at(kit, 4, stop)], after=[at(kit, 5, kill, hook)])
    model, _, swa, history = run(kit, tmp_path)
    assert len(history["loss"]) == 1
    assert swa.n_averaged == 3
    assert_bitwise(state(kit, model), state(kit, stopped))


def test_the_same_process_resumes_after_an_exception(kit, tmp_path):
    run(kit, tmp_path, after=[at(kit, 4, kill)])
    model, *_ = run(kit, tmp_path)
    assert_bitwise(state(kit, model), never(kit)[0])


def test_a_damaged_state_is_refused_and_the_one_before_is_used(kit, tmp_path):
    run(kit, tmp_path, after=[at(kit, 4, kill)])
    assert epochs_in(tmp_path) == [3, 4]
    spoil(tmp_path / "swa", 4)
    with pytest.warns(UserWarning, match="swa-epoch-00004' is damaged"):
        model, _, swa, _ = run(kit, tmp_path)
    assert swa.n_averaged == 5
    assert_bitwise(state(kit, model), never(kit)[0])


def test_if_both_states_are_damaged_nothing_is_trained(kit, tmp_path):
    run(kit, tmp_path, after=[at(kit, 4, kill)])
    spoil(tmp_path / "swa", 3)
    spoil(tmp_path / "swa", 4)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match=r"due in epoch 2, 3, 4\. Go on with"),
    ):
        run(kit, tmp_path)
    assert epochs_in(tmp_path) == [3, 4]


@pytest.mark.parametrize("whole_epochs_and", [0, 1])
def test_weights_amid_an_epoch_are_not_taken_for_a_snapshot(kit, tmp_path, whole_epochs_and):
    """The last snapshot is not saved, and the model comes from within the next epoch."""

    updates = 3 * 4 + whole_epochs_and
    run(kit, tmp_path, after=[at(kit, 4, kill)], restore=False)
    spoil(tmp_path / "swa", 4)
    model = build(kit)
    model.optimizer.iterations.assign(updates)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.warns(UserWarning, match="damaged"))
        if whole_epochs_and:
            stack.enter_context(pytest.raises(ValueError, match=r"due in epoch 4\."))
        _, _, swa, _ = run(kit, tmp_path, model=model, restore=False, initial_epoch=4)
        assert swa.n_averaged == 5


@pytest.mark.parametrize("folder", ["empty", "later"])
def test_without_a_state_for_the_epoch_there_is_an_error_that_helps(kit, tmp_path, folder):
    if folder == "later":
        run(kit, tmp_path, after=[at(kit, 6, kill)], restore=False)
    model = build(kit)
    before = kit.trainable(model)
    swa = kit.SWA(START, "constant", 0.02, backup_dir=tmp_path / "swa")
    with pytest.raises(ValueError, match="`backup_dir` must have the average as it was") as error:
        model.fit(*data(20), epochs=EPOCHS, initial_epoch=4, verbose=0, callbacks=[swa])
    there = {"empty": "none", "later": "5, 6"}[folder]
    for words in (
        "before epoch 5", f"after these epochs: {there}.", "epoch 2, 3, 4.", "`initial_epoch`",
        "leave `backup_dir` out",
    ):  # fmt: skip
        assert words in str(error.value)
    assert_bitwise(kit.trainable(model), before)
    assert epochs_in(tmp_path) == {"empty": [], "later": [5, 6]}[folder]


OTHERS = [
    ({"start_epoch": 3}, "start_epoch=3, but start_epoch=2"),
    ({"swa_freq": 2}, "swa_freq=2, but swa_freq=1"),
    ({"lr_schedule": "manual", "swa_lr": "auto"}, "lr_schedule='manual', but .*='constant'"),
    ({"swa_lr": 0.03}, "swa_lr=0.03, but swa_lr=0.02"),
    ({}, r"weight 3='\(3, 2\) float32', but weight 3='\(3, 1\) float32'"),
]


def test_what_another_run_has_saved_is_refused(kit, tmp_path):
    run(kit, tmp_path, after=[at(kit, 5, kill)], restore=False)
    x, y = data(20)
    for changed, values in OTHERS:
        arguments = {"start_epoch": START, "lr_schedule": "constant", "swa_lr": 0.02, **changed}
        swa = kit.SWA(**arguments, backup_dir=tmp_path / "swa")
        model, outputs = build(kit), 1
        if not changed:
            layers, outputs = kit.keras.layers, 2
            model = kit.keras.Sequential(
                [layers.Input((3,)), layers.BatchNormalization(), layers.Dense(outputs)]
            )
            model.compile("sgd", "mse")
        with pytest.raises(ValueError, match=values):
            model.fit(
                x, np.repeat(y, outputs, 1), epochs=EPOCHS, initial_epoch=5, callbacks=[swa],
                verbose=0,
            )  # fmt: skip
        assert epochs_in(tmp_path) == [4, 5]


def test_a_full_disk_is_warned_of_and_training_continues(kit, tmp_path):
    def limit(size):
        def action(model):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

        return action

    def look(model):
        states.extend(epochs_in(tmp_path))

    states = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.warns(UserWarning, match="was not saved") as warned:
            model, recorder, swa, _ = run(
                kit, tmp_path, restore=False, after=[at(kit, 6, look)],
                before=[at(kit, 3, limit(100)), at(kit, 5, limit(soft))],
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    messages = [str(w.message) for w in warned if w.category is SWAWarning]
    assert [re.search(r"end of epoch (\d)", m)[1] for m in messages] == ["3", "4"]
    assert all("File too large" in m and "training continues" in m for m in messages)
    assert states == [5, 6]
    assert swa.n_averaged == 5
    assert_weights(kit.trainable(model), recorder.mean(*range(START, EPOCHS)))


@pytest.mark.parametrize("folder", ["/proc/swa", __file__ + "/swa"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(kit, folder):
    model = build(kit)
    before = kit.trainable(model)
    with pytest.raises(OSError, match=f"`backup_dir` must be a folder .* Received: '{folder}'"):
        model.fit(*data(20), epochs=EPOCHS, verbose=0, callbacks=[kit.SWA(2, backup_dir=folder)])
    assert_bitwise(kit.trainable(model), before)


def test_what_an_earlier_run_left_is_warned_of_and_overwritten(kit, tmp_path):
    run(kit, tmp_path, after=[at(kit, 5, kill)], restore=False)
    with pytest.warns(UserWarning, match="after epoch 5. This run begins with epoch 1, and overw"):
        model, recorder, *_ = run(kit, tmp_path, restore=False)
    assert_weights(kit.trainable(model), recorder.mean(*range(START, EPOCHS)))


def test_a_run_that_is_resumed_with_fewer_epochs_warns_that_it_had_no_bn_pass(kit, tmp_path):
    _, recorder, *_ = run(kit, tmp_path, after=[at(kit, 5, kill)])
    with pytest.warns(UserWarning, match="statistics were not recomputed"):
        model, _, swa, _ = run(kit, tmp_path, epochs=5)
    assert swa.n_averaged == 4
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4, 5))


def test_a_finished_run_that_is_run_again_keeps_its_model(kit, tmp_path):
    model, *_ = run(kit, tmp_path, restore=False)
    before = state(kit, model)
    with pytest.warns(UserWarning, match="ended before its first epoch"):
        run(kit, tmp_path, model=model, restore=False, initial_epoch=EPOCHS)
    assert_bitwise(state(kit, model), before)
    assert not (tmp_path / "swa").exists()


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")  # Keras 3's own
def test_steps_may_be_a_number_of_numpys(kit, tmp_path):
    x, y = data()
    model = build(kit)
    fed = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()
    swa = kit.SWA(2, backup_dir=tmp_path / "swa")
    model.fit(fed, epochs=3, steps_per_epoch=np.int64(3), verbose=0, callbacks=[swa])
    assert swa.n_averaged == 1


def test_the_program_may_change_its_directory(kit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def leave(model):
        monkeypatch.chdir(tmp_path / "elsewhere")

    swa = kit.SWA(START, backup_dir="swa")
    run(kit, tmp_path, swa=swa, before=[at(kit, 3, leave)], restore=False)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


def test_trainable_may_change_before_the_first_snapshot(kit, tmp_path):
    def unfreeze(model):
        model.layers[-1].trainable = True

    def go(*after, **arguments):
        model = build(kit)
        model.layers[-1].trainable = False
        model.compile(kit.keras.optimizers.SGD(0.05), "mse", jit_compile=False)
        return run(
            kit, tmp_path, model=model, swa=kit.SWA(5, backup_dir=tmp_path / "swa"), after=after,
            before=[at(kit, 2, unfreeze, "on_epoch_begin")], restore=False, **arguments,
        )  # fmt: skip

    go(at(kit, 3, kill))
    *_, swa, _ = go(initial_epoch=3)
    assert swa.n_averaged == 2


@pytest.mark.parametrize("how", ["by hand", "BackupAndRestore"])
def test_without_a_backup_resuming_warns_of_what_is_not_averaged(kit, tmp_path, how):
    restore = how == "BackupAndRestore"
    run(kit, tmp_path, swa=kit.SWA(START), after=[at(kit, 5, kill)], restore=restore)
    # Killed at the end of epoch 5, which is over for BackupAndRestore.
    arguments = {} if restore else {"initial_epoch": 5}
    message = "begins with epoch 6: .* epoch 2, 3, 4, 5 are not in the average. With `backup_dir`"
    with pytest.warns(UserWarning, match=message):
        model, recorder, swa, _ = run(
            kit, tmp_path, swa=kit.SWA(START), restore=restore, **arguments
        )
    assert swa.n_averaged == 1
    assert_weights(kit.trainable(model), recorder.mean(1))  # of this run the first


def test_a_run_resumed_before_its_first_snapshot_needs_no_state(kit, tmp_path):
    swa = kit.SWA(6, backup_dir=tmp_path / "swa")
    model, recorder, swa, _ = run(kit, tmp_path, swa=swa, restore=False, initial_epoch=4)
    assert swa.n_averaged == 1
    assert_weights(kit.trainable(model), recorder.mean(2))


def test_without_a_backup_the_average_that_was_saved_for_the_weights_is_warned_of(kit, tmp_path):
    """With `validate_average`, BackupAndRestore saves the average; only `backup_dir` the rest."""
    arguments = {"validation_data": batched(*data())}

    def swa():
        return kit.SWA(START, validate_average=True)

    run(kit, tmp_path, swa=swa(), after=[at(kit, 5, kill, "on_epoch_begin")], **arguments)
    message = r"epoch 2, 3, 4 .*training then continues from the average"
    with pytest.warns(UserWarning, match=message):
        run(kit, tmp_path, swa=swa(), **arguments)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "compiled_anew"])
def test_a_schedule_that_cannot_know_its_initial_rate_says_so(kit, trained):
    """With which schedules and epochs: `test_start.py`."""
    model = build(kit, norm=False)
    if trained:
        model.fit(batched(*data()), shuffle=False, verbose=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(kit, model, swa=kit.SWA(10, "constant", 0.01), epochs=11, initial_epoch=7)
    told = [str(w.message) for w in seen if "compile the model with the initial rate" in str(w)]
    assert len(told) == trained
    assert all("begins with epoch 8: its learning rates are planned from" in t for t in told)
    assert all("0.05" in t for t in told)


def test_a_model_saved_with_the_average_does_not_replace_a_damaged_checkpoint(kit, tmp_path):
    """Only the damaged state had the trained weights: there is no snapshot to take from them."""

    def train(*after):
        swa = kit.SWA(2, backup_dir=tmp_path / "swa", validate_average=True)
        run(kit, tmp_path, swa=swa, after=after, epochs=6, validation_data=held_out())

    train(at(kit, 4, kill))
    spoil(tmp_path / "swa", 4)
    with (
        pytest.warns(UserWarning, match="swa-epoch-00004' is damaged"),
        pytest.raises(ValueError, match=r"snapshots were due in epoch 4\. Go on with"),
    ):
        train()
