"""Time that passes, measured so that whatever disturbs one contender disturbs all."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Times = dict[str, list[float]]


def alternate(contenders: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 3) -> Times:
    """Return the seconds that each contender takes, in turns: A B C, A B C, ...

    Args:
        contenders: What is timed.
        rounds: How often each is.
        warm_up: Rounds before, in which things are traced and memory is got for the first time.
    """
    seconds: Times = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, contend in contenders.items():
            began = time.perf_counter()
            contend()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def step_timer(clock: Callable[[], float] = time.perf_counter) -> Any:
    """Return a callback that keeps how long each step of each epoch took, all hooks included."""
    import tensorflow as tf

    class Timer(tf.keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[list[float]] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.marks: list[float] = []

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.marks.append(clock())

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.marks.append(clock())
            self.steps.append(list(np.diff(self.marks)))

    return Timer()


def time_hooks(callback: Any, clock: Callable[[], float] = time.perf_counter) -> Times:
    """Have a callback's hooks timed; return what will hold the time of each of their calls."""
    spent: Times = {}

    def timed(name: str, hook: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            began = clock()
            hook(*args, **kwargs)
            spent.setdefault(name, []).append(clock() - began)

        return call

    for name in (
        "train_begin",
        "epoch_begin",
        "train_batch_begin",
        "train_batch_end",
        "test_begin",
        "epoch_end",
        "train_end",
    ):
        setattr(callback, f"on_{name}", timed(name, getattr(callback, f"on_{name}")))
    return spent
