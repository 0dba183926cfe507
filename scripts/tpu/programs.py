"""What is recorded: averages, statistics, and whole fits of small networks, and a large network."""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import swa_dist.keras
import swa_dist.tfkeras
from scripts.tpu.recording import REPLICAS, Recorder
from swa_dist.averaging.bn_average import BatchNormAverage
from swa_dist.batch_norm.statistics import BatchNormStatistics

# Of a model: two matrices with buffers of their own, and small weights that are packed.
SHAPES = [(1024, 1024), (3, 3, 128, 256), (1024,), (), (7, 3), (64,)]

KERAS_VERSIONS = [
    ("Keras 3", keras, swa_dist.keras.SWA),
    ("tf_keras", tf_keras, swa_dist.tfkeras.SWA),
]


def all_programs(recorder: Recorder, quick: bool) -> Iterator[Callable[[], None]]:
    """Yield functions that record all there is, or a small part of it."""
    dtypes = ["float32"] if quick else ["float32", "bfloat16", "float16", "float64", "mixed"]
    for dtype in dtypes:
        yield lambda: average(recorder, dtype)  # noqa: B023
        yield lambda: average(recorder, dtype, ema_momentum=0.9)  # noqa: B023
    for name, version, swa in KERAS_VERSIONS[: 1 if quick else 2]:

        def fits(**how: Any) -> Callable[[], None]:
            return lambda: fit(recorder, name, version, swa, **how)  # noqa: B023

        yield fits()
        yield fits(snapshot_freq=2, ema_momentum=0.9)
        yield lambda: recompute(recorder, name, version)  # noqa: B023
        if quick:
            return
        yield fits(policy="mixed_bfloat16")
        yield fits(steps_per_execution=2)
        yield fits(steps_per_execution=2, snapshot_freq=1)
        yield fits(ragged=True)
        yield fits(norm={"synchronized": True})
        yield fits(norm={"renorm": True})
    yield lambda: resnet(recorder)


def average(recorder: Recorder, dtype: str, ema_momentum: float | None = None) -> None:
    """Record all that a `WeightAverage` does."""
    recorder.stage = f"WeightAverage, {dtype}" + ", EMA" * bool(ema_momentum)
    cycle = ["float32", "bfloat16", "float16", "float64"] if dtype == "mixed" else [dtype]
    with recorder.strategy.scope():
        weights = [
            tf.Variable(tf.ones(shape, cycle[i % len(cycle)])) for i, shape in enumerate(SHAPES)
        ]
    model = SimpleNamespace(trainable_variables=weights, distribute_strategy=recorder.strategy)
    averaged = swa_dist.WeightAverage(model, ema_momentum=ema_momentum)
    averaged.update()
    averaged.copy_to_model()
    averaged.normalize()
    averaged.swap()
    averaged.swap()


def fit(
    recorder: Recorder,
    name: str,
    version: ModuleType,
    swa: Any,
    policy: str = "float32",
    steps_per_execution: int = 1,
    ragged: bool = False,
    norm: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Record a `fit`: its training step, the step of its BN pass, and all in between."""
    how = [policy] if policy != "float32" else []
    how += [f"{steps_per_execution} steps per execution"] * (steps_per_execution > 1)
    how += ["a ragged batch"] * ragged + list(norm or {})
    how += [f"{option}={value}" for option, value in options.items()]
    recorder.stage = ", ".join([f"fit, {name}", *how])
    recorder.batches = [16, 9]
    version.mixed_precision.set_global_policy(policy)
    try:
        with recorder.strategy.scope():
            model = network(version, norm or {})
            model.compile(
                version.optimizers.SGD(0.05, momentum=0.9),
                version.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                jit_compile=False,
                steps_per_execution=steps_per_execution,
            )
        stage = recorder.stage

        def begin(epoch: int, logs: Any = None) -> None:
            recorder.stage = stage + ", BN pass" * (epoch == 3)

        data = images(100 if ragged else 128).batch(64, drop_remainder=not ragged)
        note = version.callbacks.LambdaCallback(on_epoch_begin=begin)
        model.fit(data, epochs=4, verbose=0, shuffle=False, callbacks=[note, swa(2, **options)])
    finally:
        version.mixed_precision.set_global_policy("float32")


def recompute(recorder: Recorder, name: str, version: ModuleType) -> None:
    """Record `update_bn`, and what happens to statistics beside it."""
    recorder.stage = f"update_bn, {name}"
    with recorder.strategy.scope():
        model = network(version, {})
        model.build((None, 32, 32, 3))
    data = images(128).map(lambda x, y: x).batch(64, drop_remainder=True)
    swa_dist.update_bn(model, data)
    layers = swa_dist.keras.SWA.keras_api.of(model).trainable_batch_norm(model)
    statistics = BatchNormAverage(layers, recorder.strategy)
    statistics.update()
    statistics.copy_to_model()
    statistics.remember()
    statistics.restore()
    BatchNormStatistics(layers, recorder.strategy).restore()


def resnet(recorder: Recorder) -> None:
    """Record ResNet-50: 25.6 million weights, 53 BN layers."""
    recorder.stage = "ResNet-50"
    with recorder.strategy.scope():
        model = keras.applications.ResNet50(weights=None)
    for momentum in (None, 0.999):
        recorder.stage = "ResNet-50" + ", EMA" * bool(momentum)
        averaged = swa_dist.WeightAverage(model, ema_momentum=momentum)
        averaged.update()
        averaged.copy_to_model()
        averaged.swap()
    recorder.stage = "ResNet-50"
    batch = tf.random.normal([REPLICAS * 8, 224, 224, 3])
    swa_dist.update_bn(model, tf.data.Dataset.from_tensors(batch))


def must_not_compile(recorder: Recorder) -> None:
    """Record what the compiler has to refuse, lest its word be worth nothing."""
    recorder.stage = "must not compile"

    def host() -> Any:
        return tf.numpy_function(lambda: np.float32(1), [], tf.float32)

    def too_large() -> tf.Tensor:  # 32 GiB, in a chip of 16
        x = tf.random.stateless_normal([2**16, 2**17], [1, 2])
        return tf.reduce_sum(x @ tf.transpose(x) + tf.transpose(x @ tf.transpose(x)))

    def strings() -> tf.Tensor:
        numbers = tf.random.stateless_normal([8], [1, 2])
        return tf.strings.length(tf.strings.as_string(numbers))

    for function in (host, too_large, strings):
        recorder.record(f"must not compile: {function.__name__}", function)


def network(version: ModuleType, norm: dict[str, Any]) -> Any:
    """Return two convolutions with BN behind each."""
    layers = version.layers
    model = version.Sequential([layers.Input((32, 32, 3))])
    for width, strides in ((32, 1), (64, 2)):
        model.add(layers.Conv2D(width, 3, strides=strides, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(**norm))
        model.add(layers.Activation("relu"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10, dtype="float32"))
    return model


def images(n: int, shape: Sequence[int] = (32, 32, 3)) -> tf.data.Dataset:
    """Return samples and labels."""
    x = np.random.default_rng(0).normal(size=(n, *shape)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, np.arange(n) % 10))
