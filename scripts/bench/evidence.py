"""Does averaging make models better? SGD, SWA, and SWA finished by keras-swa, from one trunk.

The experiment of `scripts/results/evidence.md`, with the rates that were chosen there.
"""

import argparse
import gc
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")  # for keras-swa
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")  # to be deterministic

import numpy as np
import tensorflow as tf
import tf_keras as keras
from scipy import stats
from sklearn.datasets import load_digits
from swa import tfkeras as keras_swa

from scripts import demo
from scripts.bench import networks
from scripts.bench.report import provenance, table
from swa_dist import update_bn
from swa_dist.plan.schedules import annealed
from swa_dist.tfkeras import SWA


class Case(NamedTuple):
    """A network on a set of digits, and the rates that were chosen for it."""

    data: str
    network: str
    rate: float  # of SGD, initially
    constant: float  # SWA's rate as a share of that
    cyclic: float  # the highest of a cycle
    regularized: bool = True  # by weight decay and shifted images

    def __str__(self) -> str:
        return f"{self.data}, {self.network}" + ("" if self.regularized else ", not regularized")


CASES = (
    Case("MNIST-5k", "residual", 0.2, 0.25, 0.5),
    Case("MNIST-5k", "plain", 0.2, 0.5, 0.5),
    Case("digits", "residual", 0.4, 0.25, 0.5),
    Case("digits", "plain", 0.025, 0.5, 1),
    Case("digits", "residual", 0.2, 1, 1, regularized=False),
)


class Settings(NamedTuple):
    """How long everything trains, and how often."""

    cases: tuple[Case, ...] = CASES
    seeds: tuple[int, ...] = tuple(range(10))  # each a split, initial weights and an order
    epochs: int = 32  # the whole budget of each contender
    trunk: int = 21  # epochs that all contenders of a seed share; averaging begins after them
    samples: int = 4000  # to train on, at most
    points: tuple[float, ...] = tuple(np.linspace(-0.5, 1.5, 21).round(1))  # SGD at 0, SWA at 1


QUICK = Settings((CASES[0], CASES[3]), (0, 1), 4, 1, 640, (-0.5, 0, 1, 1.5))


