"""The average in use during training, which is not affected."""

import functools

import numpy as np
import pytest

from tests.helpers.assertions import Statistics, assert_bitwise, assert_exact, assert_weights
from tests.helpers.callbacks import at, stop
from tests.helpers.data import data, held_out
from tests.helpers.devices import NO_STRATEGY, mirrored
from tests.helpers.fits import fit
from tests.helpers.models import build, norm_of

pytestmark = pytest.mark.either_keras


START, EPOCHS = 2, 5


HOOKS = (
    "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_test_begin",
    "on_test_batch_begin", "on_test_batch_end", "on_test_end", "on_epoch_end", "on_predict_begin",
    "on_predict_batch_end", "on_predict_end",
)  # fmt: skip


def nothing(swa):
    return []


def run(
    kit, strategy=NO_STRATEGY, before=(), after=nothing, epochs=EPOCHS, validated=None, **arguments
):
    """A run, with validation after the epochs given: model, recorder, callback, history."""
    model, swa = build(kit, strategy), kit.SWA(START, **arguments)
    validation = {} if validated is None else {
        "validation_data": held_out(), "validation_freq": validated,
    }  # fmt: skip
    trained = fit(
        kit, model, before, after(swa), swa=swa, fed=data(20), epochs=epochs, **validation
    )
    return model, *trained


@functools.cache
def plain(kit, n):
    """What a run leaves that does not look at the average before its end."""
    model, recorder, _, history = run(kit, mirrored(n), validated=[1])
    return recorder, history, kit.statistics(norm_of(model))


def assert_undisturbed(kit, n, weights, losses, statistics=None):
    """Training went as it goes without a look at the average."""
    recorder, history, its_statistics = plain(kit, n)
    for ours, theirs in zip(weights[: EPOCHS - 1], recorder.weights[: EPOCHS - 1], strict=True):
        assert_bitwise(ours, theirs)
    if losses is not None:
        assert_bitwise([np.array(losses[:-1])], [np.array(history["loss"][:-1])])
    if statistics is not None:
        assert_bitwise(statistics, its_statistics)


def assert_ends_as_ever(kit, model):
    """The end is that of a run that does not look at the average; the recorder has seen it."""
    recorder, _, statistics = plain(kit, 2)
    assert_weights(kit.trainable(model), recorder.mean(*range(START, EPOCHS)))
    assert_bitwise(kit.statistics(norm_of(model)), statistics)
    kit.assert_replicas_agree(model)


def all_weights(kit, model):
    return [replica for v in model.weights for replica in kit.replicas(v)]


def loss_of(model, weights, statistics):
    """What validation gives for weights and statistics."""
    norm = norm_of(model)
    variables = [*model.trainable_variables, norm.moving_mean, norm.moving_variance]
    for v, value in zip(variables, [*weights, *statistics], strict=True):
        v.assign(value)
    return model.evaluate(held_out(), verbose=0)


@pytest.mark.parametrize(("hook", "n"), [("on_epoch_end", 2), ("on_train_batch_end", 2)])
def test_the_model_carries_the_average_and_nothing_is_left_of_it(kit, hook, n):
    seen = []

    def look(swa):
        def carried(model):
            with swa.averaged_weights():
                with swa.averaged_weights():  # does nothing more
                    pass
                seen.append(kit.trainable(model))
                seen.append(kit.statistics(norm_of(model)))
                seen.append(model.evaluate(held_out(), verbose=0))
                raise KeyError

        def action(model):
            if not seen:
                before = all_weights(kit, model)
                with pytest.raises(KeyError):
                    carried(model)
                assert_bitwise(all_weights(kit, model), before)

        return [at(kit, 4, action, hook)]

    last = 4 if hook == "on_epoch_end" else 3
    kept = Statistics(kit, *range(START, last + 1))
    model, recorder, _, history = run(kit, mirrored(n), before=[kept.callback], after=look)

    weights, statistics, loss = seen
    assert_weights(weights, recorder.mean(*range(START, last + 1)))
    expected = [np.mean(s, 0) for s in zip(*kept.snapshots, strict=True)]
    np.testing.assert_allclose(statistics, expected, rtol=1e-6)
    assert loss == pytest.approx(loss_of(build(kit), weights, statistics), rel=1e-5)

    # Amid an epoch, `evaluate` starts the epoch's metrics anew.
    losses = history["loss"] if hook == "on_epoch_end" else None
    assert_undisturbed(kit, n, recorder.weights, losses, kit.statistics(norm_of(model)))
    assert_weights(kit.trainable(model), plain(kit, n)[0].mean(*range(START, EPOCHS)))


