"""The BN pass of any kind of layer."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import (
    assert_bitwise,
    assert_exact,
    assert_statistics,
    assert_weights,
)
from tests.helpers.data import data, positions
from tests.helpers.devices import NO_STRATEGY, mirrored
from tests.helpers.fits import ONE_SNAPSHOT, fit
from tests.helpers.marks import with_renorm
from tests.helpers.models import RATE, build, build_optimizer, norm_of

pytestmark = pytest.mark.either_keras


def tapped(kit, strategy, layers, shape, compile_arguments=None, last=None):
    """Fit a model; return the layers and all positions that reached each tap in the last epoch."""
    with strategy.scope():
        inputs = kit.keras.layers.Input(shape)
        x = inputs
        for layer in layers:
            x = layer(x)
        x = kit.keras.layers.Dense(1)(kit.keras.layers.Flatten()(x))
        model = kit.keras.Model(inputs, x)
        model.compile("sgd", "mse", **{"jit_compile": False, **(compile_arguments or {})})
        build_optimizer(model)
    taps = [layer for layer in layers if isinstance(layer, kit.Tap)]
    watch = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: [setattr(t, "on", epoch == 3) for t in taps]
    )
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(20, *shape)) * 2 + 3).astype("float32")
    y = rng.normal(size=(20, 1)).astype("float32")
    fit(kit, model, [watch], fed=(x, y), **ONE_SNAPSHOT)
    return model


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3,), -1), ((5, 3), -1), ((5, 4), 1), ((4, 5, 3), -1), ((4, 5, 3), 1), ((2, 4, 5, 3), -1)],
)
def test_inputs_of_any_rank_and_axis(kit, shape, axis):
    # tf_keras's fused kernel has no channels_first on CPU.
    arguments = {"fused": False} if kit.name == "tf_keras" and axis == 1 else {}
    tap, norm = kit.Tap(), kit.keras.layers.BatchNormalization(axis=axis, **arguments)
    tapped(kit, NO_STRATEGY, [tap, norm], shape)
    assert_statistics(kit, norm, tap.positions(axis))


def test_synchronized_layers(kit, two_replicas):
    with two_replicas.scope():
        tap, norm = kit.Tap(), kit.keras.layers.BatchNormalization(synchronized=True)
    tapped(kit, two_replicas, [tap, norm], (4, 3))
    assert_statistics(kit, norm, tap.positions())
    kit.assert_replicas_agree(norm)


@with_renorm
def test_renorm_layers_normalize_plainly_and_keep_all_statistics_in_agreement(kit):
    norm = kit.keras.layers.BatchNormalization(renorm=True, renorm_clipping={"rmax": 3.0})
    first, second = kit.Tap(), kit.Tap()
    tapped(kit, NO_STRATEGY, [first, norm, second], (3,))
    seen = first.positions()
    assert_statistics(kit, norm, seen)
    np.testing.assert_allclose(kit.array(norm.renorm_mean), seen.mean(0), rtol=1e-6)
    stddev = np.sqrt(seen.var(0) + norm.epsilon)
    np.testing.assert_allclose(kit.array(norm.renorm_stddev), stddev, rtol=1e-6)
    np.testing.assert_allclose(kit.array(norm.moving_stddev), stddev, rtol=1e-6)
    gamma, beta = kit.array(norm.gamma), kit.array(norm.beta)
    for x, y in zip(first.seen, second.seen, strict=True):
        plain = gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon) + beta
        np.testing.assert_allclose(y, plain, atol=1e-5)
    assert norm.renorm


def test_nested_wrapped_and_shared_layers(kit, two_replicas):
    layers = kit.keras.layers
    with two_replicas.scope():
        taps = [kit.Tap() for _ in range(3)]
        nested, wrapped, shared = (layers.BatchNormalization() for _ in range(3))
        inner = kit.keras.Sequential([kit.keras.Sequential([taps[0], nested])])
        time = layers.TimeDistributed(wrapped)
        stack = [inner, taps[1], time, taps[2], shared, taps[2], shared]
    tapped(kit, two_replicas, stack, (4, 3))
    taps[0].on = True
    for tap, norm in zip(taps[1:], (wrapped, shared), strict=True):
        assert_statistics(kit, norm, tap.positions())
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(20, 4, 3)) * 2 + 3).astype("float32")
    assert_statistics(kit, nested, positions(x))


def test_masked_steps_are_not_counted(kit):
    layers = kit.keras.layers
    norm = layers.BatchNormalization()
    inputs = layers.Input((4, 3))
    x = layers.LSTM(2)(norm(layers.Masking()(inputs)))
    model = kit.keras.Model(inputs, layers.Dense(1)(x))
    model.compile("sgd", "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    fed = (rng.normal(size=(24, 4, 3)) + 5).astype("float32")
    fed[::3, 2:] = 0
    fit(kit, model, fed=(fed, rng.normal(size=(24, 1))), **ONE_SNAPSHOT)
    assert_statistics(kit, norm, positions(fed[(fed != 0).any(-1)]))


# Keras 3.15 itself overflows when it adds up several replicas' scaled float16 gradients.
@pytest.mark.parametrize(("policy", "n"), [("mixed_float16", 1), ("mixed_bfloat16", 2)])
def test_mixed_precision(kit, policy, n):
    strategy = mirrored(n)
    kit.keras.mixed_precision.set_global_policy(policy)
    try:
        with strategy.scope():
            tap, norm = kit.Tap(), kit.keras.layers.BatchNormalization()
            stack = [kit.keras.layers.Dense(4), tap, norm]
        tapped(kit, strategy, stack, (3,))
    finally:
        kit.keras.mixed_precision.set_global_policy("float32")
    assert_statistics(kit, norm, tap.positions())
    kit.assert_replicas_agree(norm)


def test_layers_that_do_not_train_keep_what_they_have(kit):
    keras = kit.keras

    class Mixed(keras.Model):
        def __init__(self):
            super().__init__()
            make = keras.layers.BatchNormalization
            self.frozen, self.inference, self.live = (make() for _ in range(3))
            self.unused = make(center=False, scale=False)
            self.frozen.trainable = False
            self.dense = keras.layers.Dense(1)

        def call(self, inputs, training=None):
            x = self.inference(self.frozen(inputs, training=training), training=False)
            return self.dense(self.live(x, training=training))

    model = Mixed()
    model.unused.build((None, 3))
    model(data()[0])
    model.compile("sgd", "mse", jit_compile=False)
    kept = (model.frozen, model.inference, model.unused)
    for i, layer in enumerate(kept):
        layer.moving_mean.assign([i, 2.0, 3.0])
        layer.moving_variance.assign([4.0, i + 1, 6.0])
    before = [kit.statistics(layer) for layer in kept]
    fit(kit, model, **ONE_SNAPSHOT)
    for layer, statistics in zip(kept, before, strict=True):
        assert_bitwise(kit.statistics(layer), statistics)
    x = positions(data()[0])
    for layer in kept[:2]:
        mean, variance = (s.astype("float64") for s in kit.statistics(layer))
        x = (x - mean) / np.sqrt(variance + layer.epsilon)
        x = x * kit.array(layer.gamma) + kit.array(layer.beta)
    mean, variance = kit.statistics(model.live)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-5)


def subclasses(base):
    class Keywords(base):
        def call(self, x, **kwargs):
            return super().call(x, **kwargs)

    class AlwaysTrains(base):
        def call(self, inputs):
            return super().call(inputs, training=True)

    class Doubles(base):
        def call(self, inputs, training=None, mask=None):
            return super().call(2 * inputs, training=training)

    class NeverTrains(base):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training=False)

    return Keywords, AlwaysTrains, Doubles, NeverTrains


def test_what_counts_in_a_subclass_is_what_it_hands_to_its_ancestor(kit):
    layers = [cls() for cls in subclasses(kit.keras.layers.BatchNormalization)]
    inputs = kit.keras.layers.Input((3,))
    joined = kit.keras.layers.Add()([layer(inputs) for layer in layers])
    model = kit.keras.Model(inputs, kit.keras.layers.Dense(1)(joined))
    model.compile(kit.keras.optimizers.SGD(1e-6), "mse", jit_compile=False)
    keywords, always, doubles, never = layers
    never.moving_mean.assign([7.0, 8.0, 9.0])
    fit(kit, model, **ONE_SNAPSHOT)
    x = positions(data()[0])
    # Keras 3 itself passes no `training` to a layer that does not name it.
    if kit.name == "tf_keras":
        assert_statistics(kit, keywords, x)
    for layer, seen in ((always, x), (doubles, 2 * x)):
        assert_statistics(kit, layer, seen)
    assert_bitwise([kit.array(never.moving_mean)], [[7, 8, 9]])
    assert "call" not in vars(keywords)


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
    assert_statistics(kit, norm, positions(data()[0]))


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
    assert_statistics(kit, norm_of(model), positions(data()[0]))
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
    message = str(warned.pop(UserWarning).message)
    assert repr(norm.name) in message
    assert repr(model.layers[1].name) not in message


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
