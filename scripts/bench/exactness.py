"""How exact is the average, and how exact are its BN statistics: ours, and the peers'.

Every system trains the same network, from the same weights, on the same batches in the same order,
without a strategy and on 4 virtual replicas. What comes out is compared with float64 NumPy: the
mean of the snapshots that the system is told to take, and the statistics of what its own final
weights feed to the BN layers.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.bench import addons, isolated, networks
from scripts.bench.report import Page, digits, table

Arrays = list[NDArray[Any]]

# The last batch has fewer samples than the others: what is weighted by batches is off.
SAMPLES, BATCH = 1000, 96
STEPS = -(-SAMPLES // BATCH)
# Snapshots after epochs 2, 3, ...; keras-swa cannot begin earlier. A BN pass is one more epoch.
START, TRAINED = 2, 5

MOMENTUM = "SGD, momentum 0.9"
OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {
    "SGD": ("SGD", {"learning_rate": 0.05}),
    MOMENTUM: ("SGD", {"learning_rate": 0.05, "momentum": 0.9}),
    "Adam": ("Adam", {"learning_rate": 0.003}),
}
# Of each: what `_prepare` knows it by, and the environment that it needs.
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "swa_dist, Keras 3": ("ours", {}),
    "swa_dist, tf_keras": ("ours", {"legacy": True}),
    'keras-swa, "constant", tf_keras': ("constant", {"legacy": True}),
    'keras-swa, "manual", tf_keras': ("manual", {"legacy": True}),
    "keras-swa, Keras 3": ("constant", {}),
    "tensorflow-addons SWA and a forward pass, TF 2.15": ("addons", {"python": isolated.ADDONS}),
    "`use_ema` and `SwapEMAWeights`, Keras 3": ("ema", {}),
}

FILTERS, EPSILON = (16, 32), 1e-3  # of the convolutions; Keras's default


def main() -> None:
    """Measure all, and write the table."""
    note = "tensorflow-addons 0.23.0 ran in TensorFlow 2.15.1."
    Page("exactness.md", "./scripts/benchmark", note).measure(final_models)


def final_models(page: Page) -> None:
    """Errors of final weights and BN statistics."""
    optimizers = [MOMENTUM] if page.quick else list(OPTIMIZERS)
    replicas = [4] if page.quick else [1, 4]
    cases = list(product(SYSTEMS, optimizers, replicas))
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(_ask, cases), strict=True))
    rows = [
        [
            system,
            optimizer,
            *(cell for n in replicas for cell in _cells(found[system, optimizer, n])),
        ]
        for system, optimizer in product(SYSTEMS, optimizers)
    ]
    header = ["system", "optimizer"]
    for n in replicas:
        of = f"{n} replicas: " if n > 1 else "1 replica: "
        header += [of + part for part in ("weights", "BN mean", "BN variance")]
    page.put("errors", table(header, rows))
    if page.quick:
        _check([found[system, MOMENTUM, 4] for system in SYSTEMS if "swa_dist" in system])


def _ask(case: tuple[str, str, int]) -> list[float] | str:
    """Return the errors of a system, or what went wrong."""
    system, *arguments = case
    kind, environment = SYSTEMS[system]
    try:
        return list(isolated.call(measure, kind, *arguments, **environment))
    except isolated.FailedError as error:
        return str(error)
    finally:
        print(f"{', '.join(map(str, case))} replicas: done.", flush=True)


def _cells(found: list[float] | str) -> list[str]:
    if isinstance(found, str):
        return [found, "", ""]
    return [f"{digits(100 * e)} %" if e >= 1e-4 else digits(e) for e in found]


def _check(ours: list[Any]) -> None:
    """Raise if ours is not exact, or if a kernel that is off by a thousandth does not look so.

    Ours has Keras compute what BN layers are fed, so that the definition is checked, too.
    """
    for errors in ours:
        assert max(errors) < 1e-6, errors
    weights, _, variance = isolated.call(measure, "off", MOMENTUM, 4)
    assert np.allclose([weights, variance], [1e-3, 2e-3], rtol=1e-2), (weights, variance)


def measure(kind: str, optimizer: str, replicas: int) -> list[float]:
    """Train, and compare what comes out with its definition.

    Returns:
        Errors of the trainable weights, BN means and BN variances.
    """
    import tensorflow as tf
    from sklearn.datasets import load_digits

    keras = tf.keras
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = (images[:SAMPLES] / 16).astype("float32").reshape(-1, 8, 8, 1)
    strategy = networks.strategy(replicas if replicas > 1 else 0)
    with strategy.scope():
        model = _network(keras)
        compiled, callbacks = _prepare(keras, kind, *OPTIMIZERS[optimizer])
        model.compile(compiled, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ends: list[Arrays] = []

    class Recorder(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ends.append(_weights(self.model))

    model.fit(
        *(x, labels[:SAMPLES]),
        batch_size=BATCH,
        epochs=TRAINED + (kind not in ("addons", "ema")),
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, Recorder()],
    )
    if kind == "addons":
        batches = tf.data.Dataset.from_tensor_slices(x).batch(BATCH)
        addons.finish(model, strategy.experimental_distribute_dataset(batches))
    final = _weights(model)
    if kind == "off":
        final[0] *= 1.001

    # A batch is cut into equal parts.
    cut = [np.array_split(x[i : i + BATCH], replicas) for i in range(0, SAMPLES, BATCH)]
    mean, variance = _statistics(final, [shard for batch in cut for shard in batch])
    scale = np.maximum(np.abs(mean), np.sqrt(variance))
    average = [np.mean(each, axis=0) for each in zip(*ends[START - 1 : TRAINED], strict=True)]
    trainable = [i for i in range(len(final)) if i % 5 < 3]
    return [
        max(np.abs(final[i] - average[i]).max() / np.abs(average[i]).max() for i in trainable),
        (np.abs(np.concatenate(final[3::5]) - mean) / scale).max(),
        np.abs(np.concatenate(final[4::5]) / variance - 1).max(),
    ]


def _prepare(keras: Any, kind: str, name: str, settings: dict[str, float]) -> tuple[Any, list[Any]]:
    """Return a system's optimizer and callbacks."""
    rate = settings["learning_rate"]
    if kind == "addons":
        inner = getattr(keras.optimizers.legacy, name)(**settings)
        return addons.average_weights(inner, first=START * STEPS, every=STEPS), []
    make = getattr(keras.optimizers, name)
    if kind == "ema":
        return make(**settings, use_ema=True), [keras.callbacks.SwapEMAWeights()]
    if kind in ("ours", "off"):
        from swa_dist import SWA

        return make(**settings), [SWA(START, "constant", rate)]
    from swa import tfkeras as keras_swa

    schedule = ["manual"] if kind == "manual" else ["constant", rate]
    return make(**settings), [keras_swa.SWA(START, *schedule, batch_size=BATCH)]


