"""What each epoch of a run is, and which learning rate each batch gets. Pure Python.

Options and messages count epochs from 1; an `epoch` argument is Keras's, counted from 0.
"""

import bisect
import math
from dataclasses import KW_ONLY, dataclass, replace

from swa_dist.plan import schedules
from swa_dist.plan.messages import list_epochs, no_room_for_a_snapshot
from swa_dist.plan.options import Options, check_order, is_integer, is_real

_FLOAT32_STEP = 1.2e-7


@dataclass(frozen=True, repr=False)
class Plan:
    """What each epoch of a run will be, and its learning rates. It prints as a table.

    Args:
        epochs: Epoch at which `fit` ends, an integer >= 1.
        start_epoch: See `SWA`. A fraction becomes the epoch, counted from 1, that it stands for.
        lr_schedule: See `SWA`, as for the next three.
        swa_lr: Learning rate while averaging.
        swa_lr2: Upper learning rate of a cycle.
        swa_freq: Epochs from one snapshot to the next.
        steps_per_epoch: Batches in an epoch. When unknown, None, every batch of an epoch has the
            rate of a cycle with one batch per epoch.
        initial_learning_rate: Learning rate of the optimizer before training. Without it, rates
            that depend on it are NaN, and printed as "?".
        batch_norm: Whether the model has batch normalization (BN) layers that train. The last
            epoch then recomputes their statistics (the BN pass).

    Raises:
        ValueError: An argument is out of range, no snapshot fits into the run, or rates left to
            "auto" are out of order.

    Example:
        >>> print(Plan(60, start_epoch=45, lr_schedule="constant", initial_learning_rate=0.1))
        epochs    what happens            learning rate
        1 to 23   training                0.1
        24 to 40  training                0.09489 to 0.01307
        41 to 44  training                0.01
        45 to 59  training and averaging  0.01
        60        BN pass of the average  0
        snapshots (15): at the end of epoch 45, 46, ..., 59
    """

    epochs: int
    start_epoch: int | float
    lr_schedule: str = "manual"
    swa_lr: float | str = "auto"
    swa_lr2: float | str = "auto"
    swa_freq: int = 1
    _: KW_ONLY
    steps_per_epoch: int | None = None
    initial_learning_rate: float | None = None
    batch_norm: bool = True

    def __post_init__(self) -> None:
        Options(self.start_epoch, self.lr_schedule, self.swa_lr, self.swa_lr2, self.swa_freq)
        steps, rate = self.steps_per_epoch, self.initial_learning_rate
        for name, is_right, rule in (
            ("epochs", is_integer(self.epochs, at_least=1), "an integer >= 1"),
            (
                "steps_per_epoch",
                steps is None or is_integer(steps, at_least=1),
                "None or an integer >= 1",
            ),
            (
                "initial_learning_rate",
                rate is None or (is_real(rate) and rate > 0),
                "None or a finite number > 0",
            ),
            ("batch_norm", isinstance(self.batch_norm, bool), "True or False"),
        ):
            if not is_right:
                raise ValueError(
                    f"`{name}` must be {rule}. Received: {name}={getattr(self, name)!r}."
                )
        given = start_epoch = self.start_epoch
        if 0 < given < 1:
            # 0.1 of 30 epochs is 3 of them, although the float is a little more than 0.1.
            start_epoch = math.ceil(float(given) * self.epochs * (1 - _FLOAT32_STEP)) + 1
        # NumPy's integers may be narrow.
        object.__setattr__(self, "start_epoch", int(start_epoch))
        object.__setattr__(self, "swa_freq", int(self.swa_freq))
        self.check_first_epoch(0, given)
        if self.lr_schedule == "cyclic":
            check_order(self._low_rate, self._high_rate)

    @classmethod
    def of(
        cls,
        options: Options,
        epochs: int,
        steps_per_epoch: int | None,
        initial_learning_rate: float | None,
        batch_norm: bool,
    ) -> "Plan":
        """Return the plan of a run with the callback's options."""
        return cls(
            epochs,
            options.start_epoch,
            options.lr_schedule,
            options.swa_lr,
            options.swa_lr2,
            options.swa_freq,
            steps_per_epoch=steps_per_epoch,
            initial_learning_rate=initial_learning_rate,
            batch_norm=batch_norm,
        )

    @property
    def first_snapshot(self) -> int:
        """Epoch, counted from 1, at whose end the first snapshot is due."""
        return self._start + self.swa_freq - 1

    def check_first_epoch(self, epoch: int, start_epoch: float | None = None) -> None:
        """Refuse a run that begins at an epoch and ends without a snapshot.

        Args:
            epoch: First epoch that will be trained, counted from 0.
            start_epoch: What was given as such, for the message.

        Raises:
            ValueError: With the arguments and epochs that do not fit.
        """
        if not self.snapshot_epochs(epoch, self.epochs):
            raise ValueError(
                no_room_for_a_snapshot(
                    start_epoch=self.start_epoch if start_epoch is None else start_epoch,
                    swa_freq=self.swa_freq,
                    first_snapshot=self.first_snapshot,
                    first_epoch=epoch,
                    epochs=self.epochs,
                    batch_norm=self.batch_norm,
                )
            )

    def is_start(self, epoch: int) -> bool:
        """Return whether averaging begins with this epoch."""
        return epoch + 1 == self.start_epoch

    def is_snapshot(self, epoch: int) -> bool:
        """Return whether the weights at the end of this epoch enter the average."""
        into = epoch + 1 - self._start + 1
        return into > 0 and into % self.swa_freq == 0 and not self.is_bn_pass(epoch)

    def snapshot_epochs(self, first: int, end: int) -> range:
        """Return the epochs from `first` on, and before `end`, that end with a snapshot."""
        earliest, freq = self.first_snapshot - 1, self.swa_freq
        if first > earliest:
            earliest += -(-(first - earliest) // freq) * freq
        return range(earliest, min(end, self.epochs - self.batch_norm), freq)

    def is_bn_pass(self, epoch: int) -> bool:
        """Return whether this epoch recomputes BN statistics instead of training."""
        return self.batch_norm and epoch + 1 == self.epochs

    def needs_initial_learning_rate(self, epoch: int) -> bool:
        """Return whether the rates from this epoch on depend on the one before training."""
        if self.lr_schedule == "manual" or self.is_bn_pass(epoch):
            return False
        autos = self.swa_lr, self.swa_lr2 if self.lr_schedule == "cyclic" else None
        return "auto" in autos or self._initial_rate_fraction(epoch) > 0

    def changes_within(self, epoch: int) -> bool:
        """Return whether the learning rate is another one in every batch of this epoch."""
        return (
            self.lr_schedule == "cyclic"
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
        if self.lr_schedule == "manual":
            return None
        if not self.changes_within(epoch):
            return schedules.annealed(epoch + 1, self._start, self._initial_rate, self._low_rate)
        freq = self.swa_freq
        finished_epochs = (epoch + 1 - self._start) % freq
        if self.steps_per_epoch is None:
            return schedules.cyclic(finished_epochs, freq, self._low_rate, self._high_rate)
        # A batch beyond the steps must not reach into the next epoch's part of the cycle.
        steps = self.steps_per_epoch
        batch_in_cycle = finished_epochs * steps + min(batch + 1, steps)
        return schedules.cyclic(batch_in_cycle, freq * steps, self._low_rate, self._high_rate)

    def stopped_after(self, epoch: int) -> "Plan":
        """Return the plan of a run that is to end early, with the epoch after this one."""
        return replace(self, epochs=epoch + 2)

    @property
    def _start(self) -> int:
        return int(self.start_epoch)

    @property
    def _initial_rate(self) -> float:
        rate = self.initial_learning_rate
        return math.nan if rate is None else float(rate)

    @property
    def _low_rate(self) -> float:
        """Learning rate while averaging, and at the end of a cycle."""
        return 0.1 * self._initial_rate if isinstance(self.swa_lr, str) else float(self.swa_lr)

    @property
    def _high_rate(self) -> float:
        """Learning rate at the beginning of a cycle."""
        if isinstance(self.swa_lr2, str):
            return self._low_rate + 0.25 * (self._initial_rate - self._low_rate)
        return float(self.swa_lr2)

    def __repr__(self) -> str:
        """Return a table of the phases of the run, and its snapshots."""
        table = [("epochs", "what happens", "learning rate")]
        first = 0
        while first < self.epochs:
            # By bisection: `epochs` may be ten million, with early stopping to end the run.
            phase = self._phase(first)
            end = bisect.bisect_right(range(self.epochs), phase, lo=first, key=self._phase)
            table.append((_span(first + 1, end), *self._line(first, end - 1)))
            first = end
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]

        snapshots = self.snapshot_epochs(0, self.epochs)
        lines.append(f"snapshots ({len(snapshots)}): at the end of epoch {list_epochs(snapshots)}")
        if any(_number(math.nan) in rate for _, _, rate in table):
            lines.append("?: depends on the optimizer's learning rate, which was not given")
        return "\n".join(lines)

    def _phase(self, epoch: int) -> tuple[bool, bool, bool, int]:
        """Return what the epochs of one line of the table share; it rises from line to line."""
        averages = epoch + 1 >= self.start_epoch
        rate = 0
        if self.lr_schedule != "manual" and not averages:
            fraction = self._initial_rate_fraction(epoch)
            rate = 2 - math.ceil(fraction) - math.floor(fraction)
        return self.is_bn_pass(epoch), self._is_in_vain(epoch), averages, rate

    def _is_in_vain(self, epoch: int) -> bool:
        """Return whether an epoch trains after the last snapshot: the average lacks it."""
        return epoch > self.snapshot_epochs(0, self.epochs)[-1] and not self.is_bn_pass(epoch)

    def _initial_rate_fraction(self, epoch: int) -> float:
        """Return how much of the initial rate an epoch's rate has: 1 at first, 0 in the end."""
        return schedules.annealed(epoch + 1, self._start, initial_rate=1.0, swa_lr=0.0)

    def _line(self, first: int, last: int) -> tuple[str, str]:
        """Return what happens in the epochs of one phase, and at which learning rate."""
        if self.is_bn_pass(first):
            return "BN pass of the average", "0"
        what = "training and averaging" if first + 1 >= self.start_epoch else "training"
        if self._is_in_vain(first):
            what = "training, for no snapshot"
        if self.learning_rate(first) is None:
            return what, "yours"
        if self.changes_within(first):
            batches = f" of {self.steps_per_epoch} batches" if self.steps_per_epoch else ""
            cycle = _distinct(self._high_rate, self._low_rate)
            return what, f"{cycle} in {self.swa_freq} epochs{batches}"
        return what, _distinct(self.learning_rate(first), self.learning_rate(last))


def _distinct(first: float | None, last: float | None) -> str:
    return " to ".join(dict.fromkeys([_number(first), _number(last)]))


def _number(rate: float | None) -> str:
    assert rate is not None
    return "?" if math.isnan(rate) else f"{rate:.4g}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
