"""What each epoch of a run is, and which learning rate each batch gets. Pure Python.

Options and messages count epochs from 1; an `epoch` argument is Keras's, counted from 0.
"""

import math
from dataclasses import KW_ONLY, dataclass, replace

from swa_dist.plan import schedules
from swa_dist.plan.errors import no_room_for_a_snapshot, too_few_steps
from swa_dist.plan.options import Options, check_order, is_integer, is_real
from swa_dist.plan.table import PrintsAsTable

_FLOAT32_STEP = 1.2e-7


@dataclass(frozen=True, repr=False)
class Plan(PrintsAsTable):
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
        batch_norm: Whether the model has batch normalization (BN) layers that train. Unless
            `bn_data` is true, the last epoch then recomputes their statistics (the BN pass).
        bn_data: Whether BN statistics come from data of one's own: see `SWA`.
        snapshot_freq: See `SWA`.

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
    bn_data: bool = False
    snapshot_freq: int | str = "epoch"

    def __post_init__(self) -> None:
        Options(
            *(self.start_epoch, self.lr_schedule, self.swa_lr, self.swa_lr2, self.swa_freq),
            snapshot_freq=self.snapshot_freq,
        )
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
            ("bn_data", isinstance(self.bn_data, bool), "True or False"),
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
        self.check_first_epoch(0, start_epoch=given)
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
            bn_data=options.bn_data is not None,
            snapshot_freq=options.snapshot_freq,
        )

    @property
    def snapshot_steps(self) -> int | None:
        """Training steps from one snapshot to the next; None: snapshots are taken by epochs."""
        return None if isinstance(self.snapshot_freq, str) else int(self.snapshot_freq)

    @property
    def first_snapshot(self) -> int:
        """Epoch, counted from 1, in which the first snapshot is due, as far as that is known."""
        if self.snapshot_steps is None:
            return self._start + self.swa_freq - 1
        steps = self.steps_per_epoch or self.snapshot_steps
        return self._start - 1 + math.ceil(self.snapshot_steps / steps)

    @property
    def first_snapshot_point(self) -> str:
        """When the first snapshot is due, in words."""
        if self.snapshot_steps is None:
            return f"the end of epoch {self.first_snapshot}"
        return f"training step {self.snapshot_steps}, counted from epoch {self.start_epoch} on"

    @property
    def ends_with_bn_pass(self) -> bool:
        """Whether the last epoch recomputes BN statistics instead of training."""
        return self.batch_norm and not self.bn_data

    def check_first_epoch(
        self, epoch: int, counted_steps: int = 0, start_epoch: float | None = None
    ) -> None:
        """Refuse a run that begins at an epoch and ends without a snapshot.

        Args:
            epoch: First epoch that will be trained, counted from 0.
            counted_steps: Training steps that were counted before, for snapshots by steps.
            start_epoch: What was given as such, for the message.

        Raises:
            ValueError: With the arguments and epochs that do not fit.
        """
        given = self.start_epoch if start_epoch is None else start_epoch
        averaged = self.snapshot_epochs(epoch, self.epochs)
        if not averaged:
            raise ValueError(
                no_room_for_a_snapshot(
                    start_epoch=given,
                    swa_freq=self.swa_freq,
                    first_snapshot=self.first_snapshot,
                    first_epoch=epoch,
                    epochs=self.epochs,
                    ends_with_bn_pass=self.ends_with_bn_pass,
                )
            )
        if self.snapshot_steps is not None and self.steps_per_epoch is not None:
            steps = counted_steps + len(averaged) * self.steps_per_epoch
            if steps < self.snapshot_steps:
                raise ValueError(too_few_steps(given, self.snapshot_steps, steps, averaged))

    def is_start(self, epoch: int) -> bool:
        """Return whether averaging begins with this epoch."""
        return epoch + 1 == self.start_epoch

    def is_snapshot(self, epoch: int) -> bool:
        """Return whether the weights at the end of this epoch enter the average.

        With snapshots by steps: False, if the steps of an epoch are not known.
        """
        into = epoch + 1 - self._start + 1
        if into <= 0 or self.is_bn_pass(epoch):
            return False
        if self.snapshot_steps is None:
            return into % self.swa_freq == 0
        return into * (self.steps_per_epoch or math.nan) % self.snapshot_steps == 0

    def averages_steps(self, epoch: int) -> bool:
        """Return whether snapshots by steps may be taken in this epoch."""
        averages = self.snapshot_steps is not None and epoch + 1 >= self._start
        return averages and not self.is_bn_pass(epoch)

    def snapshot_epochs(self, first: int, end: int) -> range:
        """Return the epochs from `first` on, and before `end`, that end with a snapshot.

        With snapshots by steps: those in which they may be taken.
        """
        end = min(end, self.epochs - self.ends_with_bn_pass)
        if self.snapshot_steps is not None:
            return range(max(first, self._start - 1), end)
        earliest, freq = self.first_snapshot - 1, self.swa_freq
        if first > earliest:
            earliest += -(-(first - earliest) // freq) * freq
        return range(earliest, end, freq)

    def is_bn_pass(self, epoch: int) -> bool:
        """Return whether this epoch recomputes BN statistics instead of training."""
        return self.ends_with_bn_pass and epoch + 1 == self.epochs

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
        """Return the plan of a run that is to end early, with the epoch after this one.

        With BN layers that is a BN pass. (A run with `bn_data` needs none, but for one that is
        resumed after it was stopped: Keras does not resume at the end of `fit`.)
        """
        return replace(self, epochs=epoch + 2, bn_data=False)

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

    def _initial_rate_fraction(self, epoch: int) -> float:
        """Return how much of the initial rate an epoch's rate has: 1 at first, 0 in the end."""
        return schedules.annealed(epoch + 1, self._start, initial_rate=1.0, swa_lr=0.0)
