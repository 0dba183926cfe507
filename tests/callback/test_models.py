"""Any model that Keras can train: the average, the BN statistics, and a model that trains on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import assert_bitwise, assert_mean, assert_variance, assert_weights
from tests.helpers.data import batched, positions
from tests.helpers.devices import mirrored
from tests.helpers.kit import KITS
from tests.helpers.models import build_optimizer

CASES = []


@dataclass
class Case:
    """A compiled model and its data, and what must hold of it in particular."""

    model: Any
    x: Any
    y: Any
    norms: Sequence = ()  # for each trainable BN layer: a tap or positions, the layer
    still: Sequence = ()  # variables that nothing may change
    optimizers: Sequence = field(default_factory=list)  # where it is not the model's own alone


def case(replicas=None, kits=("keras3", "tf_keras")):
    """Enter a builder into the table; no replicas: no strategy.

    Unless told, one Keras version trains it on two replicas and the other without a strategy.
    """

    def enter(build):
        for kit in KITS:
            if kit.name in kits:
                on_two = len(CASES) % 4 in (0, 3)
                n = (2 if on_two else 0) if replicas is None else replicas
                CASES.append(pytest.param(kit, build, n, id=f"{build.__name__}-{kit.name}"))
        return build

    return enter


def data(n=24, shape=(3,), seed=0):
    # Eighths: every dtype here holds them, so what is fed is what arrives.
    rng = np.random.default_rng(seed)
    x = (rng.integers(-16, 25, (n, *shape)) / 8).astype("float32")
    return x, rng.normal(size=(n, 1)).astype("float32")


def sgd(kit, **arguments):
    return kit.keras.optimizers.SGD(0.02, momentum=0.9, **arguments)


def compiled(kit, model, optimizer=None, loss="mse", **arguments):
    model.compile(optimizer or sgd(kit), loss, **{"jit_compile": False, **arguments})
    build_optimizer(model)
    return model


def stack(kit, dtype=None, **dense):
    """A network with BN of its input and within, and what reaches either."""
    layers = kit.keras.layers
    tap = kit.Tap(dtype=dtype)
    norms = [layers.BatchNormalization(dtype=dtype) for _ in range(2)]
    model = kit.keras.Sequential(
        [
            layers.Input((3,), dtype=None if str(dtype).startswith("mixed") else dtype),
            norms[0],
            layers.Dense(4, activation="tanh", dtype=dtype, **dense),
            tap,
            norms[1],
            layers.Dense(1, dtype=dtype),
        ]
    )
    return model, [(positions(data()[0]), norms[0]), (tap, norms[1])]


def stacked(kit, optimizer=None, dtype=None, dense=None, **arguments):
    model, norms = stack(kit, dtype, **(dense or {}))
    return Case(compiled(kit, model, optimizer, **arguments), *data(), norms)


@case()
def subclassed(kit):
    layers = kit.keras.layers

    class Model(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Dense(4), kit.Tap(), layers.BatchNormalization()]
            self.heads = {"one": layers.Dense(1), "other": layers.Dense(1)}

        def call(self, inputs, training=None):
            dense, tap, norm = self.parts
            x = norm(tap(dense(inputs), training=training), training=training)
            return self.heads["one"](x) * tf.sigmoid(self.heads["other"](x))

    model = Model()
    model(data()[0])
    return Case(compiled(kit, model), *data(), [model.parts[1:]])


@case()
def functional_with_a_branch(kit):
    layers = kit.keras.layers
    inputs = layers.Input((3,))
    tap, norm = kit.Tap(), layers.BatchNormalization()
    x = layers.Dense(4)(inputs)
    x = layers.Add()([x, layers.ReLU()(norm(tap(x)))])
    model = kit.keras.Model(inputs, layers.Dense(1)(x))
    return Case(compiled(kit, model), *data(), [(tap, norm)])


@case()
def nested(kit):
    inner, norms = stack(kit)
    inputs = kit.keras.layers.Input((3,))
    outer = kit.keras.Model(inputs, kit.keras.layers.Dense(1)(inner(inputs)))
    model = kit.keras.Sequential([outer, kit.keras.layers.Dense(1)])
    model.build((None, 3))
    return Case(compiled(kit, model), *data(), norms)


@case()
def several_inputs_and_outputs(kit):
    layers = kit.keras.layers
    inputs = {name: layers.Input((3,), name=name) for name in "ab"}
    tap, norm = kit.Tap(), layers.BatchNormalization()
    x = norm(tap(layers.Concatenate()([layers.Dense(2)(inputs["a"]), inputs["b"]])))
    outputs = {name: layers.Dense(1, name=name)(x) for name in "uv"}
    model = compiled(kit, kit.keras.Model(inputs, outputs), loss={"u": "mse", "v": "mae"})
    (a, u), (b, v) = data(), data(seed=1)
    return Case(model, {"a": a, "b": b}, {"u": u, "v": v}, [(tap, norm)])


@case()
def shared_layers(kit):
    layers = kit.keras.layers
    inputs = layers.Input((3,))
    dense, tap, norm = layers.Dense(3), kit.Tap(), layers.BatchNormalization()
    x = norm(tap(dense(norm(tap(dense(inputs))))))
    model = kit.keras.Model(inputs, layers.Dense(1)(x))
    return Case(compiled(kit, model), *data(), [(tap, norm)])


@case()
def time_distributed(kit):
    layers = kit.keras.layers
    tap, norm = kit.Tap(), layers.BatchNormalization()
    model = kit.keras.Sequential(
        [
            layers.Input((5, 3)),
            layers.TimeDistributed(layers.Dense(4)),
            tap,
            layers.TimeDistributed(norm),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    return Case(compiled(kit, model), *data(shape=(5, 3)), [(tap, norm)])


@case()
def own_wrapper(kit):
    layers = kit.keras.layers

    class Normalized(layers.Wrapper):
        def __init__(self, layer):
            super().__init__(layer)
            self.tap, self.norm = kit.Tap(), layers.BatchNormalization()

        def build(self, input_shape):
            self.layer.build(input_shape)
            self.norm.build(self.layer.compute_output_shape(input_shape))
            self.built = True

        def call(self, inputs, training=None):
            x = self.tap(self.layer(inputs), training=training)
            return self.norm(x, training=training)

        def compute_output_shape(self, input_shape):
            return self.layer.compute_output_shape(input_shape)

    wrapper = Normalized(layers.Dense(4))
    model = kit.keras.Sequential([layers.Input((3,)), wrapper, layers.Dense(1)])
    return Case(compiled(kit, model), *data(), [(wrapper.tap, wrapper.norm)])


def minimize(tape, loss, variables, optimizer):
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))


@case()
def several_forward_passes_in_train_step(kit):
    network, norms = stack(kit)
    tap = kit.Tap()
    network = kit.keras.Sequential([tap, network])
    network.build((None, 3))

    class Consistent(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.network = network

        def call(self, inputs, training=None):
            return self.network(inputs, training=training)

        def train_step(self, fed):
            x, y = fed
            with tf.GradientTape() as tape:
                first = self(x, training=True)
                noisy = self(x + tf.random.normal(tf.shape(x)), training=True)
                calm = tf.stop_gradient(self(x, training=False))
                loss = tf.reduce_mean((first - y) ** 2 + (noisy - calm) ** 2)
            minimize(tape, loss, self.trainable_variables, self.optimizer)
            return {"loss": loss}

    model = Consistent()
    model(data()[0])
    return Case(compiled(kit, model), *data(), [(tap, norms[0][1]), norms[1]])


@case()
def gan_with_two_optimizers(kit):
    layers = kit.keras.layers

    def network(outputs):
        tap, norm = kit.Tap(), layers.BatchNormalization()
        parts = [layers.Dense(4), tap, norm, layers.ReLU(), layers.Dense(outputs)]
        return kit.keras.Sequential([layers.Input((3,)), *parts]), (tap, norm)

    (generator, first), (discriminator, second) = network(3), network(1)

    class Gan(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.generator, self.discriminator = generator, discriminator
            self.g_optimizer = kit.keras.optimizers.Adam(0.01)
            self.d_optimizer = sgd(kit)

        def call(self, inputs, training=None):
            return self.discriminator(self.generator(inputs, training=training), training=training)

        def train_step(self, fed):
            real, _ = fed
            noise = tf.random.normal(tf.shape(real))
            with tf.GradientTape() as tape:
                fake = self.generator(noise, training=True)
                logits = [self.discriminator(x, training=True) for x in (real, fake)]
                d_loss = tf.reduce_mean(tf.nn.softplus(-logits[0]) + tf.nn.softplus(logits[1]))
            minimize(tape, d_loss, self.discriminator.trainable_variables, self.d_optimizer)
            with tf.GradientTape() as tape:
                g_loss = tf.reduce_mean(tf.nn.softplus(-self(noise, training=True)))
            minimize(tape, g_loss, self.generator.trainable_variables, self.g_optimizer)
            return {"d_loss": d_loss, "g_loss": g_loss}

    model = Gan()
    model(data()[0])
    model.compile(jit_compile=False)
    optimizers = [model.g_optimizer, model.d_optimizer]
    return Case(model, *data(), [first, second], optimizers=optimizers)


@case()
def frozen_teacher_in_train_step(kit):
    (network, norms), (teacher, _) = stack(kit), stack(kit)
    teacher.trainable = False

    class Student(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.network, self.teacher = network, teacher

        def call(self, inputs, training=None):
            return self.network(inputs, training=training)

        def train_step(self, fed):
            x, y = fed
            target = tf.stop_gradient(self.teacher(x, training=True))
            with tf.GradientTape() as tape:
                predicted = self(x, training=True)
                loss = tf.reduce_mean((predicted - y) ** 2 + (predicted - target) ** 2)
            minimize(tape, loss, self.trainable_variables, self.optimizer)
            return {"loss": loss}

    model = Student()
    model(data()[0])
    return Case(compiled(kit, model), *data(), norms, still=teacher.weights)


@case(kits=["tf_keras"])
@case(replicas=1, kits=["keras3"])  # 3.15 itself overflows on two
def mixed_float16(kit):
    optimizer = kit.keras.mixed_precision.LossScaleOptimizer(sgd(kit))
    return stacked(kit, optimizer, dtype="mixed_float16")


@case()
def mixed_bfloat16(kit):
    return stacked(kit, dtype="mixed_bfloat16")


@case()
def bfloat16(kit):
    return stacked(kit, dtype="bfloat16")


@case()
def float16(kit):
    return stacked(kit, dtype="float16")


@case()
def float64(kit):
    case = stacked(kit, dtype="float64")
    case.x, case.y = case.x.astype("float64"), case.y.astype("float64")
    return case


def with_a_weight(kit, dtype, use, shape=(3,)):
    """A model with one more trainable weight, of another dtype."""
    layers = kit.keras.layers

    class Other(layers.Layer):
        def build(self, input_shape):
            self.other = self.add_weight(
                shape=shape, dtype=dtype, initializer="ones", trainable=True, name="other"
            )

        def call(self, inputs):
            return use(inputs, tf.convert_to_tensor(self.other))

        def compute_output_shape(self, input_shape):
            return input_shape

    tap, norm, other = kit.Tap(), layers.BatchNormalization(), Other()
    parts = [layers.Input((3,)), other, tap, norm, layers.Dense(1)]
    # Without momentum, which optimizers have for real numbers only.
    model = compiled(kit, kit.keras.Sequential(parts), kit.keras.optimizers.SGD(0.02))
    return other, Case(model, *data(), [(tap, norm)])


@case(replicas=0)
def complex64(kit):
    def filtered(inputs, spectrum):
        return tf.math.real(tf.signal.ifft(tf.signal.fft(tf.cast(inputs, "complex64")) * spectrum))

    return with_a_weight(kit, "complex64", filtered)[-1]


@case(replicas=0)
def a_counter_that_calls_itself_trainable(kit):
    other, case = with_a_weight(kit, "int32", lambda inputs, _: tf.identity(inputs))
    assert any(v is other.other for v in case.model.trainable_variables)
    case.still = [other.other]
    return case


@case(replicas=0)
def a_weight_without_entries(kit):
    return with_a_weight(kit, "float32", lambda inputs, _: tf.identity(inputs), shape=(0,))[-1]


# Keras 3.15 itself puts the reduction over replicas into a `cond`; tf_keras 2.21 has no such thing.
@case(replicas=0, kits=["keras3"])
def gradient_accumulation(kit):
    return stacked(kit, sgd(kit, gradient_accumulation_steps=2))


@case(replicas=0)
def clipnorm(kit):
    return stacked(kit, sgd(kit, clipnorm=0.1))


@case(replicas=0)
def clipvalue(kit):
    return stacked(kit, sgd(kit, clipvalue=0.05))


@case(replicas=0)
def global_clipnorm(kit):
    return stacked(kit, sgd(kit, global_clipnorm=0.1))


@case(replicas=0)
def weight_decay(kit):
    return stacked(kit, sgd(kit, weight_decay=0.1))


@case(replicas=0)
def adamw(kit):
    return stacked(kit, kit.keras.optimizers.AdamW(0.01, weight_decay=0.1))


@case(replicas=0)
def unit_norm_and_regularizers(kit):
    dense = {
        "kernel_constraint": kit.keras.constraints.UnitNorm(),
        "kernel_regularizer": kit.keras.regularizers.L2(0.1),
        "activity_regularizer": kit.keras.regularizers.L1(0.01),
    }
    return stacked(kit, dense=dense)


@case(replicas=0)
def non_negative(kit):
    return stacked(kit, dense={"kernel_constraint": kit.keras.constraints.NonNeg()})


@case(replicas=0)
def eager(kit):
    return stacked(kit, run_eagerly=True)


@case(replicas=0)
def steps_per_execution(kit):
    return stacked(kit, steps_per_execution=2)


@case(replicas=0)
def xla(kit):
    layers = kit.keras.layers
    norm = layers.BatchNormalization()  # first: XLA has no host calls, and so no taps
    parts = [norm, layers.Dense(4, activation="tanh"), layers.Dense(1)]
    model = kit.keras.Sequential([layers.Input((3,)), *parts])
    x, y = data()
    return Case(compiled(kit, model, jit_compile=True), x, y, [(positions(x), norm)])


@case()
def tied_embedding(kit):
    layers = kit.keras.layers

    class Tied(layers.Layer):
        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def call(self, inputs):
            return tf.matmul(inputs, tf.convert_to_tensor(self.kernel), transpose_b=True)

    embedding = layers.Embedding(12, 4)
    embedding.build(None)
    tap, norm = kit.Tap(), layers.BatchNormalization()
    parts = [embedding, layers.GlobalAveragePooling1D(), tap, norm, Tied(embedding.embeddings)]
    model = kit.keras.Sequential([layers.Input((5,), dtype="int32"), *parts])
    loss = kit.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, (24, 5)), rng.integers(0, 12, 24)
    return Case(compiled(kit, model, loss=loss), x, y, [(tap, norm)])


@case(kits=["keras3"])
def lora(kit):
    layers = kit.keras.layers
    dense, tap, norm = layers.Dense(4), kit.Tap(), layers.BatchNormalization()
    model = kit.keras.Sequential([layers.Input((3,)), dense, tap, norm, layers.Dense(1)])
    dense.enable_lora(2)
    return Case(compiled(kit, model), *data(), [(tap, norm)], still=[dense._kernel])


@case()
def own_low_rank_factors(kit):
    layers = kit.keras.layers

    class Adapted(layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(name="kernel", shape=(3, 4), trainable=False)
            self.down = self.add_weight(name="down", shape=(3, 2))
            self.up = self.add_weight(name="up", shape=(2, 4), initializer="zeros")
            self.built = True

        def call(self, inputs):
            return tf.matmul(inputs, self.kernel + tf.matmul(self.down, self.up))

        def compute_output_shape(self, input_shape):
            return (*input_shape[:-1], 4)

    adapted, tap, norm = Adapted(), kit.Tap(), layers.BatchNormalization()
    model = kit.keras.Sequential([layers.Input((3,)), adapted, tap, norm, layers.Dense(1)])
    return Case(compiled(kit, model), *data(), [(tap, norm)], still=[adapted.kernel])


@case()
def frozen_bn_alone(kit):
    layers = kit.keras.layers
    norm = layers.BatchNormalization(trainable=False)
    model = kit.keras.Sequential([layers.Input((3,)), layers.Dense(4), norm, layers.Dense(1)])
    norm.moving_mean.assign([0.1, 0.2, 0.3, 0.4])
    norm.moving_variance.assign([1.1, 1.2, 1.3, 1.4])
    return Case(compiled(kit, model), *data(), still=norm.weights)


@case(replicas=0)
def large_embedding(kit):
    layers = kit.keras.layers
    parts = [layers.Embedding(20_000, 16), layers.Flatten(), layers.Dense(1)]
    model = kit.keras.Sequential([layers.Input((5,), dtype="int32"), *parts])
    x = np.random.default_rng(0).integers(0, 20_000, (24, 5))
    optimizer = kit.keras.optimizers.Adam(0.01)
    return Case(compiled(kit, model, optimizer), x, data()[1])


@case(kits=["tf_keras"])
@case(replicas=1, kits=["keras3"])  # 3.15 itself fails where replicas share such a tensor
def ragged_inputs(kit):
    layers = kit.keras.layers

    class Mean(layers.Layer):
        def call(self, inputs):
            return tf.reduce_mean(inputs, axis=1)

        def compute_output_shape(self, input_shape):
            return (input_shape[0], input_shape[2])

    tap, norm = kit.Tap(), layers.BatchNormalization()
    parts = [Mean(), layers.Dense(4), tap, norm, layers.Dense(1)]
    model = kit.keras.Sequential([layers.Input((None, 3), ragged=True), *parts])
    lengths = np.arange(24) % 4 + 1
    x = tf.RaggedTensor.from_row_lengths(data(lengths.sum())[0], lengths)
    return Case(compiled(kit, model), x, data()[1], [(tap, norm)])


@case(kits=["tf_keras"])
@case(replicas=1, kits=["keras3"])  # 3.15 itself fails where replicas share such a tensor
def sparse_inputs(kit):
    layers = kit.keras.layers
    tap, norm = kit.Tap(), layers.BatchNormalization()
    parts = [layers.Dense(4), tap, norm, layers.Dense(1)]
    model = kit.keras.Sequential([layers.Input((3,), sparse=True), *parts])
    x, y = data()
    return Case(compiled(kit, model), tf.sparse.from_dense(x * (x > 0)), y, [(tap, norm)])


def assert_average(actual, expected):
    """Arrays against their float64 means, as exact as each one's dtype allows."""
    for a, e in zip(actual, expected, strict=True):
        if a.dtype.kind == "c":
            assert_weights([a.real, a.imag], [e.real, e.imag])
        elif a.dtype == np.float64:
            np.testing.assert_allclose(a, e, rtol=1e-14, atol=1e-16)
        elif a.dtype == np.float32 or a.dtype.kind == "i":
            assert_weights([a], [e])
        else:
            # The mean is rounded twice, to float32 and then to this dtype. Near the middle of two
            # of its numbers the first rounding can decide the second.
            assert_within_one_ulp(a, e)


