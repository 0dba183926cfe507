"""Runs that are killed and resumed, again and again, each life a fork of this process.

`main` writes one line of JSON for each history: its kill points, and in what the run that came to
its end differs from one that was never killed.
"""

import itertools
import json
import os
import random
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.helpers import devices
from tests.helpers.kit import KITS
from tests.helpers.models import build_optimizer

SEED, EPOCHS = 5, 6
POINTS = 3 if os.environ.get("CI") else 2  # at which each history is killed
AT_THE_END = ("train end 0", "train end 1", "train end 2")


@dataclass(frozen=True)
class Scenario:
    """How a run is set up. `swa_first`: where BackupAndRestore stands."""

    swa_first: bool
    replicas: int = 2
    norm: bool = True
    arguments: tuple = (2, "constant", 0.01)
    known_length: bool = True
    validate_average: bool = False
    steps: int | None = None  # between snapshots
    ema_momentum: float | None = None
    bn_data: bool = False
    stop: int | None = None  # the epoch with whose end a callback before SWA stops

    @property
    def epochs(self):
        return self.stop or EPOCHS

    def phases(self, epoch, snapshot):
        """What an epoch goes through, in order; a number is a place in the list of callbacks."""
        writes = ["torn", "written"] * snapshot
        passes = ["pass"] * self.bn_data
        if epoch + 1 == self.stop:
            # Before SWA has saved that there was a stop, it is as if there had been none; and
            # afterwards the run is resumed in another epoch.
            return ["begin", "batch", *passes]
        if self.validate_average:
            validation = ["test begin 0", *writes, *passes * snapshot, "test begin 1"]
            validation += ["test begin 2", "test batch 0", "test end 0", "test end 2"]
            return ["begin", "batch", *validation, "end 0", "end 1", "end 2"]
        ends = ["end 0", "end 1", "end 2"]
        is_last = epoch + 1 == EPOCHS
        if self.steps or (is_last and self.bn_data):
            # What could not be made up for is saved with the last batch.
            return ["begin", "batch", *writes, *passes * is_last, *ends]
        ends[1 if self.swa_first else 2 : 0] = writes
        return ["begin", "batch", *ends]


CYCLIC = (2, "cyclic", 0.01, 0.04, 2)
SCENARIOS = [
    Scenario(swa_first=True, replicas=1, arguments=CYCLIC, known_length=False),
    Scenario(swa_first=False),
    Scenario(swa_first=False, replicas=1, norm=False),
    Scenario(swa_first=True, replicas=1, validate_average=True),
    Scenario(swa_first=False, arguments=CYCLIC, validate_average=True),
    Scenario(swa_first=True, replicas=1, norm=False, validate_average=True),
    Scenario(swa_first=False, replicas=1, steps=2),
    Scenario(swa_first=True, replicas=1, norm=False, steps=1, ema_momentum=0.9),
    Scenario(swa_first=False, bn_data=True, stop=4),
    Scenario(swa_first=False, replicas=1, bn_data=True, validate_average=True, steps=4),
]


def points(kit, scenario, generator):
    """Points at which to kill, each later than the one before."""
    trains_to_the_end = scenario.bn_data or not scenario.norm
    plan = kit.SWA(*scenario.arguments).plan(
        EPOCHS, learning_rate=0.05, batch_norm=not trains_to_the_end
    )
    possible = [
        (epoch, phase)
        for epoch in range(scenario.epochs)
        for phase in scenario.phases(epoch, plan.is_snapshot(epoch))
    ]
    possible += itertools.product([scenario.epochs - 1], AT_THE_END)
    if scenario.swa_first:
        # Where BackupAndRestore still has its files and SWA none: the guide's exception.
        possible.remove((EPOCHS - 1, "train end 1"))
    numbers = range(len(possible))
    # One of them while the average is in the model, if it ever is.
    carried = [
        i for i in numbers if possible[i][1].startswith(("test", "pass")) and possible[i][0] > 1
    ]
    chosen = generator.sample(carried, 1) if carried else []
    chosen += generator.sample(sorted({*numbers} - {*chosen}), POINTS - len(chosen))
    return [possible[i] for i in sorted(chosen)]


