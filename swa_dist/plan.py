"""What each epoch of a run is, and which learning rate each batch gets. Pure Python.

The two ways of counting epochs meet here and nowhere else: arguments and messages count from 1,
as people do; `epoch` in a method is Keras's, counted from 0.
"""

import bisect
import math
import numbers
import os
from dataclasses import dataclass, replace
from typing import Any

from swa_dist import schedules

LR_SCHEDULES = ("manual", "constant", "cyclic")
_FLOAT32_STEP = 1.2e-7


@dataclass(frozen=True)
class Arguments:
    """The callback's arguments, checked for whatever can be known without a model.

    Raises:
        ValueError: An argument has the wrong type or is out of its range, or two contradict each
            other. The message names the argument, what it must be and what was received.
    """

    start_epoch: int | float
    lr_schedule: str = "manual"
    swa_lr: float | str = "auto"
    swa_lr2: float | str = "auto"
    swa_freq: int = 1
    batch_size: int | None = None
    verbose: int = 0
    backup_dir: str | os.PathLike | None = None
    validate_average: bool = False
    bn_steps: int | None = None

    def __post_init__(self) -> None:
        fraction = _is_real(self.start_epoch) and 0 < self.start_epoch < 1
        if not fraction and not _is_integer(self.start_epoch, at_least=1):
            _refuse(
                self,
                "start_epoch",
                "an integer >= 1 (epochs count from 1), or a float between 0 and 1: the fraction "
                "of `epochs` after which averaging begins",
            )
        if not isinstance(self.lr_schedule, str) or self.lr_schedule not in LR_SCHEDULES:
            _refuse(self, "lr_schedule", "one of " + ", ".join(map(repr, LR_SCHEDULES)))
        for name in ("swa_lr", "swa_lr2"):
            value = getattr(self, name)
            if value == "auto" if isinstance(value, str) else _is_real(value) and value > 0:
                continue
            _refuse(self, name, "a finite number > 0, or 'auto'")
        if not _is_integer(self.swa_freq, at_least=1):
            _refuse(self, "swa_freq", "an integer >= 1")
        if self.batch_size is not None and not _is_integer(self.batch_size, at_least=1):
            _refuse(self, "batch_size", "None or an integer >= 1: the global batch size")
        if not isinstance(self.verbose, numbers.Integral) or self.verbose not in (0, 1):
            _refuse(self, "verbose", "0 or 1")
        if self.backup_dir is not None and not (
            isinstance(self.backup_dir, str | os.PathLike)
            and isinstance(os.fspath(self.backup_dir), str)
            and os.fspath(self.backup_dir)
        ):
            _refuse(self, "backup_dir", "None or the path of a folder")
        if not isinstance(self.validate_average, bool):
            _refuse(self, "validate_average", "True or False")
        if self.bn_steps is not None and not _is_integer(self.bn_steps, at_least=1):
            _refuse(self, "bn_steps", "None or an integer >= 1: batches of the BN pass")

        if self.lr_schedule == "cyclic" and self.swa_freq == 1:
            _refuse(
                self,
                "swa_freq",
                "an integer >= 2 with lr_schedule='cyclic': it is the length of a cycle in epochs",
            )
        if self.lr_schedule == "cyclic" and "auto" not in (self.swa_lr, self.swa_lr2):
            _check_order(float(self.swa_lr), float(self.swa_lr2))

    @property
    def without_effect(self) -> list[str]:
        """What to tell people of arguments that `lr_schedule` does not use."""
        unused = {"manual": ("swa_lr", "swa_lr2"), "constant": ("swa_lr2",), "cyclic": ()}
        use = {"swa_lr": "'constant' or 'cyclic'", "swa_lr2": "'cyclic'"}
        return [
            f"`{name}` has no effect with lr_schedule={self.lr_schedule!r}. Received: {name}="
            f"{getattr(self, name)!r}. Leave it out, or choose lr_schedule={use[name]}."
            for name in unused[self.lr_schedule]
            if getattr(self, name) != "auto"
        ]

    def plan(
        self,
        epochs: int,
        steps_per_epoch: int | None = None,
        learning_rate: float | None = None,
        batch_norm: bool = True,
    ) -> "Plan":
        """Return what a run with these arguments would be. See `SWA.plan`."""
        for name, value, right, rule in (
            ("epochs", epochs, _is_integer(epochs, at_least=1), "an integer >= 1"),
            (
                "steps_per_epoch",
                steps_per_epoch,
                steps_per_epoch is None or _is_integer(steps_per_epoch, at_least=1),
                "None or an integer >= 1",
            ),
            (
                "learning_rate",
                learning_rate,
                learning_rate is None or (_is_real(learning_rate) and learning_rate > 0),
                "None or a finite number > 0",
            ),
            ("batch_norm", batch_norm, isinstance(batch_norm, bool), "True or False"),
        ):
            if not right:
                raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}.")
        initial_rate = math.nan if learning_rate is None else float(learning_rate)
        return Plan(self, epochs, batch_norm, initial_rate, steps_per_epoch)