def test_a_layer_that_is_frozen_after_snapshots_keeps_its_own_statistics(kit, two_replicas):
    """Also where the average has been in the model before."""
    seen = []

    def freeze(model):
        norm_of(model).trainable = False

    def look(swa):
        def action(model):
            own = [copies for v in norm_of(model).variables[-2:] for copies in kit.replicas(v)]
            with swa.averaged_weights():
                carried = [c for v in norm_of(model).variables[-2:] for c in kit.replicas(v)]
            seen.append((own, carried))

        return [at(kit, epoch, action) for epoch in (3, 4)]

    run(kit, two_replicas, after=lambda swa: [*look(swa), at(kit, 3, freeze)], epochs=6)
    (own, carried), (own_of_frozen, carried_of_frozen) = seen
    assert any((a != b).any() for a, b in zip(own, carried, strict=True))
    assert_bitwise(carried_of_frozen, own_of_frozen)


def test_in_the_bn_pass_the_model_has_the_average_anyway(kit, two_replicas):
    seen = []

    def look(swa):
        def action(model):
            with swa.averaged_weights():
                seen.append(all_weights(kit, model))

        return [at(kit, EPOCHS, action)]

    model, *_ = run(kit, two_replicas, after=look)
    assert_bitwise(all_weights(kit, model), seen[0])


def test_without_a_snapshot_or_a_fit_there_is_an_error(kit):
    errors = []

    def look(swa):
        def action(model):
            with pytest.raises(RuntimeError) as error, swa.averaged_weights():
                pass
            errors.append(str(error.value))

        return [at(kit, 1, action)]

    *_, swa, _ = run(kit, after=look)
    assert "before the end of epoch 2" in errors[0]
    for unused in (swa, kit.SWA(2)):
        outside = pytest.raises(RuntimeError, match="After `fit` the model holds")
        with outside, unused.averaged_weights():
            pass