def assert_within_one_ulp(actual, expected):
    rounded = expected.astype(actual.dtype)
    ulp = np.abs(np.spacing(rounded)).astype("float64")
    assert (np.abs(actual.astype("float64") - rounded.astype("float64")) <= ulp).all()


def assert_statistics(kit, seen, norm):
    seen = seen if isinstance(seen, np.ndarray) else seen.positions()
    mean, variance = kit.statistics(norm)
    if mean.dtype.itemsize == 2:  # under Keras 3; tf_keras keeps them in float32
        assert_within_one_ulp(mean, seen.mean(0))
        assert_within_one_ulp(variance, seen.var(0))
        return
    assert_mean(mean, seen.mean(0), seen.std(0))
    assert_variance(variance, seen.var(0))


@pytest.mark.either_keras
@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras's own, of unused weights
@pytest.mark.parametrize(("kit", "build", "replicas"), CASES, indirect=["kit"])
def test_any_model_that_keras_can_train(kit, build, replicas):
    strategy = mirrored(replicas) if replicas else tf.distribute.get_strategy()
    with strategy.scope():
        case = build(kit)
    model = case.model
    optimizers = case.optimizers or [model.optimizer]
    taps = [seen for seen, _ in case.norms if isinstance(seen, kit.Tap)]
    still = [kit.array(v) for v in case.still]
    states = []

    def optimizer_states():
        return [array for optimizer in optimizers for array in kit.optimizer_state(optimizer)]

    watch = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: [setattr(tap, "on", epoch == 2) for tap in taps],
        on_epoch_end=lambda epoch, logs: states.append(optimizer_states()),
    )
    recorder, swa = kit.Recorder(), kit.SWA(start_epoch=1)
    fed = {"x": case.x, "y": case.y, "batch_size": 8, "verbose": 0}
    model.fit(**fed, epochs=3, callbacks=[watch, recorder, swa])

    averaged = (1, 2) if case.norms else (1, 2, 3)
    assert swa.n_averaged == len(averaged)
    assert_average(kit.trainable(model), recorder.mean(*averaged))
    assert_bitwise(optimizer_states(), states[averaged[-1] - 1])
    for seen, norm in case.norms:
        assert_statistics(kit, seen, norm)
    assert_bitwise([kit.array(v) for v in case.still], still)
    kit.assert_replicas_agree(model)

    before = kit.trainable(model)
    model.fit(batched(case.x, case.y), shuffle=False, verbose=0)
    after = kit.trainable(model)
    assert all(np.isfinite(a.astype("complex128")).all() for a in after)
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
