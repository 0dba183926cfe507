"""What happens in which epoch, and what is said: without training, see `helpers/stand_ins.py`."""

import functools

import pytest

from swa_dist.run import Run
from tests.helpers.stand_ins import RATE, StandInFit

SNAPSHOT, CARRY, BACK = "snapshot", "carry the average", "own weights back"
COPY = "average into the model"
RECOMPUTE, AGAIN = "pass over bn_data", "its statistics again"
BN_DATA = object()
HOOKS = ["epoch begin", "batch end", "epoch end"]


@pytest.fixture
def fit(monkeypatch):
    return functools.partial(StandInFit, monkeypatch)


def epoch(number, *notes):
    return [f"epoch {number}", *notes]


def assert_ends(fitted, *notes):
    assert fitted.notes[-len(notes) :] == [*notes]


def test_with_bn_the_last_epoch_is_the_pass(fit):
    fitted = fit(5, 3).train()
    assert fitted.notes == [
        *epoch(1), *epoch(2), *epoch(3, SNAPSHOT), *epoch(4, SNAPSHOT),
        COPY, *epoch(5),
        COPY,  # again: an optimizer, or a callback, may have put other weights there
    ]  # fmt: skip
    assert [logs["learning_rate"] for logs in fitted.logs] == [RATE] * 4 + [0]
    assert not fitted.warnings
    assert not fitted.model.stop_training


def test_without_bn_the_last_epoch_ends_with_the_average(fit):
    fitted = fit(4, 3, batch_norm=False).train(validated=True)
    assert fitted.notes == [
        *epoch(1, "validate"), *epoch(2, "validate"), *epoch(3, "validate", SNAPSHOT),
        *epoch(4, SNAPSHOT, CARRY, "validate"), BACK, COPY, COPY,
    ]  # fmt: skip
    assert [logs["learning_rate"] for logs in fitted.logs] == [RATE] * 4


def test_where_the_steps_are_unknown_the_average_comes_with_validation(fit):
    fitted = fit(2, 2, batch_norm=False, steps=None).train(validated=True)
    assert fitted.notes == [*epoch(1, "validate"), *epoch(2, SNAPSHOT, CARRY, "validate"), BACK,
                            COPY, COPY]  # fmt: skip
    fitted = fit(2, 2, batch_norm=False, steps=None).train()
    assert fitted.notes == [*epoch(1), *epoch(2, SNAPSHOT), COPY, COPY]


@pytest.mark.parametrize("freq", [2, 3])
def test_snapshots_are_taken_where_the_plan_says(fit, freq):
    fitted = fit(9, 2, swa_freq=freq).train()
    planned = fitted.state.plan.snapshot_epochs(0, 9)
    took = [
        n for n, next_ in zip(fitted.notes, fitted.notes[1:], strict=False) if next_ == SNAPSHOT
    ]
    assert took == [f"epoch {e + 1}" for e in planned]
    assert fitted.state.n_averaged == len(planned)


def test_a_run_that_begins_later_has_the_snapshots_of_its_epochs(fit):
    fitted = fit(8, 5).train(first=4)
    assert fitted.state.n_averaged == 3
    assert not fitted.warnings
    fitted = fit(8, 2).train(first=4)
    (warning,) = fitted.warnings
    assert "begins with epoch 4: " in warning
    assert "epoch 2, 3 are not in the average" in warning


@pytest.mark.parametrize("hook", HOOKS)
def test_a_stop_before_swa_is_followed_by_the_pass(fit, hook):
    fitted = fit(9, 2).train(stop_before=(4, hook))
    assert_ends(fitted, *epoch(4, SNAPSHOT), COPY, *epoch(5), COPY)
    assert [logs["learning_rate"] for logs in fitted.logs] == [RATE] * 4 + [0]
    assert fitted.model.stop_training
    assert fitted.state.n_averaged == 3
    assert not fitted.warnings


@pytest.mark.parametrize("hook", HOOKS[:2])
def test_a_stop_after_swa_within_an_epoch_is_noticed_at_its_end(fit, hook):
    fitted = fit(9, 2).train(stop_after=(4, hook))
    assert len(fitted.logs) == 5
    assert fitted.model.stop_training
    assert not fitted.warnings


def test_a_stop_does_not_move_the_start_that_was_planned_as_a_fraction(fit):
    fitted = fit(10, 0.5).train(stop_before=(6, "epoch end"))
    assert fitted.state.n_averaged == 1
    assert not fitted.warnings


def test_a_stop_after_swa_at_the_end_of_an_epoch_leaves_the_statistics_of_training(fit):
    fitted = fit(9, 2).train(stop_after=(4, "epoch end"))
    assert_ends(fitted, *epoch(4, SNAPSHOT), COPY)
    (warning,) = fitted.warnings
    for words in (
        "training ended with epoch 4", "stands after SWA", "3 snapshots", "were not recomputed",
        "put such a callback before SWA",
    ):  # fmt: skip
        assert words in warning


