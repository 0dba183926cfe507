"""Where a run starts, and what is said of it: decided without training."""

from types import SimpleNamespace

import pytest

from swa_dist.plan.plan import Plan
from swa_dist.plan.progress import Progress
from swa_dist.resume.saved_run import Resumed
from swa_dist.resume.start import Start, find_start, warnings_of

PLAN = Plan(10, 3, initial_learning_rate=0.1)  # snapshots at the ends of epochs 3 to 9


class Saved:
    """A folder with a checkpoint after some epochs, or without one."""

    def __init__(self, completed=None, at_end_of_epoch=False, **progress):
        self._completed, self._at_end_of_epoch = completed, at_end_of_epoch
        self._progress = Progress(**progress)

    def resume(self, epoch, plan, average):
        if self._completed is None:
            return None
        return Resumed(self._completed, plan, self._progress, {"optimizer": 0.1})

    def is_at_end_of_epoch(self, epoch, saved_epoch):
        return self._at_end_of_epoch

    def __str__(self):
        return "the folder"


def start(epoch, saved=None):
    return find_start(epoch, PLAN, SimpleNamespace(average=None), saved)


@pytest.mark.parametrize("saved", [None, Saved()])
def test_a_run_starts_with_its_first_epoch(saved):
    assert start(0, saved) == Start(PLAN)


def test_without_a_folder_the_snapshots_that_were_due_are_missed():
    assert start(2).missed == range(0)
    assert list(start(5).missed) == [2, 3, 4]
    assert not start(5).is_resumed


def test_a_checkpoint_of_the_epoch_is_resumed():
    found = start(5, Saved(5, n_averaged=3))
    assert found.is_resumed
    assert not found.missed
    assert not found.snapshot_due
    assert found.progress.n_averaged == 3
    assert found.initial_rates == {"optimizer": 0.1}


def test_a_checkpoint_from_before_epochs_without_snapshots_will_do():
    assert not start(2, Saved(1)).missed


def test_of_a_model_at_the_end_of_an_epoch_the_last_snapshot_can_still_be_taken():
    found = start(5, Saved(4, at_end_of_epoch=True, n_averaged=2))
    assert found.snapshot_due
    assert not found.missed


@pytest.mark.parametrize(
    ("saved", "missed"),
    [
        (Saved(), "epoch 3, 4, 5"),
        (Saved(4, at_end_of_epoch=False), "epoch 5"),
        (Saved(3, at_end_of_epoch=True), "epoch 4, 5"),
    ],
    ids=["no checkpoint", "amid an epoch", "two are missing"],
)
def test_where_snapshots_are_missing_the_run_is_refused(saved, missed):
    with pytest.raises(ValueError, match="`backup_dir` must have the average") as error:
        start(5, saved)
    assert f"due in {missed}. " in str(error.value)
    assert "the folder" in str(error.value)


def test_snapshots_of_steps_cannot_be_taken_from_a_saved_model():
    plan = Plan(10, 3, snapshot_freq=2, initial_learning_rate=0.1)
    saved = Saved(4, at_end_of_epoch=True, n_averaged=2)
    with pytest.raises(ValueError, match="`backup_dir` must have the average"):
        find_start(5, plan, SimpleNamespace(average=None), saved)
    assert not find_start(5, plan, SimpleNamespace(average=None), Saved(5)).missed


def test_after_an_early_stop_no_later_snapshot_is_missed():
    assert not start(6, Saved(5, stopped=5, n_averaged=3)).missed


def test_where_nothing_is_left_to_train_nothing_is_refused():
    assert list(start(10, Saved(4)).missed) == [4, 5, 6, 7, 8]


def test_missed_snapshots_are_warned_of():
    (warning,) = warnings_of(start(5), 5, False, None)
    assert "begins with epoch 6: " in warning
    assert "epoch 3, 4, 5 are not in the average. With `backup_dir`" in warning
    (warning,) = warnings_of(start(5), 5, True, None)
    assert "training then continues from the average" in warning


@pytest.mark.parametrize("rate", [0.05, None], ids=["trained", "compiled_anew"])
@pytest.mark.parametrize(
    ("schedule", "arguments", "epoch", "depends"),
    [
        ("manual", {}, 9, False),
        ("constant", {}, 1, True),
        ("constant", {"swa_lr": 0.01}, 8, True),
        ("constant", {"swa_lr": 0.01}, 10, False),  # at `swa_lr` from here on
        ("constant", {}, 10, True),  # whose "auto" is a fraction of it
        ("cyclic", {"swa_freq": 2, "swa_lr": 0.01, "swa_lr2": 0.02}, 10, False),
        ("cyclic", {"swa_freq": 2, "swa_lr": 0.01}, 10, True),
    ],
)
def test_a_rate_that_may_not_be_the_initial_one_is_warned_of(
    schedule, arguments, epoch, depends, rate
):
    plan = Plan(11, 10, schedule, **arguments, batch_norm=False)
    told = warnings_of(Start(plan), epoch - 1, False, rate)
    assert len(told) == (depends and rate is not None and epoch > 1)
    for warning in told:
        assert f"begins with epoch {epoch}: its learning rates are planned from" in warning
        assert "0.05" in warning
        assert "compile the model with the initial rate" in warning
    assert not warnings_of(Start(plan, is_resumed=True), epoch - 1, False, rate)