@pytest.mark.exactness
@pytest.mark.parametrize("n", [2])
def test_validation_is_of_the_average(kit, n, tmp_path):
    path = str(tmp_path / "best.keras")
    checkpoint = kit.keras.callbacks.ModelCheckpoint(path, "val_loss", save_best_only=True)
    kept, losses = Statistics(kit, *range(START, EPOCHS)), []

    def behind(swa):
        def evaluate(model):
            losses.append(model.evaluate(held_out(), verbose=0))

        return [checkpoint, at(kit, 3, evaluate)]

    # The statistics of the epochs' ends, before the average comes into the model.
    class Before(kit.keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            kept.callback.set_model(self.model)
            kept.callback.on_epoch_end(self.epoch)
            trained.append(kit.trainable(self.model))

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

    trained = []
    model, _, swa, history = run(
        kit, mirrored(n), before=[Before()], after=behind, validate_average=True, validated=1
    )

    # What callbacks behind it evaluate is what validation was of.
    assert losses == [pytest.approx(history["val_loss"][2], rel=1e-5)]
    one_device = build(kit)
    for epoch in range(START, EPOCHS):
        mean = [np.mean(np.float64(ws), 0) for ws in zip(*trained[START - 1 : epoch], strict=True)]
        statistics = [np.mean(s, 0) for s in zip(*kept.snapshots[: epoch - 1], strict=True)]
        expected = loss_of(one_device, mean, statistics)
        assert history["val_loss"][epoch - 1] == pytest.approx(expected, rel=1e-4)
    recorder, its_history, _ = plain(kit, n)
    assert history["val_loss"][0] == pytest.approx(its_history["val_loss"][0], rel=1e-6)
    assert_undisturbed(kit, n, trained, history["loss"])
    assert swa.n_averaged == EPOCHS - START
    assert_weights(kit.trainable(model), recorder.mean(*range(START, EPOCHS)))
    kit.assert_replicas_agree(model)

    # The file is of the best epoch, and has the average.
    saved = kit.keras.models.load_model(path)
    assert saved.evaluate(held_out(), verbose=0) == pytest.approx(
        min(history["val_loss"]), rel=1e-5
    )


def test_early_stopping_speaks_of_the_average_and_keeps_it(kit, two_replicas):
    class Validated(kit.keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            weights.append(self.model.get_weights())

    weights = []
    stopping = kit.keras.callbacks.EarlyStopping(
        "val_loss", patience=1, min_delta=1e3, start_from_epoch=2, restore_best_weights=True
    )
    model, _, swa, history = run(
        kit, two_replicas, before=[stopping], after=lambda swa: [Validated()], epochs=9,
        validate_average=True, validated=1,
    )  # fmt: skip
    assert len(history["loss"]) == 5
    assert_bitwise(stopping.best_weights, weights[2])  # none was better by 1000
    assert swa.n_averaged == 3
    assert_weights(kit.trainable(model), plain(kit, 2)[0].mean(2, 3, 4))
    kit.assert_replicas_agree(model)


@pytest.mark.parametrize("hook", ["on_test_batch_end"])
def test_an_exception_while_the_average_is_in_the_model_costs_training_nothing(
    kit, two_replicas, hook
):
    def fail(model):
        raise KeyError

    kept = []

    class Keep(kit.keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            kept.append(all_weights(kit, self.model))
            model_of[:] = [self.model]

    model_of = []
    with pytest.raises(KeyError):
        run(
            kit, two_replicas, before=[Keep()], after=lambda swa: [at(kit, 4, fail, hook)],
            validate_average=True, validated=1,
        )  # fmt: skip
    (model,) = model_of
    assert any(
        (a != b).any() for a, b in zip(all_weights(kit, model), kept[-1], strict=True)
    )  # it still has the average
    seen = []
    recorder = kit.keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: seen.append(all_weights(kit, model))
    )
    model.fit(*data(20), verbose=0, callbacks=[recorder])
    assert_bitwise(seen[0], kept[-1])
    assert "make_train_function" not in vars(model)


def test_a_stopped_run_with_a_shorter_bn_pass_stays_stopped(kit, two_replicas):
    model = build(kit, two_replicas)
    recorder, swa = kit.Recorder(), kit.SWA(START, bn_steps=1)
    model.fit(
        *data(), batch_size=8, epochs=9, verbose=0, shuffle=False,
        callbacks=[recorder, at(kit, 3, stop), swa],
    )  # fmt: skip
    assert model.stop_training
    assert_exact(kit, model, recorder, [2, 3], seen=data()[0][:8].astype("float64"))


def test_from_any_hook(kit):
    trained, *_ = plain(kit, 2)
    looked = dict.fromkeys(HOOKS, 0)

    def copies(model):
        return [replica for v in model.weights for replica in kit.replicas(v)]

    def look(swa):
        def act(callback, hook):
            if not swa.n_averaged:
                return
            before = copies(callback.model)
            with swa.averaged_weights():
                weights = kit.trainable(callback.model)
            assert_bitwise(copies(callback.model), before)
            assert_weights(weights, trained.mean(*range(START, START + swa.n_averaged)))
            looked[hook] += 1

        class Look(kit.keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                act(self, "on_epoch_end")
                if epoch >= START:
                    self.model.predict(held_out(), verbose=0, callbacks=[self])

        for hook in {*HOOKS} - {"on_epoch_end"}:
            setattr(Look, hook, lambda self, *_, hook=hook, **__: act(self, hook))
        return [Look()]

    model, *_ = run(kit, mirrored(2), after=look, validated=1, validate_average=True)
    assert min(looked.values()) >= EPOCHS - START, looked
    assert_ends_as_ever(kit, model)


def test_epochs_without_validation_count_too(kit):
    """With `validation_freq=2`, the others have a snapshot at their end, and keep the weights."""
    seen = []

    def look(swa):
        return [at(kit, 3, lambda model: seen.append(kit.trainable(model)))]

    model, *_, history = run(kit, mirrored(2), after=look, validated=2, validate_average=True)
    assert len(history["val_loss"]) == EPOCHS // 2
    assert_bitwise(seen[0], plain(kit, 2)[0].weights[2])
    assert_ends_as_ever(kit, model)


@pytest.mark.parametrize("who", ["a callback", "the optimizer"])
def test_what_others_put_into_the_model_at_the_end_is_not_the_average(kit, two_replicas, who):
    """Without a BN pass the average of the last validation is still in the model then."""
    model = build(kit, two_replicas, norm=False)
    trained, stopping = [], []
    if who == "a callback":
        stopping += [
            kit.keras.callbacks.EarlyStopping(
                "val_loss", patience=2, min_delta=1e3, restore_best_weights=True
            )
        ]
    else:
        with two_replicas.scope():
            optimizer = kit.keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)
            model.compile(optimizer, "mse", jit_compile=False)

    class Keep(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            trained.append(None)

        def on_train_batch_end(self, batch, logs=None):
            trained[-1] = kit.trainable(self.model)

    swa = kit.SWA(1, validate_average=True)
    fit(
        kit, model, [Keep(), *stopping], swa=swa, fed=data(20), epochs=3, validation_data=held_out()
    )
    assert swa.n_averaged == len(trained) == 3
    mean = [np.mean(np.float64(ws), 0) for ws in zip(*trained, strict=True)]
    assert_weights(kit.trainable(model), mean)
    kit.assert_replicas_agree(model)