@pytest.mark.parametrize("stop", ["stop_before", "stop_after"])
def test_a_stop_before_the_first_snapshot_leaves_the_model_alone(fit, stop):
    fitted = fit(9, 6).train(**{stop: (3, "epoch end")})
    assert fitted.notes == [*epoch(1), *epoch(2), *epoch(3)]
    (warning,) = fitted.warnings
    assert "ended with epoch 3" in warning
    assert "at the end of epoch 6" in warning


def test_a_stop_within_the_pass_has_the_statistics_of_what_it_saw(fit):
    fitted = fit(5, 3).train(stop_before=(5, "batch end"))
    assert_ends(fitted, COPY, *epoch(5), COPY)
    assert fitted.logs[-1]["learning_rate"] == 0
    assert not fitted.warnings


def test_with_bn_data_every_epoch_trains_and_the_pass_is_before_the_last_validation(fit):
    fitted = fit(4, 3, bn_data=BN_DATA).train(validated=True)
    assert fitted.notes == [
        *epoch(1, "validate"), *epoch(2, "validate"), *epoch(3, "validate", SNAPSHOT),
        *epoch(4, SNAPSHOT, CARRY, RECOMPUTE, "validate"), BACK, COPY, AGAIN, COPY, AGAIN,
    ]  # fmt: skip
    assert [logs["learning_rate"] for logs in fitted.logs] == [RATE] * 4
    assert not fitted.warnings


def test_with_bn_data_each_validation_of_the_average_has_a_pass(fit):
    fitted = fit(3, 2, bn_data=BN_DATA, validate_average=True).train(validated=True)
    assert fitted.notes == [
        *epoch(1, "validate"), *epoch(2, SNAPSHOT, CARRY, RECOMPUTE, "validate"), BACK,
        *epoch(3, SNAPSHOT, CARRY, RECOMPUTE, "validate"), BACK, COPY, AGAIN, COPY, AGAIN,
    ]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["stop_before", "stop_after"])
def test_with_bn_data_a_stop_anywhere_ends_the_run_with_its_epoch(fit, hook, where):
    fitted = fit(9, 2, bn_data=BN_DATA).train(**{where: (4, hook)})
    assert len(fitted.logs) == 4
    assert fitted.notes.count(RECOMPUTE) == 1
    assert fitted.notes[-2:] in ([COPY, RECOMPUTE], [COPY, AGAIN])
    assert fitted.state.n_averaged == 3
    assert fitted.model.stop_training
    assert not fitted.warnings


def test_a_stop_that_is_withdrawn_after_the_pass_is_warned_of_and_forgotten(fit):
    fitted = fit(6, 2, bn_data=BN_DATA).train(stop_before=(3, "epoch end"), withdraw_after=3)
    assert len(fitted.logs) == 6
    (warning,) = fitted.warnings
    assert "Training continues with epoch 4 from the average" in warning
    assert fitted.state.progress.stopped == 0
    assert fitted.notes.count(RECOMPUTE) == 2


def test_bn_data_without_bn_layers_is_warned_of(fit):
    fitted = fit(3, 2, bn_data=BN_DATA, batch_norm=False).train()
    (warning,) = fitted.warnings
    assert "`bn_data` has no effect" in warning
    assert RECOMPUTE not in fitted.notes


@pytest.mark.parametrize("hook", HOOKS)
def test_without_bn_a_stop_ends_the_run_with_its_epoch(fit, hook):
    fitted = fit(9, 2, batch_norm=False).train(stop_before=(4, hook), validated=True)
    assert len(fitted.logs) == 4
    known_before = [SNAPSHOT, CARRY, "validate", BACK]
    notes = ["validate", SNAPSHOT] if hook == "epoch end" else known_before
    assert_ends(fitted, *epoch(4, *notes), COPY, COPY)
    assert fitted.state.n_averaged == 3


def test_a_stop_that_is_withdrawn_behind_swa_is_warned_of(fit):
    fitted = fit(6, 2, batch_norm=False).train(stop_before=(3, "epoch end"), withdraw_after=3)
    assert len(fitted.logs) == 6
    (warning,) = fitted.warnings
    assert "Training continues with epoch 4 from the average" in warning
    assert fitted.state.n_averaged == 5


def test_a_stop_that_is_withdrawn_behind_swa_after_the_pass_was_planned_does_no_harm(fit):
    """The plan of the shorter run stays: its pass is the next epoch."""
    fitted = fit(6, 2).train(stop_before=(3, "epoch end"), withdraw_after=3)
    assert_ends(fitted, SNAPSHOT, COPY, *epoch(4), COPY)
    assert len(fitted.logs) == 4


def test_a_validated_average_is_in_the_model_from_validation_to_the_next_epoch(fit):
    fitted = fit(4, 2, validate_average=True).train(validated=True)
    assert fitted.notes == [
        *epoch(1, "validate"),
        *epoch(2, SNAPSHOT, CARRY, "validate"), BACK,
        *epoch(3, SNAPSHOT, CARRY, "validate"), BACK,
        COPY, *epoch(4, "validate"), COPY,
    ]  # fmt: skip


