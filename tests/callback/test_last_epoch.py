"""What callbacks and validation see of the final model in the last epoch, without a BN pass."""

import numpy as np
import pytest

from tests.helpers.assertions import assert_bitwise, assert_weights
from tests.helpers.callbacks import at, stop
from tests.helpers.data import batched, data, held_out
from tests.helpers.devices import NO_STRATEGY
from tests.helpers.fits import fit
from tests.helpers.marks import resumes_after_the_end_with_use_ema, tf_keras_only
from tests.helpers.models import build

pytestmark = pytest.mark.either_keras

EPOCHS = 4


def seen_by(kit, hook="on_epoch_end"):
    """A callback that records the model's weights in one hook of each epoch."""

    class Seen(kit.keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.weights, self.losses = [], []

        def see(self, *args, **kwargs):
            self.weights.append(kit.trainable(self.model))

        def on_epoch_end(self, epoch, logs=None):
            self.losses.append((logs or {}).get("val_loss"))

    if hook == "on_epoch_end":

        def on_epoch_end(self, epoch, logs=None):
            self.see()
            self.losses.append((logs or {}).get("val_loss"))

        Seen.on_epoch_end = on_epoch_end
    else:
        setattr(Seen, hook, Seen.see)
    return Seen()


def run(kit, strategy=NO_STRATEGY, before=(), after=(), **arguments):
    """A run without BN: model, recorder, callback."""
    model = build(kit, strategy, norm=False)
    arguments = {"fed": batched(*data(20)), "epochs": EPOCHS, **arguments}
    recorder, swa, _ = fit(kit, model, before, after, **arguments)
    return model, recorder, swa


def loaded(kit, path):
    """A model with the weights in a file, which has an optimizer's variables, too."""
    model = build(kit, norm=False)
    model.fit(held_out(), verbose=0, shuffle=False)
    model.load_weights(str(path))
    return model


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "not_validated"])
def test_callbacks_on_either_side_of_swa_see_the_final_model(
    kit, two_replicas, validated, tmp_path
):
    before, after = seen_by(kit), seen_by(kit)
    path = str(tmp_path / "{epoch}.weights.h5")
    checkpoints = [
        kit.keras.callbacks.ModelCheckpoint(path.replace("{", f"{side}-{{"), save_weights_only=True)
        for side in ("before", "after")
    ]
    validation = {"validation_data": held_out()} if validated else {}
    model, recorder, _ = run(
        kit, two_replicas, [before, checkpoints[0]], [after, checkpoints[1]], **validation
    )
    final = kit.trainable(model)
    assert_weights(final, recorder.mean(2, 3, 4))
    for side in (before, after):
        assert_bitwise(side.weights[-1], final)
        for seen, trained in zip(side.weights[:-1], recorder.weights, strict=False):
            assert_bitwise(seen, trained)
    if validated:
        assert after.losses[-1] == pytest.approx(model.evaluate(held_out(), verbose=0), rel=1e-5)
    for side in ("before", "after"):
        saved = loaded(kit, tmp_path / f"{side}-{EPOCHS}.weights.h5")
        assert_bitwise(kit.trainable(saved), final)


def test_training_is_what_it_is_without_swa(kit):
    _, with_swa, _ = run(kit, validation_data=held_out())
    _, without, _ = run(kit, start_epoch=EPOCHS, validation_data=held_out())
    for ours, theirs in zip(with_swa.weights, without.weights, strict=True):
        assert_bitwise(ours, theirs)


