"""How much memory averaging takes, in a process of its own: Linux counts the peak."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench import networks, peers

PLAIN, OURS, KERAS_SWA = "plain", "ours", "keras-swa"

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


def swap(replicas: int, depth: int) -> list[int]:
    """Exchange weights and average there and back; return what each takes on top, in bytes."""
    import tensorflow as tf

    from swa_dist import WeightAverage

    with networks.mirrored(replicas).scope():
        model = networks.equal_layers(tf.keras, WIDTH, depth)
    average = WeightAverage(model)
    average.update()
    for _ in range(2):  # traced
        average.swap()
    kept, taken = [], []
    for _ in range(2):
        kept += _use_up_free_memory()
        before = _forget_peak()
        average.swap()
        taken.append(_status("VmHWM") - before)
    return taken


def _use_up_free_memory() -> list[Any]:
    """Hold all memory that the process has got and let go of, so that what comes next shows."""
    import tensorflow as tf

    kept: list[Any] = []
    new_in_a_row = 0
    while new_in_a_row < 3:
        before = _status("VmRSS")
        kept.append(tf.ones([WIDTH, WIDTH]))
        new_in_a_row = new_in_a_row + 1 if _status("VmRSS") - before > LAYER_BYTES / 2 else 0
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