def test_without_validation_a_validated_average_is_never_in_the_model(fit):
    fitted = fit(4, 2, validate_average=True).train()
    assert fitted.notes == [
        *epoch(1), *epoch(2, SNAPSHOT), *epoch(3, SNAPSHOT), COPY, *epoch(4), COPY
    ]  # fmt: skip


def test_weights_that_are_not_finite_are_left_out_and_named(fit):
    fitted = fit(6, 2, not_finite=[4]).train()
    assert fitted.state.n_averaged == 3
    (warning,) = fitted.warnings
    for words in ("end of epoch 4", "has 2 snapshots", "'kernel'", "lower the learning rate"):
        assert words in warning


def test_a_replica_without_samples_is_named_as_a_cause(fit):
    fitted = fit(4, 2, not_finite=[2])
    fitted.state.counted.batches_with_empty_replica = 1
    assert "fewer samples than there are replicas" in fitted.train().warnings[0]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_without_a_finite_snapshot_the_last_epoch_trains(fit, batch_norm):
    fitted = fit(3, 2, not_finite=[2, 3], batch_norm=batch_norm).train()
    assert COPY not in fitted.notes
    assert fitted.logs[-1]["learning_rate"] == RATE
    assert "no snapshot was finite" in fitted.warnings[-1]


@pytest.mark.parametrize("stopped", [None, 3])
def test_a_shorter_pass_does_not_stop_the_run_unless_it_was_stopped(fit, stopped):
    stop = (stopped, "epoch end") if stopped else None
    fitted = fit(5, 2, bn_steps=1).train(stop_before=stop)
    assert len(fitted.logs) == (4 if stopped else 5)
    assert fitted.model.stop_training is bool(stopped)
    assert not fitted.warnings


def test_a_pass_without_data_is_warned_of(fit):
    fitted = fit(4, 2).train(fed={4: 0})
    (warning,) = fitted.warnings
    assert "there was no data in the BN pass" in warning


def test_a_last_epoch_that_continues_beyond_its_declared_end_is_warned_of(fit):
    fitted = fit(3, 2, batch_norm=False).train(fed={3: 4})
    (warning,) = fitted.warnings
    assert "Epoch 3 continues after its end" in warning
    assert_ends(fitted, SNAPSHOT, CARRY, BACK, CARRY, BACK, COPY, COPY)


def test_declared_steps_that_have_not_held_are_not_relied_on(fit):
    fitted = fit(3, 2, batch_norm=False, steps=1).train(fed={1: 1, 2: 2, 3: 3})
    assert CARRY not in fitted.notes
    assert not fitted.warnings


def test_the_steps_of_a_cycle_are_learned_in_the_first_epoch(fit):
    fitted = fit(9, 3, "cyclic", 0.01, 0.04, 2, steps=None).train(
        fed=dict.fromkeys(range(1, 10), 5)
    )
    assert fitted.state.plan.steps_per_epoch == 5
    assert fitted.logs[2]["learning_rate"] == pytest.approx((0.01 + 0.04) / 2)
    assert fitted.logs[3]["learning_rate"] == pytest.approx(0.01)


@pytest.mark.parametrize(("given", "told"), [(None, 0), (8, 0), (22, 1)])
def test_another_batch_size_than_was_given_is_warned_of_once(fit, given, told):
    fitted = fit(4, 2, batch_size=given).train()
    assert fitted.state.progress.batch_size == 8
    assert len(fitted.warnings) == told
    assert all("`batch_size`=22" in line and " 8." in line for line in fitted.warnings)


def test_an_entry_of_another_callback_in_the_logs_stays(fit):
    run, logs = Run(fit(3, 2).state), {"learning_rate": 42.0}
    run.begin_epoch(0)
    run.end_epoch(0, logs)
    assert logs == {"learning_rate": 42.0}


@pytest.mark.parametrize("verbose", [0, 1])
def test_lines_are_printed_if_asked_for(fit, verbose):
    fitted = fit(3, 2, verbose=verbose).train()
    lines = [note.removeprefix("print ") for note in fitted.notes if note.startswith("print")]
    assert (
        lines
        == [
            "Model uses batch normalization. SWA will require last epoch to be a forward pass and "
            "will run with no learning rate",
            "Epoch 00002: starting stochastic weight averaging",
            "Epoch 00003: final model weights set to stochastic weight average",
            "Epoch 00003: reinitializing batch normalization layers",
            "Epoch 00003: running forward pass to adjust batch normalization",
            "Epoch 00003: tracing the forward pass, which takes up to half as long as the first "
            "step did",
        ][: 6 * verbose]
    )
    fitted = fit(3, 2, batch_norm=False, verbose=verbose).train()
    lines = [note.removeprefix("print ") for note in fitted.notes if note.startswith("print")]
    assert (
        lines
        == [
            "Epoch 00002: starting stochastic weight averaging",
            "Epoch 00004: final model weights set to stochastic weight average",
        ][: 2 * verbose]
    )