def live(kit, scenario, folder, point, result):
    """Train, from wherever the last life came to, to `point`, or to the end."""
    devices.set_up(scenario.replicas)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})  # takes long
    strategy = devices.mirrored(scenario.replicas)
    keras = kit.keras
    keras.utils.set_random_seed(7)
    with strategy.scope():
        norms = [keras.layers.BatchNormalization()] * scenario.norm
        model = keras.Sequential([keras.layers.Input((3,)), *norms, keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
        build_optimizer(model)

    now = [-1]  # the epoch

    def killer(place):
        class Killer(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.epoch = now[0] = epoch
                die(epoch, "begin" if place == 0 else None)

            def on_train_batch_end(self, batch, logs=None):
                if batch == 1:
                    die(self.epoch, "batch" if place == 0 else None)

            def on_test_begin(self, logs=None):
                die(self.epoch, f"test begin {place}")

            def on_test_batch_end(self, batch, logs=None):
                die(self.epoch, f"test batch {place}")

            def on_test_end(self, logs=None):
                die(self.epoch, f"test end {place}")

            def on_epoch_end(self, epoch, logs=None):
                die(epoch, f"end {place}")
                if place == 0 and epoch + 1 == scenario.stop:
                    self.model.stop_training = True

            def on_train_end(self, logs=None):
                die(scenario.epochs - 1, f"train end {place}")

        return Killer()

    def die(epoch, phase):
        if (epoch, phase) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    write = tf.train.Checkpoint.write

    def write_and_die(checkpoint, path, *args, **kwargs):
        returned = write(checkpoint, path, *args, **kwargs)
        if "swa-epoch" in str(path):
            epoch = int(str(path)[-5:]) - 1
            die(epoch, "written")
            if (epoch, "torn") == point:
                os.remove(f"{path}.index")
                os.truncate(f"{path}.data-00000-of-00001", 10)
                die(epoch, "torn")
        return returned

    tf.train.Checkpoint.write = write_and_die

    generator = np.random.default_rng(3)
    x = generator.normal(size=(20, 3)).astype("float32") * 3 + 1
    y = generator.normal(size=(20, 2)).astype("float32")
    fed = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    if not scenario.known_length:
        fed = fed.apply(tf.data.experimental.assert_cardinality(tf.data.UNKNOWN_CARDINALITY))

    def batches():
        yield x[:8] + 1
        die(min(now[0], scenario.epochs - 1), "pass")
        yield x[8:] + 1

    spec = tf.TensorSpec([None, 3], tf.float32)
    bn_data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    swa = kit.SWA(
        *scenario.arguments,
        backup_dir=folder / "swa",
        validate_average=scenario.validate_average,
        snapshot_freq=scenario.steps or "epoch",
        ema_momentum=scenario.ema_momentum,
        bn_data=bn_data if scenario.bn_data else None,
    )
    restore = keras.callbacks.BackupAndRestore(str(folder / "model"))
    pair = [swa, restore] if scenario.swa_first else [restore, swa]
    callbacks = [killer(0), pair[0], killer(1), pair[1], killer(2)]
    validation = fed.take(2) if scenario.validate_average else None
    model.fit(
        fed, epochs=EPOCHS, verbose=0, callbacks=callbacks, validation_data=validation,
    )  # fmt: skip
    norm = model.layers[0] if scenario.norm else None
    np.savez(
        result,
        n_averaged=swa.n_averaged,
        **{f"weight {i}": w for i, w in enumerate(kit.trainable(model))},
        **{
            f"statistic {i} {j}": w
            for i, v in enumerate([norm.moving_mean, norm.moving_variance] if norm else [])
            for j, w in enumerate(kit.replicas(v))
        },
        swa_remains=(folder / "swa").exists(),
    )


def fork(*arguments):
    """Live in a process of its own; return its exit code, -9 if it was killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            live(*arguments)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(name, folder):
    """Run what there is for a Keras version, in folders of this one."""
    folder = Path(folder)
    kit = next(kit for kit in KITS if kit.name == name)
    generator = random.Random(SEED)
    # What resumes is the same code under both: each has half of the scenarios, or all of them.
    chosen = SCENARIOS if os.environ.get("CI") else SCENARIOS[KITS.index(kit) :: len(KITS)]
    for number, scenario in enumerate(chosen):
        home = folder / str(number)
        for part in ("never", "killed"):
            (home / part).mkdir(parents=True)
        assert fork(kit, scenario, home / "never", None, home / "never.npz") == 0
        lives = []
        for point in points(kit, scenario, generator):
            lives.append((point, fork(kit, scenario, home / "killed", point, home / "killed.npz")))
        assert fork(kit, scenario, home / "killed", None, home / "killed.npz") == 0
        never, killed = np.load(home / "never.npz"), np.load(home / "killed.npz")
        print(json.dumps({
            "scenario": asdict(scenario),
            "lives": lives,
            "different": [n for n in never.files if not np.array_equal(never[n], killed[n])],
            "n_averaged": int(killed["n_averaged"]),
        }), flush=True)  # fmt: skip
