"""What averaging costs in a `fit`: its steps, its hooks, its BN pass, and what is done once."""

import gc
from functools import partial
from typing import Any

import numpy as np

from scripts.bench import addons, memory, networks
from scripts.bench.averaging import KERAS_SWA, OURS
from scripts.bench.clock import CLOCKS, alternate, time_hooks, timed, timer

PLAIN, EMPTY = "plain", "empty callback"
UPDATE, EMA, ADDONS = "`WeightAverage.update()`", "`use_ema`", "tensorflow-addons SWA"
STEPS = "`SWA(snapshot_freq=1)`"
STEPS_EMA = "`SWA(snapshot_freq=1, ema_momentum=0.999)`"

Fit = dict[str, Any]


def fits(
    contenders: list[str],
    network: list[Any],
    batch: int,
    steps: int,
    epochs: int,
    *,
    start: int = 1,
    replicas: int = 0,
    rounds: int = 1,
    warm_up: int = 0,
    clock: str = "wall",
    each_step: bool = True,
    policy: str = "float32",
) -> dict[str, list[Fit]]:
    """Fit a new model for each contender, in turns, on one batch again and again.

    Args:
        contenders: Whatever averages, or not, or does so in every step.
        network: What `networks.build` takes.
        batch: Its size.
        steps: Of an epoch.
        epochs: Of a `fit`.
        start: The epoch in which averaging begins, from 1.
        replicas: How many there are; 0 for no strategy.
        rounds: How often each contender fits.
        warm_up: Rounds before.
        clock: Name of the clock.
        each_step: Whether steps and SWA's hooks are timed, or epochs only.
        policy: Of dtypes.

    Returns:
        For each fit the "total" of seconds; "times" of the steps, epoch by epoch; "hooks", the
        times of each call of SWA's hooks; and the process's "peak" of memory so far.
    """
    import tensorflow as tf

    keras, now = tf.keras, CLOCKS[clock]
    keras.mixed_precision.set_global_policy(policy)
    rng = np.random.default_rng(0)

    def fit(what: str) -> Fit:
        keras.backend.clear_session()
        with networks.strategy(replicas).scope():
            model = networks.build(*network)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(_optimizer(keras, what, legacy=ADDONS in contenders), loss)
        x = rng.random((batch, *model.input_shape[1:]), "float32")
        data = tf.data.Dataset.from_tensors((x, np.zeros(batch, int)))
        clockwork, callbacks = timer(now, each_step), _callbacks(keras, what, model, start)
        hooks = time_hooks(callbacks[0], now) if what == OURS and each_step else {}
        callbacks = [clockwork, *callbacks]
        # Python would else look through all that was built before, at times of its own.
        gc.collect()
        gc.freeze()
        total = timed(model.fit, now)(
            data.cache().repeat(steps), epochs=epochs, verbose=0, callbacks=callbacks
        )
        gc.unfreeze()
        return {"total": total, "times": clockwork.times, "hooks": hooks, "peak": memory.peak()}

    return alternate({what: partial(fit, what) for what in contenders}, rounds, warm_up)


def parts(fit: Fit) -> dict[str, Any]:
    """Return what is told of a fit of ours whose last epoch is the BN pass.

    Returns:
        Seconds of steps of the "training" and of the BN "pass"; of what is done once: the "first"
        training step, SWA's "hooks" in all, the first step of the BN pass ("bn") and its "end".
    """
    (first, *_), training, *_, (bn, *steady, end) = fit["times"]
    return {
        "training": np.array(training[1:-1]),
        "pass": np.array(steady),
        "first": first,
        "hooks": sum(map(sum, fit["hooks"].values())),
        "bn": bn,
        "end": max(end - float(np.median(steady)), 0.0),
    }


def _optimizer(keras: Any, what: str, legacy: bool) -> Any:
    optimizers = keras.optimizers.legacy if legacy else keras.optimizers
    settings = {"use_ema": True} if what == EMA else {}
    optimizer = optimizers.SGD(0.01, momentum=0.9, **settings)
    return addons.average_weights(optimizer, first=1, every=1) if what == ADDONS else optimizer


def _callbacks(keras: Any, what: str, model: Any, start: int) -> list[Any]:
    if what == KERAS_SWA:
        from swa import tfkeras as keras_swa

        return [keras_swa.SWA(start)]
    if what == OURS:
        from swa_dist import SWA

        return [SWA(start)]
    if what in (STEPS, STEPS_EMA):
        from swa_dist import SWA

        # With statistics from a batch, so that the last epoch trains, too.
        few = np.zeros((2, *model.input_shape[1:]), "float32")
        momentum = 0.999 if what == STEPS_EMA else None
        return [SWA(start, snapshot_freq=1, ema_momentum=momentum, bn_data=few)]
    if what not in (EMPTY, UPDATE):
        return []
    average = None
    if what == UPDATE:
        from swa_dist import WeightAverage

        average = WeightAverage(model)
        for _ in range(33):  # what trains for long has buffers that are means, no longer sums
            average.update()

    class EachStep(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            pass

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if average:
                average.update()

    return [EachStep()]
