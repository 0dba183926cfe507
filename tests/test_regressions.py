"""Regressions: faults that were found in use or in review."""

import copy
import pickle
import threading

import numpy as np
import pytest
import tensorflow as tf

from tests.fits import (
    RATE,
    Statistics,
    assert_exact,
    assert_undisturbed,
    at,
    build,
    data,
    fit,
    norm_of,
    poison,
    ran_out,
)
from tests.kits import positions
from tests.tolerances import assert_bitwise, assert_mean, assert_variance, assert_weights

pytestmark = pytest.mark.usefixtures("unoptimized_graphs")


def fail(model):
    raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", ["constant", "cyclic"])
def test_after_a_pass_that_was_cut_short_a_schedule_starts_from_the_rate_as_it_was(kit, schedule):
    model = build(kit)
    with pytest.raises(KeyboardInterrupt):
        fit(kit, model, after=[at(kit, 4, fail, "on_train_batch_begin")], epochs=4)
    assert kit.rate(model) == 0
    swa = kit.SWA(4, schedule, swa_freq=1 + (schedule == "cyclic"))
    history = model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=[swa]).history
    assert history["learning_rate"][0] == pytest.approx(RATE)
    assert kit.rate(model) > 0


def test_a_rate_of_zero_is_no_start_for_a_schedule(kit):
    model = build(kit)
    model.optimizer.learning_rate = 0.0
    with pytest.raises(ValueError, match="whose learning rate is 0"):
        model.fit(*data(), epochs=4, verbose=0, callbacks=[kit.SWA(2, "constant")])


def test_without_a_finite_snapshot_the_last_epoch_trains_and_nothing_is_delivered(kit):
    model, healthy = build(kit), []

    def spoil(model):
        healthy.append(model.get_weights())
        poison(model)

    heal = at(kit, 3, lambda model: model.set_weights(healthy[-1]))
    with pytest.warns(UserWarning, match="are not finite|no snapshot was finite"):
        recorder, _, history = fit(
            kit, model, before=[at(kit, 3, spoil)], after=[heal], start_epoch=3, epochs=4
        )
    assert_bitwise(kit.trainable(model), recorder.weights[3])
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert history["learning_rate"][-1] == pytest.approx(RATE)


def block(kit, decorate):
    class Block(kit.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = kit.keras.layers.BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)
            super().build(shape)

        def forward(self, inputs):
            return self.norm(inputs, training=True)

        def call(self, inputs, training=None):
            return self.forward(inputs)

        def compute_output_shape(self, shape):
            return shape

    setattr(Block, decorate, tf.function(getattr(Block, decorate)))
    inner = Block()
    layers = [inner, kit.keras.layers.BatchNormalization(), kit.keras.layers.Dense(1)]
    model = kit.keras.Sequential([kit.keras.layers.Input((3,)), *layers])
    model.compile(kit.keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
    return model, inner.norm


def test_a_layer_that_is_a_tf_function_is_observed(kit):
    model, norm = block(kit, "call")
    fit(kit, model, epochs=5)
    seen = positions(data()[0])
    mean, variance = kit.statistics(norm)
    assert_mean(mean, seen.mean(0), seen.std(0))
    assert_variance(variance, seen.var(0))


@pytest.mark.parametrize("of", ["model", "layer", "train_step"])
def test_a_tf_function_on_an_instance_is_seen_through(kit, of):
    model = build(kit)
    owner, name = (norm_of(model), "call") if of == "layer" else (model, "call")
    if of == "train_step":
        name = of
    setattr(owner, name, tf.function(getattr(owner, name)))
    function = getattr(owner, name)
    recorder, *_ = fit(kit, model, epochs=5)
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    seen = positions(data()[0])
    mean, variance = kit.statistics(norm_of(model))
    assert_mean(mean, seen.mean(0), seen.std(0))
    assert_variance(variance, seen.var(0))
    assert int(kit.array(model.optimizer.iterations)) == 12
    assert getattr(owner, name) is function


def test_layers_in_a_tf_function_that_cannot_be_observed_are_named(kit):
    model, norm = block(kit, "forward")
    if kit.name == "tf_keras":  # which leaves such a layer's statistics alone in training, too
        fit(kit, model, epochs=5)
        assert_bitwise(kit.statistics(norm), [[0] * 3, [1] * 3])
        return
    with pytest.warns(UserWarning, match="Take that `tf.function` away") as warned:
        fit(kit, model, epochs=5)
    assert repr(norm.name) in str(warned[0].message)
    assert repr(model.layers[1].name) not in str(warned[0].message)


def test_a_train_step_that_is_a_tf_function_updates_nothing_in_the_bn_pass(kit):
    class Stepping(kit.keras.Sequential):
        @tf.function
        def train_step(self, fed):
            return super().train_step(fed)

    layers = [kit.keras.layers.BatchNormalization(), kit.keras.layers.Dense(1)]
    model = Stepping([kit.keras.layers.Input((3,)), *layers])
    model.compile(kit.keras.optimizers.SGD(RATE, momentum=0.9), "mse", jit_compile=False)
    recorder, *_ = fit(kit, model, epochs=5)
    assert int(kit.array(model.optimizer.iterations)) == 12
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[3])
    assert_exact(kit, model, recorder, [2, 3, 4])


