"""After an exception or Ctrl-C: what the model and the callback hold, and what comes next."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import assert_bitwise, assert_weights
from tests.helpers.callbacks import at
from tests.helpers.data import batched, data, held_out
from tests.helpers.devices import on
from tests.helpers.fits import fit
from tests.helpers.interruptions import KilledError, kill
from tests.helpers.models import build

pytestmark = pytest.mark.either_keras


def run(kit, model, swa, before=(), after=(), **arguments):
    """A run that is interrupted; its recorder."""
    recorder = kit.Recorder()
    given = {"fed": batched(*data()), "epochs": 6, "validation_data": held_out(), **arguments}
    with pytest.raises((KilledError, KeyboardInterrupt)):
        fit(kit, model, before, after, swa=swa, recorder=recorder, **given)
    return recorder


def first_weights(kit, model, *callbacks):
    """The weights with which the next `fit` begins."""
    seen = []
    begin = kit.keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append(model.get_weights())
    )
    model.fit(batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[begin, *callbacks])
    return seen[0]


def restore_checkpoint(kit, model, weights, folder):
    other = build(kit)
    other.set_weights(weights)
    written = tf.train.Checkpoint(layers=list(map(kit.tensor, other.weights)))
    variables = list(map(kit.tensor, model.weights))
    tf.train.Checkpoint(layers=variables).read(written.write(f"{folder}/other"))


@pytest.mark.parametrize("again", [False, True], ids=["without_swa", "with_swa"])
def test_what_is_written_after_an_interrupted_run_is_what_the_next_one_begins_with(kit, again):
    """Of other ways to write: `tests/averaging/test_model_average.py`."""
    model = build(kit, on(2 * again))
    swa = kit.SWA(2, validate_average=True)
    initial = [w.copy() for w in model.get_weights()]
    run(kit, model, swa, after=[at(kit, 3, kill)])
    model.set_weights(initial)
    assert_bitwise(first_weights(kit, model, *[swa] * again), initial)


def test_weights_of_the_average_that_are_loaded_are_what_the_next_run_begins_with(kit, tmp_path):
    """Although they are bit by bit those that the model carries."""
    model, path = build(kit), str(tmp_path / "best.weights.h5")
    checkpoint = kit.keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    run(kit, model, kit.SWA(2, validate_average=True), after=[checkpoint, at(kit, 3, kill)])
    average = [w.copy() for w in model.get_weights()]
    model.load_weights(path)
    assert_bitwise(model.get_weights(), average)
    assert_bitwise(first_weights(kit, model), average)


def test_what_another_callback_writes_while_the_model_carries_the_average_trains_on(kit):
    """And the average stays the mean of the snapshots."""
    model = build(kit, on(2))
    written, begun = [], []

    def shrink(model):
        kernel = model.layers[-1].kernel
        kernel.assign(0.5 * kernel)
        written.append(kit.array(kernel))

    see = at(kit, 4, lambda model: begun.append(kit.trainable(model)), "on_train_batch_begin")
    snapshots = []
    keep = kit.keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: snapshots.append(kit.trainable(model))
    )
    swa = kit.SWA(2, validate_average=True)
    model.fit(
        batched(*data()), epochs=5, verbose=0, shuffle=False, validation_data=held_out(),
        callbacks=[keep, swa, at(kit, 3, shrink), see],
    )  # fmt: skip
    kernel = [v.shape == (3, 1) for v in model.trainable_variables].index(True)
    np.testing.assert_array_equal(begun[0][kernel], written[0])
    expected = [np.mean(np.array(ws, np.float64), 0) for ws in zip(*snapshots[1:4], strict=True)]
    assert_weights(kit.trainable(model), expected)


@pytest.mark.parametrize(
    ("hook", "validate_average"),
    [("on_train_batch_begin", False), ("on_epoch_end", False), ("on_epoch_end", True)],
)
def test_after_ctrl_c_the_average_is_there_to_be_used(kit, hook, validate_average):
    def interrupt(model):
        raise KeyboardInterrupt

    model, swa, trained = build(kit), kit.SWA(2, validate_average=validate_average), []
    keep = kit.keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: trained.append(kit.trainable(model))
    )
    run(kit, model, swa, before=[keep, at(kit, 4, interrupt, hook)])
    # Between its validation and its end an epoch has had its snapshot if the average is validated.
    snapshots = trained[1 : 1 + swa.n_averaged]
    assert len(snapshots) == 2 + (validate_average and hook == "on_epoch_end")
    before = model.get_weights()
    with swa.averaged_weights():
        mean = [np.mean(np.array(w, np.float64), 0) for w in zip(*snapshots, strict=True)]
        assert_weights(kit.trainable(model), mean)
    assert_bitwise(model.get_weights(), before)
    assert kit.rate(model) == pytest.approx(0.05)


def test_an_interrupted_instance_given_to_evaluate_does_nothing(kit):
    """There it would take a snapshot amid an epoch, and put the average into the model."""
    model, swa = build(kit), kit.SWA(2, validate_average=True)
    run(kit, model, swa, before=[at(kit, 4, kill, "on_train_batch_end")])
    before, n_averaged = model.get_weights(), swa.n_averaged
    assert n_averaged == 2
    model.evaluate(held_out(), verbose=0, callbacks=[swa])
    assert swa.n_averaged == n_averaged
    assert_bitwise(model.get_weights(), before)


def test_an_evaluation_of_another_callback_within_fit_changes_nothing(kit):
    def evaluate(model):
        model.evaluate(held_out(), verbose=0, callbacks=[swa])

    model, swa, recorder = build(kit), kit.SWA(2, validate_average=True), kit.Recorder()
    amid = at(kit, 3, evaluate, "on_train_batch_end")
    trained = []
    keep = kit.keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: trained.append(kit.trainable(model))
    )
    model.fit(
        batched(*data(24)), validation_data=held_out(), epochs=5, verbose=0, shuffle=False,
        callbacks=[keep, recorder, amid, swa],
    )  # fmt: skip
    assert swa.n_averaged == 3
    expected = [np.mean(np.array(ws, np.float64), 0) for ws in zip(*trained[1:4], strict=True)]
    assert_weights(kit.trainable(model), expected)


def test_what_averaged_weights_says_it_does(kit):
    model, swa = build(kit), kit.SWA(2)

    def use():
        with swa.averaged_weights():
            pass

    with pytest.raises(RuntimeError, match="a call outside of it"):
        use()
    run(kit, model, swa, after=[at(kit, 1, kill)])
    with pytest.raises(RuntimeError, match="before the end of epoch 2"):
        use()
    run(kit, model, swa, after=[at(kit, 3, kill)])
    use()
    model.fit(batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[swa])
    with pytest.raises(RuntimeError, match="the model holds the average"):
        use()


def test_after_a_bn_pass_that_was_interrupted_the_average_can_be_used(kit):
    model, swa = build(kit), kit.SWA(2)
    recorder = run(kit, model, swa, after=[at(kit, 4, kill, "on_train_batch_begin")], epochs=4)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    with swa.averaged_weights():
        assert_weights(kit.trainable(model), recorder.mean(2, 3))
    assert not any(w.any() for w in model.get_weights())


HOOKS = ["on_epoch_begin", "on_train_batch_begin", "on_test_batch_begin", "on_epoch_end"]


def test_the_instance_can_be_copied_and_pickled_in_any_phase(kit):
    model, swa = build(kit), kit.SWA(2, "constant", validate_average=True, verbose=1)
    copied = []

    def copy_it(*args, **kwargs):
        for twin in (copy.copy(swa), copy.deepcopy(swa), pickle.loads(pickle.dumps(swa))):
            assert twin.options == swa.options
            assert twin.n_averaged == swa.n_averaged
            assert twin.model is None
            with pytest.raises(RuntimeError, match="outside"), twin.averaged_weights():
                pass
            copied.append(twin)

    class Copy(kit.keras.callbacks.Callback):
        pass

    for hook in HOOKS:
        setattr(Copy, hook, copy_it)
    fit(kit, model, after=[Copy()], swa=swa, epochs=4, validation_data=held_out())
    copy_it()
    assert {twin.n_averaged for twin in copied} == {0, 1, 2}
    other = build(kit)
    fit(kit, other, swa=copied[len(copied) // 2], epochs=3)
    assert copied[len(copied) // 2].n_averaged == 1


def test_a_copy_holds_nothing_of_the_run_and_the_next_run_frees_it(kit):
    model, swa = build(kit), kit.SWA(2)
    run(kit, model, swa, after=[at(kit, 4, kill)])
    average = weakref.ref(swa._run._state.snapshots.average)
    copied = copy.deepcopy(swa)
    assert len(pickle.dumps(copied)) < 10_000
    with pytest.raises(ValueError, match="leave room"):  # refused, and yet the next run
        build(kit).fit(batched(*data()), epochs=2, verbose=0, shuffle=False, callbacks=[swa])
    gc.collect()
    assert average() is None


def test_a_checkpoint_that_is_restored_while_the_model_carries_the_average_stays(kit, tmp_path):
    model, written, begun = build(kit), [w.copy() for w in build(kit).get_weights()], []
    see = at(kit, 4, lambda model: begun.append(model.get_weights()), "on_train_batch_begin")
    swa = kit.SWA(2, validate_average=True)
    restore = at(kit, 3, lambda model: restore_checkpoint(kit, model, written, tmp_path))
    with pytest.warns(UserWarning, match="The average of 2 snapshots is lost"):
        model.fit(
            batched(*data()), validation_data=held_out(), epochs=5, verbose=0, shuffle=False,
            callbacks=[swa, restore, see],
        )  # fmt: skip
    assert_bitwise(begun[0], written)
    assert swa.n_averaged == 1


def test_an_average_that_was_overwritten_unseen_is_said_to_be_lost(kit, tmp_path):
    """Restored past `assign`, and trained by another callback, while the model carried it."""
    model, written = build(kit), [w.copy() for w in build(kit).get_weights()]

    def restore_and_train(model):
        restore_checkpoint(kit, model, written, tmp_path)
        model.train_on_batch(*data(8))

    recorder, swa = kit.Recorder(), kit.SWA(2, validate_average=True)
    with pytest.warns(UserWarning, match="The average of 2 snapshots is lost"):
        model.fit(
            batched(*data()), validation_data=held_out(), epochs=5, verbose=0, shuffle=False,
            callbacks=[swa, at(kit, 3, restore_and_train), recorder],
        )  # fmt: skip
    assert swa.n_averaged == 1
    assert_bitwise(kit.trainable(model), recorder.weights[3])
