"""What averaging costs training: its BN pass, a whole `fit`, a step, an update in every step."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from scripts.bench import networks, peers
from scripts.bench.clock import step_timer, time_hooks
from scripts.demo import build_model as demo_network

PLAIN, EMPTY, OURS, EMA, ADDONS = "plain", "empty callback", "ours", "use_ema", "addons"
BATCH = 80  # the demo's


def bn_pass(network: str, replicas: int, steps: int) -> dict[str, list[float]]:
    """Time the steps of a training epoch and those of the BN pass that follows, in one `fit`.

    Returns:
        Seconds of each step but the first, which is traced: of "training", and of the "pass". The
        last step of the pass comes with the end of it.
    """
    from swa_dist import SWA

    model, batch = _network(network, replicas)
    timer = step_timer()
    model.fit(_repeated(batch, steps), epochs=3, verbose=0, callbacks=[SWA(1), timer])
    _, training, bn_pass = timer.steps
    return {"training": training[1:-1], "pass": bn_pass[1:]}


def whole_fit(network: str, rounds: int, epochs: int, steps: int) -> dict[str, list[float]]:
    """Time `fit` with and without SWA, each with a new model, in turns.

    Returns:
        Seconds of "plain" and "ours"; and what ours does only once in them: the "trace" of the BN
        pass (its first step, beyond the median of the others), and in "hooks" the longest call of
        each of SWA's hooks, which traces or makes what later ones use.
    """
    import tensorflow as tf

    from swa_dist import SWA

    seconds: dict[str, list[float]] = {PLAIN: [], OURS: [], "trace": [], "hooks": []}
    for i in range(-1, rounds):
        for what in (PLAIN, OURS):
            tf.keras.backend.clear_session()
            model, batch = _network(network, replicas=1)
            swa, timer = SWA(epochs * 3 // 4), step_timer()
            spent = time_hooks(swa)
            callbacks = [swa, timer] if what == OURS else [timer]
            began = time.perf_counter()
            model.fit(_repeated(batch, steps), epochs=epochs, verbose=0, callbacks=callbacks)
            took = time.perf_counter() - began
            if i < 0:  # things that a process does for the first time
                continue
            seconds[what].append(took)
            if what == OURS:
                first, *others = timer.steps[-1]
                seconds["trace"].append(max(first - float(np.median(others)), 0.0))
                seconds["hooks"].append(sum(map(max, spent.values())))
    return seconds


def hooks(rounds: int, epochs: int, steps: int) -> dict[str, list[float]]:
    """Time the steps of a tiny network before averaging begins, with nothing in them but hooks.

    Returns:
        Seconds per step, one for each epoch: without a callback, with one that does nothing, and
        with SWA.
    """
    import tensorflow as tf

    from swa_dist import SWA

    keras = tf.keras

    class Empty(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            pass

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    class Epochs(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_train_begin(self, logs: Any = None) -> None:
            self.seconds: list[float] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seconds.append((time.perf_counter() - self.began) / steps)

    def contender(make: Callable[[], list[Any]]) -> Callable[[], list[float]]:
        model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01), "mse")
        x = np.zeros((32 * steps, 8), "float32")

        def fit() -> list[float]:
            clock = Epochs()
            model.fit(
                *(x, x[:, :1]),
                epochs=epochs,
                batch_size=32,
                verbose=0,
                callbacks=[*make(), clock],
            )
            return clock.seconds[1:-1]  # the first traces, the last averages

        return fit

    fits = {
        PLAIN: contender(list),
        EMPTY: contender(lambda: [Empty()]),
        OURS: contender(lambda: [SWA(epochs)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(rounds):
        for name, fit in fits.items():
            seconds[name] += fit()
    return seconds


def every_step(network: str, contenders: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Time training steps that each end with an update of the average, in turns.

    Returns:
        Seconds of each step but the first ones of each round, for each contender.
    """
    import tensorflow as tf

    keras = tf.keras

    def contender(what: str) -> Callable[[], list[float]]:
        optimizers = keras.optimizers.legacy if ADDONS in contenders else keras.optimizers
        settings = {"use_ema": True} if what == EMA else {}
        optimizer = optimizers.SGD(0.01, momentum=0.9, **settings)
        if what == ADDONS:
            optimizer = peers.addons_optimizer(optimizer, first=1, every=1)
        model, batch = _network(network, None, optimizer)
        callbacks = [_updater(model)] if what == OURS else []

        def fit() -> list[float]:
            timer = step_timer()
            model.fit(_repeated(batch, steps), verbose=0, callbacks=[*callbacks, timer])
            return list(timer.steps[0][2:-1])

        return fit

    fits = {what: contender(what) for what in contenders}
    seconds: dict[str, list[float]] = {what: [] for what in contenders}
    for i in range(rounds + 1):
        for what, fit in fits.items():
            times = fit()
            seconds[what] += times if i else []
    return seconds


def _network(network: str, replicas: int | None, optimizer: Any = None) -> tuple[Any, Any]:
    """Return a compiled network, and one batch that it could be fed."""
    import tensorflow as tf

    keras = tf.keras
    rng = np.random.default_rng(0)
    strategy = networks.mirrored(replicas) if replicas else tf.distribute.get_strategy()
    with strategy.scope():
        model = {
            "demo": lambda: demo_network(keras),
            "no BN": lambda: _without_bn(keras),
            "resnet50": lambda: networks.resnet50(keras, pixels=64),
        }[network]()
        model.compile(
            optimizer or keras.optimizers.SGD(0.01, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    rows = 16 if network == "resnet50" else BATCH
    x = rng.random((rows, *model.input_shape[1:]), "float32")
    return model, (x, rng.integers(0, 10, rows))


def _repeated(batch: Any, steps: int) -> Any:
    """Return a dataset of so many batches, all the same: no time goes into making them."""
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(batch).cache().repeat(steps)


def _without_bn(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def _updater(model: Any) -> Any:
    import tensorflow as tf

    from swa_dist import WeightAverage

    average = WeightAverage(model)
    for _ in range(33):  # what trains for long has buffers that are means, no longer sums
        average.update()

    class Updater(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            average.update()

    return Updater()
