"""One of several workers: it fits, and writes down what it was fed and what it ended with.

`TF_CONFIG` says which one it is.
"""

import json
import os
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from swa_dist import update_bn
from tests.helpers.kit import KITS

STEPS, EPOCHS, START = 3, 6, 2
SIZES = [8, 5]  # samples of a replica's batches, by worker


class Scenario(NamedTuple):
    """How the workers train.

    Attributes:
        lasts: Samples of the last batch of an epoch, on each worker.
        stop: Epoch at whose end training is stopped.
        ema_momentum: See `SWA`.
        bn_data: Whether BN statistics come from data of all workers.
    """

    lasts: list[int]
    stop: int | None = None
    ema_momentum: float | None = None
    bn_data: bool = False

    @property
    def end(self):
        """The last epoch that trains, counted from 1."""
        return self.stop or (EPOCHS if self.bn_data else EPOCHS - 1)


SCENARIOS = {
    "even": Scenario([8, 8], bn_data=True),
    "stopped": Scenario([6, 1], stop=4),
    "uneven": Scenario([6, 1], ema_momentum=0.8),
    "dies": Scenario([6, 1], ema_momentum=0.8),
    "resumed": Scenario([6, 1], ema_momentum=0.8),
}


# What `update_bn` is given: a dataset of all workers, of which each gets its part; and for each
# worker a generator of its own, as long as it likes.
SAMPLES, GENERATED = 38, [[5, 4, 3], [7, 1]]


def samples_of(index, n):
    rng = np.random.default_rng(index)
    x = (rng.normal(size=(n, 3)) * [1, 3, 5] + [2, -5, 30]).astype("float32")
    return x, rng.normal(size=(n, 1)).astype("float32")


def main(directory, scenario, n_devices):
    """Run it; the directory is for what it writes."""
    directory = Path(directory)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * n_devices
    )
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    # The strategy takes all GPUs of a worker, but only one of its CPUs.
    CollectiveAllReduceExtended._initialize_local_devices = lambda self, resolver, worker: (
        tuple(f"{worker}/device:CPU:{i}" for i in range(n_devices)),
        "CPU",
    )
    # Without a timeout: however long a worker waits for a slow one, it learns of a dead one.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    kit = KITS[scenario != "keras3"]
    keras = kit.keras
    keras.utils.set_random_seed(7)
    with strategy.scope():
        taps = [kit.Tap(), kit.Tap()]
        norms = [keras.layers.BatchNormalization() for _ in taps]
        model = keras.Sequential(
            [
                keras.layers.Input((3,)),
                *(taps[0], norms[0], keras.layers.Dense(4, activation="tanh")),
                *(taps[1], norms[1], keras.layers.Dense(1)),
            ]
        )
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)

    class OtherCallback(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            for tap in taps:
                tap.on = epoch == setup.end and scenario != "dies"
            self.epoch = epoch + 1

        def on_train_batch_begin(self, batch, logs=None):
            if scenario == "dies" and (index, self.epoch, batch) == (1, 4, 1):
                print("fed", flush=True)
                os._exit(9)

        def on_train_batch_end(self, batch, logs=None):
            if setup.bn_data and (self.epoch, batch) == (EPOCHS, STEPS - 1):
                for tap in taps:
                    tap.on = True

        def on_epoch_end(self, epoch, logs=None):
            if epoch + 1 == setup.stop:
                self.model.stop_training = True

    setup = SCENARIOS.get(scenario, SCENARIOS["stopped"])
    sizes = [SIZES[index]] * (STEPS - 1) + [min(setup.lasts[index], SIZES[index])]

    def dataset(context):
        x, y = samples_of(index, sum(sizes) * n_devices)

        def batches():
            at = 0
            for size in np.repeat(sizes, n_devices):
                yield x[at : at + size].copy(), y[at : at + size].copy()
                at += size

        signature = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1)))
        return tf.data.Dataset.from_generator(batches, output_signature=signature).repeat()

    fed = strategy.distribute_datasets_from_function(dataset)
    recorder = kit.Recorder()
    everyones = tf.data.Dataset.from_tensor_slices(samples_of(9, SAMPLES)).batch(8)
    swa = kit.SWA(
        *(START, "constant"),
        swa_lr=0.02,
        backup_dir=directory / "swa",
        ema_momentum=setup.ema_momentum,
        bn_data=everyones if setup.bn_data else None,
    )
    if scenario == "keras3":
        try:
            model.fit(fed, epochs=3, steps_per_epoch=STEPS, verbose=0, callbacks=[swa])
        except Exception:
            traceback.print_exc()
            os._exit(1)  # TensorFlow 2.16 would wait for the other worker
        return
    validation = tf.data.Dataset.from_tensor_slices(samples_of(7, 16)).batch(8)
    callbacks = [OtherCallback(), recorder, swa]
    if scenario in ("dies", "resumed"):
        callbacks += [keras.callbacks.BackupAndRestore(str(directory / "model"))]
    history = model.fit(
        fed, epochs=EPOCHS, steps_per_epoch=STEPS, verbose=0, validation_data=validation,
        callbacks=callbacks,
    ).history  # fmt: skip
    assert not (directory / "swa").exists() or index  # the chief's, who removes it

    # Every worker saves, as reading statistics may need all; the chief's file is the one to keep.
    file = directory / ("model.keras" if index == 0 else f"of-worker-{index}.keras")
    model.save(file)
    np.savez(
        directory / f"{index}.npz",
        history=json.dumps(history),
        n_averaged=swa.n_averaged,
        inferred_batch_size=swa.inferred_batch_size,
        rate=kit.rate(model),
        **{f"samples{i}": np.concatenate(tap.seen) for i, tap in enumerate(taps)},
        **{f"weights{i}": w for i, w in enumerate(kit.trainable(model))},
        **{
            f"snapshot{e}_{i}": w
            for e, weights in enumerate(recorder.weights, 1)
            for i, w in enumerate(weights)
        },
        **statistics(kit, norms),
    )
    if scenario == "even":
        update(kit, model, taps, norms, index, directory)


def update(kit, model, taps, norms, index, directory):
    """Recompute the statistics, and write down of what they are."""
    x, y = samples_of(9, SAMPLES)
    own = np.split(samples_of(index, sum(GENERATED[index]))[0], np.cumsum(GENERATED[index])[:-1])
    feeds = {
        "arrays": ((x, y), {"batch_size": 8}),
        "dataset": (tf.data.Dataset.from_tensor_slices((x, y)).batch(8), {}),
        "generator": ((batch for batch in own), {}),
    }
    for name, (data, arguments) in feeds.items():
        for tap in taps:
            tap.seen.clear()
        np.savez(
            directory / f"{name}-{index}.npz",
            n_samples=update_bn(model, data, **arguments),
            **{f"samples{i}": np.concatenate(tap.seen) for i, tap in enumerate(taps)},
            **statistics(kit, norms),
        )


def statistics(kit, norms):
    return {
        f"{name}{i}": np.stack(kit.replicas(getattr(norm, f"moving_{name}")))
        for i, norm in enumerate(norms)
        for name in ("mean", "variance")
    }
