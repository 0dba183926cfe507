"""Under the all-reduce that MirroredStrategy chooses itself, in a process of its own."""

from tests.helpers.forks import Fork

PROGRAM = """
import numpy as np
import tensorflow as tf
from tests.helpers import devices
from tests.helpers.kit import KITS
from tests.helpers.data import positions
from tests.helpers.assertions import assert_statistics, assert_weights

devices.set_up()
x = (np.random.default_rng(0).normal(size=(44, 3)) * [1, 3, 5] + [2, -5, 30]).astype("float32")
y = np.random.default_rng(1).normal(size=(44, 1)).astype("float32")
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)])
for kit in KITS:
    with strategy.scope():
        norm = kit.keras.layers.BatchNormalization()
        layers = [kit.keras.layers.Input((3,)), norm, kit.keras.layers.Dense(1)]
        model = kit.keras.Sequential(layers)
        model.compile("sgd", "mse", jit_compile=False)
    recorder = kit.Recorder()
    model.fit(x, y, batch_size=16, epochs=3, verbose=0, callbacks=[recorder, kit.SWA(1)])
    assert_statistics(kit, norm, positions(x))
    assert_weights(kit.trainable(model), recorder.mean(1, 2))
    kit.assert_replicas_agree(model)
print("exact")
"""


def test_four_replicas_with_the_default_all_reduce():
    result = Fork(PROGRAM).result()
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip().endswith("exact")