@dataclass(frozen=True)
class Plan:
    """Every decision of one run, taken before its first batch. `print` shows it as a table.

    Args:
        arguments: The callback's arguments.
        epochs: Epoch at which `fit` ends.
        has_bn: Whether the model has live batch normalization layers, for which the last epoch is
            given to recomputing their statistics (the BN pass).
        initial_rate: Learning rate of the optimizer before training; NaN if it is not known yet,
            as are the rates that depend on it; None if it is not a number that can be set.
        steps: Batches per epoch. None where nobody knows yet: then every batch of an epoch has the
            rate with which a known one would begin.

    Raises:
        ValueError: No snapshot fits into the run, or the schedule needs a learning rate that can be
            set, or rates left to "auto" are out of order.
    """

    arguments: Arguments
    epochs: int
    has_bn: bool
    initial_rate: float | None
    steps: int | None = None

    def __post_init__(self) -> None:
        self.check_first_epoch(0)
        if self.arguments.lr_schedule == "manual":
            return
        if self.initial_rate is None:
            _refuse(
                self.arguments,
                "lr_schedule",
                "'manual' for an optimizer whose `learning_rate` is not a number that can be set, "
                "such as a LearningRateSchedule; give the optimizer a number, or leave the "
                "schedule to it",
            )
        elif self.initial_rate <= 0:
            _refuse(
                self.arguments,
                "lr_schedule",
                "'manual' for an optimizer whose learning rate is 0: a schedule starts from it",
            )
        if self.arguments.lr_schedule == "cyclic":
            _check_order(self.swa_lr, self.swa_lr2)

    @property
    def start_epoch(self) -> int:
        """Epoch, counted from 1, at whose end averaging may begin."""
        start = self.arguments.start_epoch
        if isinstance(start, numbers.Integral):
            return int(start)
        # 0.1 of 30 epochs is 3 of them, although the float is a little more than 0.1.
        return math.ceil(float(start) * self.epochs * (1 - _FLOAT32_STEP)) + 1

    @property
    def first_snapshot(self) -> int:
        """Epoch, counted from 1, at whose end the first snapshot is due."""
        return self.start_epoch + self.swa_freq - 1

    @property
    def swa_freq(self) -> int:
        """Epochs from one snapshot to the next."""
        return int(self.arguments.swa_freq)

    @property
    def swa_lr(self) -> float:
        """Learning rate at the end of every cycle. Only for "constant" and "cyclic"."""
        assert self.initial_rate is not None
        given = self.arguments.swa_lr
        return 0.1 * self.initial_rate if isinstance(given, str) else float(given)

    @property
    def swa_lr2(self) -> float:
        """Learning rate at the beginning of every cycle. Only for "cyclic"."""
        assert self.initial_rate is not None
        given = self.arguments.swa_lr2
        if isinstance(given, str):
            return self.swa_lr + 0.25 * (self.initial_rate - self.swa_lr)
        return float(given)

    def check_first_epoch(self, epoch: int) -> None:
        """Refuse a run that begins at `epoch` and ends without a snapshot.

        Args:
            epoch: First epoch that will be trained, counted from 0.

        Raises:
            ValueError: With the arguments and epochs that do not fit.
        """
        if self.snapshots(epoch, self.epochs):
            return
        last_possible = self.epochs - self.has_bn
        begins = f" from epoch {epoch + 1}" if epoch else ""
        last = (
            f", of which the last, epoch {self.epochs}, recomputes the batch normalization "
            "statistics"
            if self.has_bn
            else ""
        )
        raise ValueError(
            "`start_epoch` and `swa_freq` must leave room for at least one snapshot. Received: "
            f"start_epoch={self.arguments.start_epoch}, swa_freq={self.arguments.swa_freq}: the "
            f"first snapshot is at the end of epoch {self.first_snapshot}, but `fit` "
            f"trains{begins} to epoch {self.epochs}{last}, so that epoch {last_possible} is the "
            "last that could be averaged. Begin earlier or train for more epochs."
            + (" Snapshots of an earlier run are known only from a `backup_dir`." if epoch else "")
        )

    def is_start(self, epoch: int) -> bool:
        """Whether averaging begins with this epoch."""
        return epoch + 1 == self.start_epoch

    def is_snapshot(self, epoch: int) -> bool:
        """Whether the weights at the end of this epoch enter the average."""
        into = epoch + 1 - self.start_epoch + 1
        return into > 0 and into % self.swa_freq == 0 and not self.is_bn_pass(epoch)

    def snapshots(self, first: int, end: int) -> range:
        """Return the epochs from `first` on, and before `end`, that end with a snapshot."""
        earliest = self.first_snapshot - 1
        if first > earliest:
            earliest += -(-(first - earliest) // self.swa_freq) * self.swa_freq
        return range(earliest, min(end, self.epochs - self.has_bn), self.swa_freq)

    def is_bn_pass(self, epoch: int) -> bool:
        """Whether this epoch recomputes batch normalization statistics instead of training."""
        return self.has_bn and epoch + 1 == self.epochs

    def needs_initial_rate(self, epoch: int) -> bool:
        """Whether the learning rates from this epoch on depend on the one before training."""
        schedule = self.arguments.lr_schedule
        if schedule == "manual" or self.is_bn_pass(epoch):
            return False
        autos = self.arguments.swa_lr, self.arguments.swa_lr2 if schedule == "cyclic" else None
        return "auto" in autos or self._kept(epoch) > 0

    def changes_within(self, epoch: int) -> bool:
        """Whether the learning rate is another one in every batch of this epoch."""
        return (
            self.arguments.lr_schedule == "cyclic"
            and epoch + 1 >= self.start_epoch
            and not self.is_bn_pass(epoch)
        )

    def learning_rate(self, epoch: int, batch: int = 0) -> float | None:
        """Return the learning rate of one batch.

        Args:
            epoch: Epoch, counted from 0.
            batch: Batch in the epoch, counted from 0.

        Returns:
            The rate; None where the plan leaves it alone.
        """
        if self.is_bn_pass(epoch):
            return 0.0
        if self.arguments.lr_schedule == "manual":
            return None
        if not self.changes_within(epoch):
            assert self.initial_rate is not None
            return schedules.annealed(epoch + 1, self.start_epoch, self.initial_rate, self.swa_lr)
        epochs_behind = (epoch + 1 - self.start_epoch) % self.swa_freq
        if self.steps is None:
            return schedules.cyclic(epochs_behind, self.swa_freq, self.swa_lr, self.swa_lr2)
        # A batch beyond `steps` must not reach into the next epoch's share of the cycle.
        batch_in_cycle = epochs_behind * self.steps + min(batch + 1, self.steps)
        cycle = self.swa_freq * self.steps
        return schedules.cyclic(batch_in_cycle, cycle, self.swa_lr, self.swa_lr2)

    def stopped_after(self, epoch: int) -> "Plan":
        """Return the plan of a run that is to end early, with the epoch after this one."""
        # A fraction stays one of the epochs that were to be.
        arguments = replace(self.arguments, start_epoch=self.start_epoch)
        return replace(self, arguments=arguments, epochs=epoch + 2)

    def __str__(self) -> str:
        """Return a table of the phases of the run, and its snapshots."""
        table = [("epochs", "what happens", "learning rate")]
        first = 0
        while first < self.epochs:
            # Found by bisection: `epochs` may be ten millions, where early stopping is to end it.
            phase = self._phase(first)
            end = bisect.bisect_right(range(self.epochs), phase, lo=first, key=self._phase)
            table.append((_span(first + 1, end), *self._row(first, end - 1)))
            first = end
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]

        snapshots = self.snapshots(0, self.epochs)
        lines.append(f"snapshots ({len(snapshots)}): at the end of epoch {listed(snapshots)}")
        if any(_number(math.nan) in rate for _, _, rate in table):
            lines.append("?: depends on the optimizer's rate; give it as `learning_rate`")
        return "\n".join(lines)

    def _phase(self, epoch: int) -> tuple[bool, bool, int]:
        """Return what is the same for the epochs of one line of the table, and rises with them."""
        averages = epoch + 1 >= self.start_epoch
        rate = 0
        if self.arguments.lr_schedule != "manual" and not averages:
            rate = 2 - math.ceil(self._kept(epoch)) - math.floor(self._kept(epoch))
        return self.is_bn_pass(epoch), averages, rate

    def _kept(self, epoch: int) -> float:
        """Return how much of the initial rate is in that of an epoch: from 1 it falls to 0."""
        return schedules.annealed(epoch + 1, self.start_epoch, initial_rate=1.0, swa_lr=0.0)

    def _row(self, first: int, last: int) -> tuple[str, str]:
        """Return what happens in the epochs of one phase, and at which learning rate."""
        if self.is_bn_pass(first):
            return "BN pass of the average", "0"
        what = "training and averaging" if first + 1 >= self.start_epoch else "training"
        if self.learning_rate(first) is None:
            return what, "yours"
        if self.changes_within(first):
            batches = f" of {self.steps} batches" if self.steps else ""
            cycle = _distinct(self.swa_lr2, self.swa_lr)
            return what, f"{cycle} in {self.swa_freq} epochs{batches}"
        return what, _distinct(self.learning_rate(first), self.learning_rate(last))


def listed(epochs: range) -> str:
    """Return epochs, counted from 0, as people count them, and not too many of them."""
    if len(epochs) > 4:
        return f"{epochs[0] + 1}, {epochs[1] + 1}, ..., {epochs[-1] + 1}"
    return ", ".join(str(epoch + 1) for epoch in epochs)


def _distinct(first: float | None, last: float | None) -> str:
    return " to ".join(dict.fromkeys([_number(first), _number(last)]))


def _number(rate: float | None) -> str:
    assert rate is not None
    return "?" if math.isnan(rate) else f"{rate:.4g}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _is_integer(value: Any, at_least: int) -> bool:
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and int(value) >= at_least
    )


def _is_real(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _refuse(arguments: Arguments, name: str, rule: str) -> None:
    raise ValueError(f"`{name}` must be {rule}. Received: {name}={getattr(arguments, name)!r}.")


def _check_order(swa_lr: float, swa_lr2: float) -> None:
    if swa_lr2 < swa_lr:
        raise ValueError(
            "`swa_lr2` must be at least `swa_lr`: a cycle falls from the one to the other. "
            f"Received: swa_lr2={swa_lr2!r}, swa_lr={swa_lr!r}."
        )