@ran_out
def test_a_first_epoch_that_was_cut_short_says_nothing_of_the_pass(kit):
    class StopFirst(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == 0 and batch == 0:
                self.model.stop_training = True

    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8).filter(lambda x, y: True)
    model = build(kit)
    recorder, _, history = fit(kit, model, before=[StopFirst()], start_epoch=1, fed=fed)
    assert len(history["loss"]) == 2
    assert int(kit.array(model.optimizer.iterations)) == int(recorder.states[0][0])
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[0])
    assert_exact(kit, model, recorder, [1])


@ran_out
def test_data_of_unknown_length_leaves_the_optimizer_alone_at_the_end_of_the_pass(kit):
    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8).filter(lambda x, y: True)
    model = build(kit)
    recorder, *_ = fit(kit, model, epochs=5, fed=fed)
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[3])
    assert_exact(kit, model, recorder, [2, 3, 4])


@ran_out
def test_a_pass_that_ends_within_one_execution_of_the_step(kit):
    model = build(kit)
    optimizer = kit.keras.optimizers.SGD(RATE, momentum=0.9)
    model.compile(optimizer, "mse", jit_compile=False, steps_per_execution=8)
    x, y = data()
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(3).repeat(4)
    rest = tf.data.Dataset.from_tensor_slices((x[:9], y[:9])).batch(3)
    fed = whole.concatenate(rest)
    recorder, *_ = fit(kit, model, epochs=5, fed=fed, steps_per_epoch=8)
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(x[:9]))


def test_the_bn_pass_sees_all_of_a_growing_sequence(kit):
    base = kit.keras.utils.PyDataset if kit.name == "keras3" else kit.keras.utils.Sequence

    class Growing(base):
        def __init__(self):
            super().__init__()
            self.length = 2

        def __len__(self):
            return self.length

        def __getitem__(self, i):
            x, y = data()
            return x[4 * i : 4 * i + 4].copy(), y[4 * i : 4 * i + 4].copy()

        def on_epoch_end(self):
            self.length = min(self.length + 1, 6)

    model = build(kit)
    tap = []
    count = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: tap.append(0),
        on_train_batch_end=lambda batch, logs: tap.__setitem__(-1, tap[-1] + 1),
    )
    recorder, swa = kit.Recorder(), kit.SWA(2)
    model.fit(Growing(), epochs=5, verbose=0, shuffle=False, callbacks=[count, recorder, swa])
    assert tap[-1] == (2 if kit.name == "keras3" else 6)  # Keras 3 keeps the first length
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[3])
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(data()[0][: 4 * tap[-1]]))