class Experiment:
    """One network on one split of the data, from one set of initial weights."""

    def __init__(self, settings: Settings, case: Case, seed: int) -> None:
        self.settings, self.case, self.seed = settings, case, seed
        if case.data == "digits":
            images, labels = load_digits(return_X_y=True)
            order = np.random.default_rng(seed).permutation(len(images))
            images = (images[order] / 16).astype("float32").reshape(-1, 8, 8, 1)
            train, self.batch = (images[:1344], labels[order[:1344]]), 64
            self.test = images[1344:], labels[order[1344:]]
        else:
            (train, self.test), self.batch = demo.load_digits(seed), demo.TRAIN_BATCH
        self.train = train[0][: settings.samples], train[1][: settings.samples]
        self.state: list[Any] = []
        trunk = self.fit(self.sgd())
        self.state = [v.numpy() for v in (*trunk.weights, *trunk.optimizer.variables)]

    def sgd(self) -> Any:
        """Return the callback that sets SGD's learning rates: the paper's."""
        last, rates = self.settings.epochs + 1, (self.case.rate, 0.01 * self.case.rate)
        return keras.callbacks.LearningRateScheduler(lambda i, _: annealed(i + 1, last, *rates))

    def swa(self, schedule: str) -> SWA:
        """Return our callback."""
        start, rate = self.settings.trunk + 1, self.case.rate * getattr(self.case, schedule)
        return SWA(start, schedule, *([rate] if schedule == "constant" else [0.1 * rate, rate, 2]))

    def keras_swa(self, schedule: str) -> tuple[Any, Any]:
        """Return callbacks that set the same rates, and have keras-swa average the same."""
        steps = len(self.train[0]) // self.batch
        plan = self.swa(schedule).plan(self.settings.epochs, steps, self.case.rate)
        # It takes the first snapshot at the end of its start epoch, also where a cycle begins.
        settings = {"swa_freq": plan.swa_freq, "batch_size": self.batch}
        recorder = _Recorder()
        recorder.plan = plan
        return recorder, keras_swa.SWA(plan.first_snapshot, **settings)

    def fit(self, *callbacks: Any) -> Any:
        """Return a new model, trained from the end of the trunk on; the first time, up to it."""
        epochs = (0, self.settings.trunk, self.settings.epochs)
        first, end = epochs[1:] if self.state else epochs[:2]
        keras.utils.set_random_seed(self.seed)
        build = demo.build_model if self.case.network == "residual" else networks.plain
        model = build(keras, self.train[0].shape[1:])
        # The paper's 5e-4 enters the velocity, which makes 1 / (1 - momentum) times as much of it.
        decay = 5e-4 / (1 - 0.9) if self.case.regularized else None
        optimizer = keras.optimizers.SGD(self.case.rate, momentum=0.9, weight_decay=decay)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        if self.state:
            optimizer.build(model.trainable_variables)
            assign([*model.weights, *optimizer.variables], self.state)
        batches = self.batches(first)
        model.fit(batches, initial_epoch=first, epochs=end, verbose=0, callbacks=list(callbacks))
        return model

    def batches(self, first: int) -> tf.data.Dataset:
        """Return the batches from an epoch on: in each, another order and other shifts."""
        images, labels = self.train
        seed = 1 + self.seed * self.settings.epochs + first
        shift = (1 if self.case.data == "digits" else 2) * self.case.regularized  # at most
        padded = np.pad(images, [(0, 0), (shift, shift), (shift, shift), (0, 0)])
        shuffled = tf.data.Dataset.from_tensor_slices((padded, labels)).shuffle(len(images), seed)
        drawn = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)

        def crop(sample: tuple[tf.Tensor, tf.Tensor], number: tf.Tensor) -> tuple[Any, Any]:
            places = 2 * shift + 1
            corner = [number % places, number // places % places, 0]
            return tf.slice(sample[0], corner, images.shape[1:]), sample[1]

        pairs = tf.data.Dataset.zip((shuffled, drawn)).map(crop)
        return pairs.batch(self.batch, drop_remainder=True)


def assign(variables: list[Any], values: list[Any]) -> None:
    """Give variables values."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class _Recorder(keras.callbacks.Callback):
    """Keeps the weights before the BN pass; sets the learning rates of a plan if it has one."""

    plan: Any = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        if epoch + 1 == self.params["epochs"]:
            self.weights = self.model.get_weights()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.plan:
            self.model.optimizer.learning_rate = self.plan.learning_rate(self.epoch, batch)


def compare(settings: Settings, case: Case, seed: int) -> tuple[dict[str, Any], Any]:
    """Return [loss, error] of every contender on one seed; and the losses along the line."""
    keras.backend.clear_session()
    gc.collect()  # models refer to themselves, and are large
    experiment, found = Experiment(settings, case, seed), {}

    def test(model: Any, samples: Any = experiment.test) -> list[float]:
        loss, accuracy = model.evaluate(*samples, batch_size=500, verbose=0)
        return [loss, 1 - accuracy]

    sgd = experiment.fit(experiment.sgd())
    found["SGD"] = test(sgd)
    update_bn(sgd, experiment.batches(settings.epochs))
    found["SGD, BN statistics recomputed"] = test(sgd)
    averages = []
    for schedule in ("constant", "cyclic"):
        recorder, name = _Recorder(), f"SWA {schedule}"
        model = experiment.fit(recorder, experiment.swa(schedule))
        found[name] = test(model)
        averages.append([v.numpy() for v in model.trainable_variables])
        model.set_weights(recorder.weights)
        assign(model.trainable_variables, averages[-1])
        found[f"{name}, without the BN pass"] = test(model)
        theirs, callback = experiment.keras_swa(schedule)
        found[f"{name}, finished by keras-swa"] = test(experiment.fit(theirs, callback))
        assert all(map(np.array_equal, recorder.weights, theirs.weights))  # trained alike

    line, start = [], [v.numpy() for v in sgd.trainable_variables]
    for t in settings.points:
        between = [(1 - t) * a + t * b for a, b in zip(start, averages[0], strict=True)]
        assign(sgd.trainable_variables, between)
        update_bn(sgd, experiment.batches(settings.epochs))
        line.append([test(sgd, samples)[0] for samples in (experiment.train, experiment.test)])
    print(f"{case}, seed {seed}: done", file=sys.stderr, flush=True)
    return found, line


def interval(values: Any) -> str:
    """Return mean and Student's 95 % confidence interval, in bold if it does not hold 0."""
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    mark = "**" if abs(mean) > half else ""
    return f"{mark}{mean:+.3g}{mark} [{mean - half:+.3g}, {mean + half:+.3g}]"


def tables(settings: Settings, results: list[tuple[dict[str, Any], Any]]) -> Iterable[str]:
    """Yield the tables: a column for each case, whose results are those of its seeds."""
    shape, header = (len(settings.cases), len(settings.seeds)), list(map(str, settings.cases))
    tests = {name: np.reshape([r[0][name] for r in results], (*shape, 2)) for name in results[0][0]}
    names, ends = ("SWA constant", "SWA cyclic"), ("without the BN pass", "finished by keras-swa")
    pairs = [(name, "SGD") for name in (*names, "SGD, BN statistics recomputed")]
    pairs += [(name, f"{name}, {end}") for end in ends for name in names]
    for metric, shown, of in (
        ("test accuracy, %", "{:.2f}", {name: 100 * (1 - t[..., 1]) for name, t in tests.items()}),
        ("test loss", "{:.4f}", {name: t[..., 0] for name, t in tests.items()}),
    ):
        means = [[name, *map(shown.format, values.mean(1))] for name, values in of.items()]
        yield table([f"{metric}, mean", *header], means)
        differences = [[f"{a} - {b}", *map(interval, of[a] - of[b])] for a, b in pairs]
        yield table([f"{metric}, difference", *header], differences)

    sgd, swa = settings.points.index(0), settings.points.index(1)
    lines, rows = np.reshape([line for _, line in results], (*shape, -1, 2)), []
    for part, losses in (("train", lines[..., 0]), ("test", lines[..., 1])):
        first, at_sgd, at_swa, last = np.moveaxis(losses[..., [0, sgd, swa, -1]], -1, 0)
        lowest = np.median(np.take(settings.points, losses.argmin(-1)), axis=1)
        rows.append([f"{part} loss, SWA - SGD", *map(interval, at_swa - at_sgd)])
        rise = last - at_swa - (first - at_sgd)
        rows.append([f"rise of {part} loss, SWA - SGD", *map(interval, rise)])
        rows.append([f"t of the lowest {part} loss, median", *map("{:.2g}".format, lowest)])
    yield table(["along the line", *header], rows)


def main() -> None:
    """Compare, and print the tables."""
    parser = argparse.ArgumentParser(prog="./scripts/evidence", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at sizes that say little")
    settings = QUICK if (quick := parser.parse_args().quick) else Settings()
    asked = [(settings, case, seed) for case in settings.cases for seed in settings.seeds]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        results = list(pool.map(compare, *zip(*asked, strict=True)))
    print(*tables(settings, results), provenance("./scripts/evidence", quick), sep="\n")


if __name__ == "__main__":
    main()