def test_the_best_epoch_may_be_the_average(kit, tmp_path):
    path = str(tmp_path / "best.weights.h5")
    best = kit.keras.callbacks.ModelCheckpoint(
        path, monitor="val_loss", save_best_only=True, save_weights_only=True
    )
    seen = seen_by(kit)
    run(kit, after=[best, seen], epochs=9, validation_data=held_out())
    assert loaded(kit, path).evaluate(held_out(), verbose=0) == pytest.approx(
        min(seen.losses), rel=1e-5
    )


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_train_batch_end"])
def test_after_an_early_stop_callbacks_behind_swa_see_the_final_model(kit, hook):
    behind = seen_by(kit)
    model, recorder, swa = run(
        kit, before=[at(kit, 3, stop, hook)], after=[behind], validation_data=held_out(), epochs=9
    )
    assert swa.n_averaged == 2
    if hook == "on_epoch_end":  # else the recorder sees the average, too
        assert_weights(kit.trainable(model), recorder.mean(2, 3))
    assert_bitwise(behind.weights[-1], kit.trainable(model))
    if hook == "on_train_batch_end":  # known before validation
        assert behind.losses[-1] == pytest.approx(model.evaluate(held_out(), verbose=0), rel=1e-5)


def test_several_steps_an_execution(kit):
    before = seen_by(kit)
    model, recorder = build(kit, norm=False), kit.Recorder()
    model.compile("sgd", "mse", steps_per_execution=2, jit_compile=False)
    fed = batched(*data(24))  # of three batches: the second execution has one step
    model.fit(
        fed,
        epochs=3,
        verbose=0,
        shuffle=False,
        callbacks=[recorder, before, kit.SWA(2)],
    )
    assert_weights(kit.trainable(model), recorder.mean(2, 3))
    assert_bitwise(before.weights[-1], kit.trainable(model))


def test_steps_that_several_an_execution_do_not_divide(kit):
    """Of five steps the last execution has one; Keras 3 runs six."""
    before = seen_by(kit)
    model, recorder = build(kit, norm=False), kit.Recorder()
    model.compile("sgd", "mse", steps_per_execution=2, jit_compile=False)
    model.fit(
        batched(*data(24)).repeat(), steps_per_epoch=5, epochs=3, verbose=0, shuffle=False,
        callbacks=[recorder, before, kit.SWA(2)],
    )  # fmt: skip
    assert_weights(kit.trainable(model), recorder.mean(2, 3))
    assert_bitwise(before.weights[-1], kit.trainable(model))


def growing(kit, lengths):
    """A sequence of batches that has another length in each epoch, as tf_keras allows."""
    x, y = data(24)

    class Growing(kit.keras.utils.Sequence):
        def __init__(self):
            super().__init__()
            self.lengths = list(lengths)

        def __len__(self):
            return self.lengths[0]

        def __getitem__(self, i):
            return x[8 * i : 8 * i + 8].copy(), y[8 * i : 8 * i + 8].copy()

        def on_epoch_end(self):
            self.lengths[:] = self.lengths[1:] or self.lengths

    return Growing()


@tf_keras_only
def test_steps_per_execution_that_are_tuned_within_an_epoch(kit, monkeypatch):
    def double(model):
        model.steps_per_execution = 2

    def single(model):
        model.steps_per_execution = 1

    # Tuned here, and not by a thread that measures the machine.
    for method in ("start", "stop"):
        monkeypatch.setattr(kit.keras.utils.StepsPerExecutionTuner, method, lambda tuner: None)

    before, recorder = seen_by(kit), kit.Recorder()
    model = build(kit, norm=False)
    model.compile("sgd", "mse", steps_per_execution="auto", jit_compile=False)
    change = [
        callback
        for epoch in (1, 2, 3)
        for callback in (
            at(kit, epoch, double, "on_epoch_begin"), at(kit, epoch, single, "on_train_batch_end")
        )
    ]  # fmt: skip
    model.fit(
        batched(*data(40)), epochs=3, verbose=0, shuffle=False,
        callbacks=[*change, recorder, before, kit.SWA(2)],
    )  # fmt: skip
    assert [len(rates) for rates in recorder.batch_rates] == [4, 4, 4]
    assert_weights(kit.trainable(model), recorder.mean(2, 3))
    assert_bitwise(before.weights[-1], kit.trainable(model))


