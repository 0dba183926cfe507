"""What SWA does once in a `fit`, traces above all, beside what `fit` itself does once."""

import gc
import time
from typing import Any

import numpy as np

from scripts.bench import networks
from scripts.bench.clock import step_timer, time_hooks

EPOCHS, STEPS, BATCH = 4, 4, 16


def of_resnet50(replicas: int) -> dict[str, float]:
    """Fit ResNet-50, at 32 x 32 pixels, and time what is done once.

    Returns:
        CPU seconds of the "training" step's first call, of SWA's "hooks" in all, of the first step
        of the BN "pass", and of the pass's "end" beyond its last step.
    """
    from swa_dist import SWA

    with networks.mirrored(replicas).scope():
        model = networks.resnet50(_keras(), pixels=32)
    timer, swa = step_timer(time.process_time), SWA(2)
    spent = time_hooks(swa, time.process_time)
    _fit(model, EPOCHS, STEPS, [timer, swa])
    training, bn_pass = timer.steps[0], timer.steps[-1]
    return {
        "training": training[0],
        "hooks": sum(map(sum, spent.values())),
        "pass": bn_pass[0],
        "end": max(bn_pass[-1] - float(np.median(bn_pass[1:-1])), 0.0),
    }


def whole_fit(replicas: int, epochs: int, steps: int, with_swa: bool) -> float:
    """Return the CPU seconds of a `fit` of MobileNetV2, at 64 x 64 pixels, from its first step."""
    from swa_dist import SWA

    keras = _keras()
    with networks.mirrored(replicas).scope():
        model = keras.applications.MobileNetV2(weights=None, input_shape=(64, 64, 3))
    began = time.process_time()
    _fit(model, epochs, steps, [SWA(2)] if with_swa else [])
    return time.process_time() - began


def _keras() -> Any:
    import tensorflow as tf

    return tf.keras


def _fit(model: Any, epochs: int, steps: int, callbacks: list[Any]) -> None:
    import tensorflow as tf

    keras = _keras()
    with model.distribute_strategy.scope():
        model.compile(
            keras.optimizers.SGD(0.01, momentum=0.9), keras.losses.SparseCategoricalCrossentropy()
        )
    batch = tf.random.normal([BATCH, *model.input_shape[1:]]), tf.zeros([BATCH], tf.int32)
    data = tf.data.Dataset.from_tensors(batch).cache().repeat(steps)
    # Python would else look through all that was built before, at times of its own.
    gc.collect()
    gc.freeze()
    model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks)
