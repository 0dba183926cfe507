"""The callback's options, checked for all that can be known without a model. Pure Python."""

import math
import numbers
import os
from dataclasses import dataclass, fields
from typing import Any, NoReturn

LR_SCHEDULES = ("manual", "constant", "cyclic")


@dataclass(frozen=True, repr=False)
class Options:
    """The arguments of `SWA`, which documents them.

    Raises:
        ValueError: An argument has the wrong type or is out of range, or two contradict each
            other. The message names the argument, the rule and what was received.
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
    snapshot_freq: int | str = "epoch"
    ema_momentum: float | None = None
    bn_data: Any = None

    def __post_init__(self) -> None:
        fraction = is_real(self.start_epoch) and 0 < self.start_epoch < 1
        if not fraction and not is_integer(self.start_epoch, at_least=1):
            self._refuse(
                "start_epoch",
                "an integer >= 1 (epochs count from 1), or a float between 0 and 1: the fraction "
                "of `epochs` after which averaging begins",
            )
        if not isinstance(self.lr_schedule, str) or self.lr_schedule not in LR_SCHEDULES:
            self._refuse("lr_schedule", "one of " + ", ".join(map(repr, LR_SCHEDULES)))
        for name in ("swa_lr", "swa_lr2"):
            value = getattr(self, name)
            if value == "auto" if isinstance(value, str) else is_real(value) and value > 0:
                continue
            self._refuse(name, "a finite number > 0, or 'auto'")
        if not is_integer(self.swa_freq, at_least=1):
            self._refuse("swa_freq", "an integer >= 1")
        if self.batch_size is not None and not is_integer(self.batch_size, at_least=1):
            self._refuse("batch_size", "None or an integer >= 1: the global batch size")
        if not isinstance(self.verbose, numbers.Integral) or self.verbose not in (0, 1):
            self._refuse("verbose", "0 or 1")
        if self.backup_dir is not None and not (
            isinstance(self.backup_dir, str | os.PathLike)
            and isinstance(os.fspath(self.backup_dir), str)
            and os.fspath(self.backup_dir)
        ):
            self._refuse("backup_dir", "None or the path of a folder")
        if not isinstance(self.validate_average, bool):
            self._refuse("validate_average", "True or False")
        if self.bn_steps is not None and not is_integer(self.bn_steps, at_least=1):
            self._refuse("bn_steps", "None or an integer >= 1: batches of the BN pass")
        check_ema_momentum(self.ema_momentum)
        self._check_snapshot_freq()
        if self.lr_schedule == "cyclic" and self.swa_freq == 1:
            self._refuse(
                "swa_freq",
                "an integer >= 2 with lr_schedule='cyclic': it is the length of a cycle in epochs",
            )
        if self.lr_schedule == "cyclic" and "auto" not in (self.swa_lr, self.swa_lr2):
            check_order(float(self.swa_lr), float(self.swa_lr2))

    def __deepcopy__(self, memo: object) -> "Options":
        """Return the same ones: they do not change, and a `tf.data.Dataset` cannot be copied."""
        return self

    def _check_snapshot_freq(self) -> None:
        freq = self.snapshot_freq
        if isinstance(freq, str) and freq == "epoch":
            return
        if not is_integer(freq, at_least=1):
            self._refuse("snapshot_freq", "'epoch', or an integer >= 1: steps between snapshots")
        if self.lr_schedule == "cyclic":
            self._refuse(
                "snapshot_freq",
                "'epoch' with lr_schedule='cyclic': snapshots are taken at the ends of cycles",
            )
        if self.swa_freq != 1:
            self._refuse(
                "snapshot_freq",
                f"'epoch' with swa_freq={self.swa_freq!r}, which counts epochs between snapshots, "
                "where this counts steps; leave one of them out",
            )

    def check_initial_rate(self, rate: float | None, optimizer: str) -> None:
        """Refuse a schedule for an optimizer that it cannot steer.

        Args:
            rate: The optimizer's learning rate before training; None: it cannot be set.
            optimizer: Which one it is, for the message; empty if there is only one.

        Raises:
            ValueError: The rate cannot be set, or is 0.
        """
        if self.lr_schedule == "manual" or (rate is not None and rate > 0):
            return
        which = f" That is the model's `{optimizer}`." if optimizer else ""
        if rate is None:
            self._refuse(
                "lr_schedule",
                "'manual' for an optimizer whose `learning_rate` is not a number that can be set, "
                "such as a LearningRateSchedule; give the optimizer a number, or leave the "
                "schedule to it",
                which,
            )
        self._refuse(
            "lr_schedule",
            "'manual' for an optimizer whose learning rate is 0: a schedule starts from it",
            which,
        )

    def __repr__(self) -> str:
        """Return the arguments that are not the default ones."""
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "bn_data":
                if value is not None:
                    shown.append(f"bn_data=<{type(value).__name__}>")
            elif value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"Options({', '.join(shown)})"

    def _refuse(self, name: str, rule: str, more: str = "") -> NoReturn:
        received = f"Received: {name}={getattr(self, name)!r}."
        raise ValueError(f"`{name}` must be {rule}. {received}{more}")


def check_order(swa_lr: float, swa_lr2: float) -> None:
    """Refuse a cycle that would rise.

    Raises:
        ValueError: With both rates.
    """
    if swa_lr2 < swa_lr:
        raise ValueError(
            "`swa_lr2` must be at least `swa_lr`: a cycle falls from the one to the other. "
            f"Received: swa_lr2={swa_lr2!r}, swa_lr={swa_lr!r}."
        )


def check_ema_momentum(value: Any) -> None:
    """Refuse a momentum of an exponential moving average that is none.

    Raises:
        ValueError: It is neither None nor a number in (0, 1).
    """
    if value is not None and not (is_real(value) and 0 < value < 1):
        raise ValueError(
            f"`ema_momentum` must be None or a number in (0, 1). Received: ema_momentum={value!r}."
        )


def is_integer(value: Any, at_least: int) -> bool:
    """Return whether a value is an integer, of Python or NumPy, and large enough."""
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and int(value) >= at_least
    )


def is_real(value: Any) -> bool:
    """Return whether a value is a finite real number, of Python or NumPy."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