@tf_keras_only
def test_a_last_epoch_that_continues_beyond_its_declared_end_is_warned_of(kit):
    steps, model = seen_by(kit, "on_train_batch_end"), build(kit, norm=False)
    with pytest.warns(UserWarning, match="Epoch 3 continues after its end"):
        model.fit(
            growing(kit, [2, 2, 3]), epochs=3, verbose=0, shuffle=False,
            callbacks=[steps, kit.SWA(2)],
        )  # fmt: skip
    second, third, beyond = steps.weights[3], steps.weights[5], steps.weights[6]
    assert any((a != b).any() for a, b in zip(third, beyond, strict=True))
    expected = [(a.astype("float64") + b) / 2 for a, b in zip(second, third, strict=True)]
    assert_weights(kit.trainable(model), expected)


def test_the_state_that_is_saved_before_the_average_is_shown_is_of_the_trained_weights(
    kit, tmp_path
):
    """Interrupted after the last epoch, BackupAndRestore has the average, and SWA the rest."""
    reference, _, _ = run(kit, validation_data=held_out())

    class Interrupt(kit.keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch + 1 == EPOCHS:
                raise KeyboardInterrupt

    def callbacks():
        return [kit.keras.callbacks.BackupAndRestore(str(tmp_path / "model"))]

    def swa():
        return kit.SWA(2, backup_dir=tmp_path / "swa")

    with pytest.raises(KeyboardInterrupt):
        run(kit, before=callbacks(), after=[Interrupt()], swa=swa(), validation_data=held_out())
    model, _, resumed = run(kit, before=callbacks(), swa=swa(), validation_data=held_out())
    assert resumed.n_averaged == 3
    assert_bitwise(kit.trainable(model), kit.trainable(reference))


@resumes_after_the_end_with_use_ema
def test_an_optimizers_own_average_gives_way_also_in_a_run_resumed_after_its_bn_pass(
    kit, two_replicas, tmp_path
):
    """Keras then puts it into the model before any hook of SWA but the first."""
    strategy = two_replicas

    def fit(folder, *after):
        kit.keras.utils.set_random_seed(7)
        model = build(kit, strategy)
        with strategy.scope():
            model.compile(kit.keras.optimizers.SGD(0.05, use_ema=True), "mse", jit_compile=False)
        backup = kit.keras.callbacks.BackupAndRestore(str(folder / "model"))
        model.fit(
            batched(*data(20)), epochs=EPOCHS, verbose=0, shuffle=False,
            callbacks=[backup, kit.SWA(2, backup_dir=folder / "swa"), *after],
        )  # fmt: skip
        return model.get_weights()

    def interrupt(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "interrupted", at(kit, EPOCHS, interrupt))
    assert_bitwise(fit(tmp_path / "interrupted"), fit(tmp_path / "never"))


def test_an_optimizers_own_average_gives_way(kit):
    kit.keras.utils.set_random_seed(7)
    model, recorder, seen = build(kit, norm=False), kit.Recorder(), seen_by(kit)
    model.compile(kit.keras.optimizers.SGD(0.05, use_ema=True), "mse", jit_compile=False)
    model.fit(
        batched(*data(20)), epochs=EPOCHS, verbose=0, shuffle=False, validation_data=held_out(),
        callbacks=[recorder, kit.SWA(2), seen],
    )  # fmt: skip
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert_bitwise(seen.weights[-1], kit.trainable(model))


def test_a_frozen_batch_normalization_layer_keeps_its_statistics(kit):
    model = build(kit)
    norm = next(layer for layer in model.layers if hasattr(layer, "moving_mean"))
    norm.trainable = False
    before, seen = kit.statistics(norm), seen_by(kit)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(batched(*data(20)), epochs=3, verbose=0, shuffle=False, callbacks=[seen, kit.SWA(2)])
    assert_bitwise(kit.statistics(norm), before)
    assert_bitwise(seen.weights[-1], kit.trainable(model))
    assert all(np.isfinite(w).all() for w in kit.trainable(model))