def _network(keras: Any) -> Any:
    """Return two convolutions with BN, the same weights for everyone.

    `get_weights` returns kernel, gamma, beta, mean and variance of each, and then kernel and bias.
    """
    layers = keras.layers
    x = inputs = layers.Input((8, 8, 1))
    for filters in FILTERS:
        x = layers.Conv2D(filters, 3, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(epsilon=EPSILON)(x))
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    weights = model.get_weights()
    for i, gain in ((0, 2), (5, 2), (10, 1)):
        shape = weights[i].shape
        weights[i] = rng.normal(size=shape) * np.sqrt(gain / np.prod(shape[:-1]))
    model.set_weights(weights)
    return model


def _weights(model: Any) -> Arrays:
    return [array.astype("float64") for array in model.get_weights()]


def _statistics(weights: Arrays, shards: Arrays) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return what the network's BN layers are fed, as mean and variance, by definition.

    Args:
        weights: Its weights.
        shards: What each replica gets of each batch. It normalizes them with their own moments.

    Returns:
        Mean and population variance over all positions, of both layers' channels.
    """
    seen: list[Arrays] = [[] for _ in FILTERS]
    for shard in shards:
        x = shard.astype("float64")
        for fed, i in zip(seen, (0, 5), strict=True):
            kernel, gamma, beta = weights[i : i + 3]
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
            x = np.einsum("nhwcij,ijcf->nhwf", windows, kernel)
            fed.append(x.reshape(-1, x.shape[-1]))
            normal = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + EPSILON)
            x = np.maximum(normal * gamma + beta, 0)
    pooled = [np.concatenate(positions) for positions in seen]
    return np.concatenate([x.mean(0) for x in pooled]), np.concatenate([x.var(0) for x in pooled])


if __name__ == "__main__":
    main()
