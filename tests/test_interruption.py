"""After an exception or Ctrl-C: what the model and the callback hold, and what comes next."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.averaging import model_average
from tests.conftest import mirrored
from tests.fits import NO_STRATEGY, at, build, data, norm_of
from tests.kits import batched
from tests.tolerances import assert_bitwise, assert_weights

pytestmark = pytest.mark.usefixtures("unoptimized_graphs")

HELD_OUT = batched(*data(16, seed=3))


class PrunedError(Exception):
    pass


def prune(model):
    raise PrunedError


def run(kit, model, swa, before=(), after=(), epochs=6, **arguments):
    recorder = kit.Recorder()
    fed = {
        "x": batched(*data()),
        "validation_data": HELD_OUT,
        "epochs": epochs,
        "verbose": 0,
        "shuffle": False,
    }
    with pytest.raises((PrunedError, KeyboardInterrupt)):
        model.fit(**{**fed, **arguments}, callbacks=[*before, recorder, swa, *after])
    return recorder


def first_weights(kit, model, *callbacks):
    """The weights with which the next `fit` begins."""
    seen = []
    begin = kit.keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append(model.get_weights())
    )
    model.fit(batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[begin, *callbacks])
    return seen[0]


def set_weights(kit, model, weights, folder):
    model.set_weights(weights)


def load_weights(kit, model, weights, folder):
    other = build(kit)
    other.fit(batched(*data()), verbose=0, shuffle=False)  # or its file would lack the optimizer's
    other.set_weights(weights)
    # tf_keras cannot load metrics under a strategy, which its new format has, too.
    path = f"{folder}/other.weights.h5" if kit.name == "keras3" else f"{folder}/other.h5"
    other.save_weights(path)
    model.load_weights(path)


def set_layers(kit, model, weights, folder):
    for layer in model.layers:
        layer.set_weights([weights.pop(0) for _ in layer.get_weights()])


def assign(kit, model, weights, folder):
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)


def restore_checkpoint(kit, model, weights, folder):
    other = build(kit)
    other.set_weights(weights)
    written = tf.train.Checkpoint(layers=list(map(kit.tensor, other.weights)))
    variables = list(map(kit.tensor, model.weights))
    tf.train.Checkpoint(layers=variables).read(written.write(f"{folder}/other"))


@pytest.mark.parametrize("again", [False, True], ids=["without_swa", "with_swa"])
@pytest.mark.parametrize("replicas", [0, 2])
@pytest.mark.parametrize(
    "write", [set_weights, load_weights, set_layers, assign, restore_checkpoint]
)
def test_what_is_written_after_a_pruned_run_is_what_the_next_one_begins_with(
    kit, write, replicas, again, tmp_path
):
    model = build(kit, mirrored(replicas) if replicas else NO_STRATEGY)
    swa = kit.SWA(2, validate_average=True)
    initial = [w.copy() for w in model.get_weights()]
    run(kit, model, swa, after=[at(kit, 3, prune)])
    write(kit, model, [w.copy() for w in initial], tmp_path)
    assert_bitwise(first_weights(kit, model, *[swa] * again), initial)


def test_even_if_it_is_bit_by_bit_the_average_that_the_model_carried(kit, tmp_path):
    model, path = build(kit), str(tmp_path / "best.weights.h5")
    checkpoint = kit.keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    run(kit, model, kit.SWA(2, validate_average=True), after=[checkpoint, at(kit, 3, prune)])
    average = [w.copy() for w in model.get_weights()]
    model.load_weights(path)
    assert_bitwise(model.get_weights(), average)
    assert_bitwise(first_weights(kit, model), average)


@pytest.mark.parametrize("replicas", [0, 2])
def test_also_if_a_checkpoint_restores_it_past_assign(kit, replicas, tmp_path):
    model = build(kit, mirrored(replicas) if replicas else NO_STRATEGY)
    run(kit, model, kit.SWA(2, validate_average=True), after=[at(kit, 3, prune)])
    average = [w.copy() for w in model.get_weights()]
    checkpoint = tf.train.Checkpoint(model=model)
    checkpoint.read(checkpoint.write(str(tmp_path / "average")))
    assert_bitwise(first_weights(kit, model), average)


@pytest.mark.parametrize("replicas", [0, 2])
def test_what_another_callback_writes_while_the_model_carries_the_average_trains_on(kit, replicas):
    """And the average stays the mean of the snapshots."""
    model = build(kit, mirrored(replicas) if replicas else NO_STRATEGY)
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
        batched(*data()), epochs=5, verbose=0, shuffle=False, validation_data=HELD_OUT,
        callbacks=[keep, swa, at(kit, 3, shrink), see],
    )  # fmt: skip
    kernel = [v.shape == (3, 1) for v in model.trainable_variables].index(True)
    np.testing.assert_array_equal(begun[0][kernel], written[0])
    expected = [np.mean(np.array(ws, np.float64), 0) for ws in zip(*snapshots[1:4], strict=True)]
    assert_weights(kit.trainable(model), expected)


@pytest.mark.parametrize("validate_average", [False, True])
@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_epoch_end"])
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


@pytest.mark.parametrize("when", ["before_training", "before_writing"])
def test_ctrl_c_while_the_average_is_put_into_the_model_leaves_the_trained_weights(
    kit, when, monkeypatch
):
    def interrupt(*args):
        raise KeyboardInterrupt

    model, trained = build(kit), []
    keep = at(kit, 3, lambda model: trained.append(model.get_weights()), "on_train_batch_end")
    ready = at(
        kit,
        3,
        lambda model: monkeypatch.setattr(model_average, when, interrupt),
        "on_train_batch_end",
    )
    run(kit, model, kit.SWA(2, validate_average=True), before=[keep, ready])
    assert_bitwise(model.get_weights(), trained[-1])
    monkeypatch.undo()
    assert_bitwise(first_weights(kit, model), trained[-1])


def test_an_interrupted_instance_given_to_evaluate_does_nothing(kit):
    """There it would take a snapshot amid an epoch, and put the average into the model."""
    model, swa = build(kit), kit.SWA(2, validate_average=True)
    run(kit, model, swa, before=[at(kit, 4, prune, "on_train_batch_end")])
    before, n_averaged = model.get_weights(), swa.n_averaged
    assert n_averaged == 2
    model.evaluate(HELD_OUT, verbose=0, callbacks=[swa])
    assert swa.n_averaged == n_averaged
    assert_bitwise(model.get_weights(), before)


def test_an_evaluation_of_another_callback_within_fit_changes_nothing(kit):
    def evaluate(model):
        model.evaluate(HELD_OUT, verbose=0, callbacks=[swa])

    model, swa, recorder = build(kit), kit.SWA(2, validate_average=True), kit.Recorder()
    amid = at(kit, 3, evaluate, "on_train_batch_end")
    trained = []
    keep = kit.keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: trained.append(kit.trainable(model))
    )
    model.fit(
        batched(*data(24)), validation_data=HELD_OUT, epochs=5, verbose=0, shuffle=False,
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
    run(kit, model, swa, after=[at(kit, 1, prune)])
    with pytest.raises(RuntimeError, match="before the end of epoch 2"):
        use()
    run(kit, model, swa, after=[at(kit, 3, prune)])
    use()
    model.fit(batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[swa])
    with pytest.raises(RuntimeError, match="the model holds the average"):
        use()


def test_after_a_bn_pass_that_was_interrupted_the_average_can_be_used(kit):
    model, swa = build(kit), kit.SWA(2)
    recorder = run(kit, model, swa, after=[at(kit, 4, prune, "on_train_batch_begin")], epochs=4)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    with swa.averaged_weights():
        assert_weights(kit.trainable(model), recorder.mean(2, 3))
    assert not any(w.any() for w in model.get_weights())


PHASES = {
    "before the first snapshot": (1, "on_epoch_end"),
    "between two steps": (3, "on_train_batch_begin"),
    "in validation": (3, "on_test_batch_begin"),
    "at the end of an epoch": (3, "on_epoch_end"),
    "in the BN pass": (6, "on_train_batch_begin"),
    "after it": (6, "on_epoch_end"),
}


@pytest.mark.parametrize("validate_average", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_the_instance_can_be_copied_and_pickled(kit, phase, validate_average):
    model, swa = build(kit), kit.SWA(2, "constant", validate_average=validate_average, verbose=1)
    run(kit, model, swa, after=[at(kit, PHASES[phase][0], prune, PHASES[phase][1])])
    for copied in (copy.copy(swa), copy.deepcopy(swa), pickle.loads(pickle.dumps(swa))):
        assert copied.options == swa.options
        assert copied.n_averaged == swa.n_averaged
        assert copied.model is None
        with pytest.raises(RuntimeError, match="outside"), copied.averaged_weights():
            pass
    other = build(kit)
    other.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[copied])
    assert copied.n_averaged == 2


def test_a_copy_holds_nothing_of_the_run_and_the_next_run_frees_it(kit):
    model, swa = build(kit), kit.SWA(2)
    run(kit, model, swa, after=[at(kit, 4, prune)])
    average = weakref.ref(swa._run._state.snapshots.average)
    copied = copy.deepcopy(swa)
    assert len(pickle.dumps(copied)) < 10_000
    with pytest.raises(ValueError, match="leave room"):  # refused, and yet the next run
        build(kit).fit(batched(*data()), epochs=2, verbose=0, shuffle=False, callbacks=[swa])
    gc.collect()
    assert average() is None


def test_the_statistics_that_were_trained_come_back_with_the_weights(kit):
    model, seen = build(kit), []
    keep = at(
        kit, 3, lambda model: seen.append(kit.statistics(norm_of(model))), "on_train_batch_end"
    )
    run(kit, model, kit.SWA(2, validate_average=True), before=[keep], after=[at(kit, 3, prune)])
    carried = kit.statistics(norm_of(model))
    assert any((a != b).any() for a, b in zip(carried, seen[-1], strict=True))
    model.make_train_function()  # what comes before any training
    assert_bitwise(kit.statistics(norm_of(model)), seen[-1])


def test_a_checkpoint_that_is_restored_while_the_model_carries_the_average_stays(kit, tmp_path):
    model, written, begun = build(kit), [w.copy() for w in build(kit).get_weights()], []
    see = at(kit, 4, lambda model: begun.append(model.get_weights()), "on_train_batch_begin")
    swa = kit.SWA(2, validate_average=True)
    restore = at(kit, 3, lambda model: restore_checkpoint(kit, model, written, tmp_path))
    with pytest.warns(UserWarning, match="The average of 2 snapshots is lost"):
        model.fit(
            batched(*data()), validation_data=HELD_OUT, epochs=5, verbose=0, shuffle=False,
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
            batched(*data()), validation_data=HELD_OUT, epochs=5, verbose=0, shuffle=False,
            callbacks=[swa, at(kit, 3, restore_and_train), recorder],
        )  # fmt: skip
    assert swa.n_averaged == 1
    assert_bitwise(kit.trainable(model), recorder.weights[3])
