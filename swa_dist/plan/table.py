"""A plan as a table. Pure Python."""

import bisect
import math
from typing import TYPE_CHECKING

from swa_dist.plan.messages import list_epochs


class PrintsAsTable:
    """What a `Plan` prints, from what it answers."""

    if TYPE_CHECKING:
        epochs: int
        start_epoch: int | float
        lr_schedule: str
        swa_freq: int
        steps_per_epoch: int | None
        batch_norm: bool
        bn_data: bool

        @property
        def snapshot_steps(self) -> int | None: ...  # noqa: D102
        @property
        def _low_rate(self) -> float: ...
        @property
        def _high_rate(self) -> float: ...
        def is_bn_pass(self, epoch: int) -> bool: ...  # noqa: D102
        def snapshot_epochs(self, first: int, end: int) -> range: ...  # noqa: D102
        def changes_within(self, epoch: int) -> bool: ...  # noqa: D102
        def learning_rate(self, epoch: int, batch: int = 0) -> float | None: ...  # noqa: D102
        def _initial_rate_fraction(self, epoch: int) -> float: ...

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

        lines.append(self._snapshots())
        if self.batch_norm and self.bn_data:
            lines.append(f"BN statistics: from `bn_data`, at the end of epoch {self.epochs}")
        if any(_number(math.nan) in rate for _, _, rate in table):
            lines.append("?: depends on the optimizer's learning rate, which was not given")
        return "\n".join(lines)

    def _snapshots(self) -> str:
        epochs = self.snapshot_epochs(0, self.epochs)
        if self.snapshot_steps is None:
            return f"snapshots ({len(epochs)}): at the end of epoch {list_epochs(epochs)}"
        number = ""
        if self.steps_per_epoch is not None:
            number = f" ({len(epochs) * self.steps_per_epoch // self.snapshot_steps})"
        steps = "step" if self.snapshot_steps == 1 else f"{self.snapshot_steps} steps"
        return f"snapshots{number}: every {steps} from epoch {self.start_epoch} on"

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
