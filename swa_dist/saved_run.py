"""What is saved of a run beside its model, and how a run that was killed goes on with it."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from swa_dist.backup import Backup
from swa_dist.flavour import Flavour
from swa_dist.model_average import ModelAverage
from swa_dist.plan import Plan
from swa_dist.replicas import is_chief, trainable_variables


@dataclass(frozen=True)
class Progress:
    """How far a run has come, beside the average itself.

    Attributes:
        n_averaged: Snapshots in the average.
        not_finite: Snapshots that were due and left out.
        stopped: Epochs that were over when training was stopped; 0: it was not.
        batch_size: Rows in the largest global batch; None before the first epoch is over.
    """

    n_averaged: int = 0
    not_finite: int = 0
    stopped: int = 0
    batch_size: int | None = None


@dataclass(frozen=True)
class Resumed:
    """What a run goes on with.

    Attributes:
        over: Epochs that were over when it was saved.
        plan: Its plan, with what had been learned.
        progress: How far it had come.
        initial_rates: Learning rates before its first epoch, by the optimizers' names.
    """

    over: int
    plan: Plan
    progress: Progress
    initial_rates: Mapping[str, float | None]


class SavedRun:
    """A run in a folder: its average, its progress, and what it was configured with.

    Args:
        folder: See `Backup`.
        model: The model that is trained.
        flavour: Its Keras.
        with_weights: Whether trained weights and BN statistics are saved, too: whoever saves the
            model may find the average in their place.

    Distribution:
        Everything in cross-replica context, on every worker.
    """

    def __init__(
        self, folder: str | os.PathLike, model: Any, flavour: Flavour, with_weights: bool
    ) -> None:
        self._backup = Backup(folder, is_chief(model.distribute_strategy))
        self._model = model
        self._flavour = flavour
        self._with_weights = with_weights
        self._record: dict[str, Any] = {}
        self._updates_before: int | None = None
        self._updates_per_epoch: int | None = None

    def open(self) -> None:
        """Make the folder, and hold it. See `Backup.open`."""
        self._backup.open()

    def close(self) -> None:
        """Let go of the folder, and of nothing in it."""
        self._backup.close()

    def remove(self) -> None:
        """Remove what is saved, and let go of the folder."""
        self._backup.remove()

    def __str__(self) -> str:
        """Say which folder it is, and what is in it."""
        there = ", ".join(map(str, self._backup.epochs)) or "none"
        return f"{self._backup.folder!r}, which has it as it was after these epochs: {there}"

    def resume(self, epoch: int, plan: Plan, average: ModelAverage) -> Resumed | None:
        """Take up what was saved before an epoch.

        Args:
            epoch: The epoch with which the run goes on: as many are over.
            plan: Its plan, as far as it is known.
            average: Gets the average that was saved.

        Returns:
            What there was; None if there is nothing.

        Raises:
            ValueError: What was saved is of another configuration.
        """
        later = [e for e in self._backup.epochs if e > epoch + 1]
        if later and not plan.snapshots(0, epoch):
            warnings.warn(
                f"`backup_dir`, {self._backup.folder!r}, has the average of an earlier run, as it "
                f"was after epoch {later[-1]}. This run begins with epoch {epoch + 1}, and "
                "overwrites it.",
                stacklevel=3,
            )
        found = self._backup.newest(epoch, _configuration(plan), average.layout) if epoch else None
        if not found:
            return None
        over, self._record = found
        record = self._record
        updates = self._flavour.updates(self._model)
        if record["layout"]:
            # The weights of a model that is further on than what was saved are the right ones.
            at_its_end = over == epoch and updates in (None, 0, record["updates"])
            self._backup.restore(over, self._buffers(average, self._with_weights and at_its_end))
        optimizers = self._flavour.step_optimizers(self._model)
        stopped = [name for name, rate in optimizers.read().items() if rate == 0.0]
        # Saved within the BN pass.
        optimizers.write({name: record["rates"].get(name) or None for name in stopped})
        self._updates_per_epoch = record["updates_per_epoch"]
        plan = replace(plan, steps=plan.steps or record["steps"])
        if record["stopped"] and epoch < plan.epochs:
            # A BN pass that was over when the kill came is done once more.
            plan = plan.stopped_after(epoch - 1)
        progress = Progress(**{f.name: record[f.name] for f in fields(Progress)})
        return Resumed(over, plan, progress, record["initial_rates"])

    def is_at_end_of_epoch(self, epoch: int, over: int) -> bool:
        """Whether a model that was resumed is at the end of an epoch, for all that is known.

        Args:
            epoch: Epochs that are over.
            over: Epochs that were over when the run was saved.
        """
        if not self._record:
            return False
        if self._with_weights and epoch in self._backup.epochs:
            # A state that is damaged had the weights. Whoever saved the model found the average.
            return False
        now, then = self._flavour.updates(self._model), self._record["updates"]
        # Without an optimizer, or with a new one, there is no telling.
        return (
            not now
            or then is None
            or self._updates_per_epoch is None
            or now - then == self._updates_per_epoch * (epoch - over)
        )

    def begin_epoch(self) -> None:
        """Remember where an epoch began: later, that tells its end from its middle."""
        self._updates_before = self._flavour.updates(self._model)

    def end_epoch(self) -> None:
        """Learn how often the optimizer changes the model in an epoch. A BN pass does not tell."""
        updates = self._flavour.updates(self._model)
        if updates and self._updates_before is not None:
            self._updates_per_epoch = updates - self._updates_before or self._updates_per_epoch

    def is_up_to_date(
        self, plan: Plan, progress: Progress, initial_rates: Mapping[str, float | None]
    ) -> bool:
        """Whether there is nothing new to save."""
        content = self._content(plan, progress, initial_rates)
        if self._with_weights:  # which change with every update
            content["updates"] = self._flavour.updates(self._model)
        return bool(self._record) and content.items() <= self._record.items()

    def save(
        self,
        epoch: int,
        plan: Plan,
        progress: Progress,
        initial_rates: Mapping[str, float | None],
        average: ModelAverage,
    ) -> None:
        """Save the end of an epoch. The model must have its trained weights.

        Args:
            epoch: Epochs that are over.
            plan: The run's plan, with what was learned of it.
            progress: How far it has come.
            initial_rates: See `Resumed`.
            average: Its average.

        Raises:
            BackupError: See `Backup.save`.
        """
        record = {
            **self._content(plan, progress, initial_rates),
            "updates": self._flavour.updates(self._model),
            "updates_per_epoch": self._updates_per_epoch,
            "rates": self._flavour.step_optimizers(self._model).settable,
            "configuration": _configuration(plan),
            # Before the first snapshot it may change.
            "layout": average.layout if progress.n_averaged else {},
        }
        self._backup.save(epoch, self._buffers(average, self._with_weights), record)
        self._record = record

    def _content(
        self, plan: Plan, progress: Progress, initial_rates: Mapping[str, float | None]
    ) -> dict[str, Any]:
        return {**asdict(progress), "initial_rates": dict(initial_rates), "steps": plan.steps}

    def _buffers(self, average: ModelAverage, with_weights: bool) -> dict[str, Any]:
        if not with_weights:
            return average.buffers
        layers = self._flavour.live_batch_norm(self._model)
        statistics = [v for layer in layers for v in layer.variables]
        return {**average.buffers, "trained": [*trainable_variables(self._model), *statistics]}


def _configuration(plan: Plan) -> dict[str, Any]:
    """Return what must be the same in a run that goes on."""
    arguments = plan.arguments
    return {
        "start_epoch": plan.start_epoch,
        "lr_schedule": arguments.lr_schedule,
        **{
            name: rate if isinstance(rate, str) else float(rate)
            for name, rate in (("swa_lr", arguments.swa_lr), ("swa_lr2", arguments.swa_lr2))
        },
        "swa_freq": plan.swa_freq,
        "validate_average": arguments.validate_average,
    }
