"""How much memory a swap takes at its peak, beyond what it finds.

    python -m tests.memory

It writes one line of JSON for each number of replicas and dtype, in layers (of all replicas, and in
float32).
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

from tests.conftest import mirrored
from tests.test_weight_average import average_of

LAYERS, SHAPE = 12, (512, 1024)


def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


def peak(action):
    """The most memory of the process during an action, beyond what it had before, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = kilobytes("VmRSS")
    action()
    return 1024 * (kilobytes("VmHWM") - before)


def layers_at_peak(action, layer, n):
    """The same, in layers, where each is memory that the process did not have before.

    TensorFlow's allocator keeps what is freed: an action could live on that, unseen. It is used up
    first.
    """
    kept, in_a_row = [], 0
    while in_a_row < LAYERS:
        new = peak(lambda: kept.append(layer + 1)) > SHAPE[0] * SHAPE[1]
        in_a_row = in_a_row + 1 if new else 0
    return round(peak(action) / (n * SHAPE[0] * SHAPE[1] * layer.dtype.size), 3)


def main():
    for n in (1, 2, 4):
        for dtype in ("float32", "bfloat16"):
            strategy = mirrored(n)
            with strategy.scope():
                variables = [tf.Variable(tf.zeros(SHAPE, dtype)) for _ in range(LAYERS)]
            average = average_of(variables, strategy)

            def train(variables=variables):
                for v in variables:  # in place: whatever memory it has shared it has no more
                    v.assign_add(tf.ones_like(v))

            train()
            average.update()
            average.swap()  # traced
            average.swap()
            figures, layer = {}, tf.zeros(SHAPE)
            for name, action in {
                "swap": average.swap,
                "swap back": average.swap,
                "copy": lambda of=average.buffers * n: [b.read_value() + 1 for b in of],
            }.items():
                train()
                figures[name] = layers_at_peak(action, layer, n)
            print(json.dumps({"replicas": n, "dtype": dtype, **figures}), flush=True)


if __name__ == "__main__":
    main()