def test_fits_in_several_threads_do_not_meet(kit):
    base = next(c for c in kit.keras.layers.BatchNormalization.__mro__ if "call" in vars(c))
    before = vars(base)["call"]
    models = [build(kit) for _ in range(3)]
    recorders = [kit.Recorder() for _ in models]

    def run(model, recorder):
        model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=[recorder, kit.SWA(2)])

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(models, recorders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert vars(base)["call"] is before
    for model, recorder in zip(models, recorders, strict=True):
        assert_exact(kit, model, recorder, [2, 3])


def test_the_name_of_what_is_not_finite_is_right_after_a_layer_was_frozen(kit):
    def freeze(model):
        model.layers[0].trainable = False

    model = build(kit)
    with pytest.warns(UserWarning, match=r"are not finite.*dense.*/bias"):
        fit(
            kit, model,
            before=[at(kit, 3, freeze, "on_epoch_begin"), at(kit, 4, poison)], epochs=5,
        )  # fmt: skip


def test_a_layer_frozen_between_epochs_keeps_its_statistics(kit):
    layers = kit.keras.layers
    norms = [layers.BatchNormalization() for _ in range(2)]
    model = kit.keras.Sequential([layers.Input((3,)), *norms, layers.Dense(1)])
    model.compile(kit.keras.optimizers.SGD(RATE), "mse", jit_compile=False)
    kept = []

    def freeze(model):
        norms[0].trainable = False
        model.compile(kit.keras.optimizers.SGD(RATE), "mse", jit_compile=False)
        model.make_train_function()
        kept.extend(kit.statistics(norms[0]))

    fit(kit, model, before=[at(kit, 4, freeze, "on_epoch_begin")], epochs=6)
    assert_bitwise(kit.statistics(norms[0]), kept)


def test_layers_that_never_run_in_training_mode_cause_no_warning(kit):
    class Tuned(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = kit.keras.layers.BatchNormalization(), kit.keras.layers.Dense(1)

        def call(self, inputs, training=None):
            return self.dense(self.norm(inputs, training=False))

    model = Tuned()
    model(data()[0])
    model.compile(kit.keras.optimizers.SGD(1e-4), "mse", jit_compile=False)
    model.norm.moving_mean.assign([0.1, 0.2, 0.3])
    recorder, *_ = fit(kit, model, epochs=5)
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert_bitwise([kit.array(model.norm.moving_mean)], np.float32([[0.1, 0.2, 0.3]]))


@pytest.mark.parametrize("value", ["", "no JSON", "null", '{"cluster": null}'])
def test_a_tf_config_of_another_kind_is_none_of_its_business(kit, monkeypatch, value):
    monkeypatch.setenv("TF_CONFIG", value)
    kit.SWA(2)


def test_a_callback_that_has_served_can_be_copied(kit):
    swa, model = kit.SWA(2), build(kit)
    model.fit(*data(), epochs=3, verbose=0, callbacks=[swa])
    for twin in (copy.deepcopy(swa), pickle.loads(pickle.dumps(swa))):
        assert twin.options == swa.options


def test_a_list_of_callbacks_serves_several_fits(kit):
    model = build(kit)
    callbacks = kit.keras.callbacks.CallbackList(
        [kit.SWA(2)], add_history=True, model=model, epochs=4, steps=3, verbose=0
    )
    for _ in range(2):
        model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
    assert_undisturbed(kit, model)


def test_a_list_of_callbacks_that_was_interrupted_takes_the_rate_that_is_set_afterwards(kit):
    model = build(kit)

    def fail_once(epoch, logs):
        if epoch == 3 and not failed:
            failed.append(epoch)
            raise KeyboardInterrupt

    failed = []
    callbacks = kit.keras.callbacks.CallbackList(
        [kit.SWA(5, "constant"), kit.keras.callbacks.LambdaCallback(on_epoch_begin=fail_once)],
        add_history=True, model=model, epochs=6, steps=3, verbose=0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=callbacks)
    model.optimizer.learning_rate = 0.02
    model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=callbacks)
    _, _, _, first, *_ = callbacks._history.history["learning_rate"]  # after those of three epochs
    assert first == pytest.approx(0.02)


def test_weights_that_a_training_step_writes_are_the_average_again_after_the_pass(kit):
    class Writing(kit.keras.Sequential):
        def train_step(self, fed):
            logs = super().train_step(fed)
            self.trainable_variables[-1].assign(self.trainable_variables[-1] + 1.0)
            return logs

    layers = [kit.keras.layers.BatchNormalization(), kit.keras.layers.Dense(1)]
    model = Writing([kit.keras.layers.Input((3,)), *layers])
    model.compile(kit.keras.optimizers.SGD(RATE, momentum=0.9), "mse", jit_compile=False)
    seen = []
    look = at(kit, 5, lambda model: seen.extend(kit.trainable(model)))
    with pytest.warns(UserWarning, match="changes weights by other means"):
        recorder, *_ = fit(kit, model, before=[look], epochs=5)
    assert_weights(seen, recorder.mean(2, 3, 4))
    assert_bitwise(seen, kit.trainable(model))


def test_what_breaks_the_pass_leaves_averaged_statistics(kit, two_replicas):
    model, kept = build(kit, two_replicas), Statistics(kit, 2, 3)

    def break_off(model):
        model.train_function._function = None

    broken = at(kit, 4, break_off, "on_train_batch_end")
    with pytest.raises(TypeError):
        fit(kit, model, before=[kept.callback], after=[broken], epochs=4)
    kept.assert_averaged(kit, model)
    assert norm_of(model) is not None
