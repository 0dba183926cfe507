"""How much memory averaging takes: Linux counts the peak of a process."""

import re
from pathlib import Path
from typing import Any

from scripts.bench import networks

THERE, BACK, COPY = "average in", "weights back", "copy"


def peak() -> int:
    """Return the most bytes that this process has had."""
    return _status("VmHWM")


def swap(replicas: int, dtype: str, depth: int, width: int) -> dict[str, float]:
    """Exchange weights and average of a network of equal layers, there and back.

    Args:
        replicas: How many there are.
        dtype: Of the weights.
        depth: How many layers the network has.
        width: Of them.

    Returns:
        The peak of each way, beyond what the process had before, in layers of float32, which is
        what the average has, for each replica. Beside them, that of a copy of the whole average.
    """
    import tensorflow as tf

    from swa_dist import WeightAverage

    strategy = networks.strategy(replicas)
    with strategy.scope():
        model = networks.build("equal_layers", width, depth, dtype)
    average = WeightAverage(model)

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
        Path("/proc/self/clear_refs").write_text("5")  # the present memory is the peak
        before = _status("VmRSS")
        result = action()
        found[name] = (peak() - before) / (4 * width**2 * replicas)
        del kept, result
    return found


def _use_up_free_memory(width: int, dtype: str) -> list[Any]:
    """Hold all memory that the process has got and let go of, so that what comes next shows."""
    import tensorflow as tf

    layer = tf.zeros([width, width], dtype)
    kept: list[Any] = []
    new_in_a_row = 0
    while new_in_a_row < 12:
        before = _status("VmRSS")
        kept.append(layer + 1)
        is_new = _status("VmRSS") - before > width**2 * layer.dtype.size / 2
        new_in_a_row = new_in_a_row + 1 if is_new else 0
    return kept


def _status(name: str) -> int:
    # Not `getrusage`: what it returns, a process inherits from the one that started it.
    kilobytes = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes
    return int(kilobytes[1]) * 1024
