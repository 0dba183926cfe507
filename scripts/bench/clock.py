"""Time that passes, measured so that whatever disturbs one contender disturbs all."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Clock = Callable[[], float]


def _synchronized() -> float:
    """Return the time, once the GPU has finished what it was given."""
    import tensorflow as tf

    tf.test.experimental.sync_devices()
    return time.perf_counter()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "gpu": _synchronized}


def alternate(
    contenders: Mapping[str, Callable[[], T]], rounds: int, warm_up: int
) -> dict[str, list[T]]:
    """Return what each contender returns, in turns: A B C, A B C, ...; without the first rounds."""
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for _ in range(warm_up + rounds):
        for name, contend in contenders.items():
            found[name].append(contend())
    return {name: of_rounds[warm_up:] for name, of_rounds in found.items()}


def timed(function: Callable[..., Any], clock: Clock = time.perf_counter) -> Callable[..., float]:
    """Return a function that calls another, and returns the seconds that it takes."""

    def call(*args: Any, **kwargs: Any) -> float:
        began = clock()
        function(*args, **kwargs)
        return clock() - began

    return call


def timer(clock: Clock, each_step: bool = True) -> Any:
    """Return a callback whose `times` are, for each epoch, its steps' seconds, or its own alone."""
    import tensorflow as tf

    class Epochs(tf.keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[list[float]] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.marks = [] if each_step else [clock()]

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.marks.append(clock())
            self.times.append(list(np.diff(self.marks)))

    class Steps(Epochs):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.marks.append(clock())

    return Steps() if each_step else Epochs()


def time_hooks(callback: Any, clock: Clock) -> dict[str, list[float]]:
    """Have a callback's hooks timed; return what will hold the time of each of their calls."""
    of_batches = ("on_train_batch_begin", "on_train_batch_end")
    of_epochs = (
        "on_train_begin",
        "on_epoch_begin",
        "on_test_begin",
        "on_epoch_end",
        "on_train_end",
    )
    spent: dict[str, list[float]] = {name: [] for name in (*of_epochs, *of_batches)}
    for name, times in spent.items():
        hook = timed(getattr(callback, name), clock)

        def call(*args: Any, hook: Any = hook, times: Any = times, **kwargs: Any) -> None:
            times.append(hook(*args, **kwargs))

        setattr(callback, name, call)
    return spent
