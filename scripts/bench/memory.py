"""How much memory averaging takes, in a process of its own: Linux counts the peak."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench import networks, peers

PLAIN, OURS, KERAS_SWA = "plain", "ours", "keras-swa"
THERE, BACK, COPY = "average in", "weights back", "copy"

WIDTH = 3200  # of layers so large that little else shows
LAYER_BYTES = 4 * WIDTH**2


def peak_of_fit(what: str, replicas: int, depth: int) -> int:
    """Train some epochs, averaging after each but the first; return the process's peak in bytes."""
    import tensorflow as tf

    with networks.mirrored(replicas).scope():
        model = networks.equal_layers(tf.keras, WIDTH, depth)
        model.compile(tf.keras.optimizers.SGD(1e-6), "mse")
    callbacks: list[Any] = []
    if what == OURS:
        from swa_dist import SWA

        callbacks = [SWA(2)]
    elif what == KERAS_SWA:
        callbacks = [peers.keras_swa_callback(2)]
    x = np.zeros((8, WIDTH), "float32")
    model.fit(x, x, batch_size=8, epochs=6, verbose=0, callbacks=callbacks)
    return _status("VmHWM")


def swaps(cases: list[tuple[int, str]], depth: int, width: int) -> list[dict[str, float]]:
    """Exchange weights and average of a network of equal layers, there and back.

    Args:
        cases: Numbers of replicas, and the dtypes that the weights have.
        depth: How many layers the network has.
        width: Of them.

    Returns:
        For each case the peak of each way, beyond what the process had before, in layers of
        float32, which is what the average has, for each replica. Beside them, that of a copy of
        the whole average.
    """
    return [_swap(*case, depth, width) for case in cases]


def _swap(replicas: int, dtype: str, depth: int, width: int) -> dict[str, float]:
    import tensorflow as tf

    from swa_dist import WeightAverage

    strategy = networks.mirrored(replicas)
    with strategy.scope():
        model = networks.equal_layers(tf.keras, width, depth, dtype)
    average = WeightAverage(model)
    layer = 4 * width**2 * replicas

    def train() -> None:
        for v in average.weights:  # in place: what memory it has shared it has no more
            v.assign_add(tf.ones_like(v))

    def copy() -> list[Any]:
        local = [strategy.experimental_local_results(b) for b in average.buffers]
        return [b.read_value() + 1 for each in local for b in each]

    train()
    average.update()
    average.divisor.assign(2)
    for _ in range(2):  # traced
        average.swap()
    found = {}
    average.divisor.assign(2)  # as that of a sum: it is divided on the way
    for name, action in {THERE: average.swap, BACK: average.swap, COPY: copy}.items():
        train()
        kept = [_use_up_free_memory(width, d) for d in ("float32", dtype)]
        before = _forget_peak()
        result = action()
        found[name] = (_status("VmHWM") - before) / layer
        del kept, result
    return found


def _use_up_free_memory(width: int, dtype: str) -> list[Any]:
    """Hold all memory that the process has got and let go of, so that what comes next shows."""
    import tensorflow as tf

    layer = tf.zeros([width, width], dtype)
    kept: list[Any] = []
    size = width**2 * layer.dtype.size
    new_in_a_row = 0
    while new_in_a_row < 12:
        before = _status("VmRSS")
        kept.append(layer + 1)
        new_in_a_row = new_in_a_row + 1 if _status("VmRSS") - before > size / 2 else 0
    return kept


def _forget_peak() -> int:
    """Have Linux take the present memory for the peak; return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    # Not `getrusage`: what it returns, a process inherits from the one that started it.
    kilobytes = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes
    return int(kilobytes[1]) * 1024
