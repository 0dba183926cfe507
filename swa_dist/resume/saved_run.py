"""What is saved of a run beside its model, and how it is resumed from that."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from swa_dist.averaging.model_average import ModelAverage
from swa_dist.averaging.snapshots import Snapshots
from swa_dist.distribution import is_chief
from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import trainable_variables
from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning
from swa_dist.plan.options import Options
from swa_dist.plan.plan import Plan
from swa_dist.plan.progress import Progress
from swa_dist.protocols import Model
from swa_dist.resume.checkpoints import Checkpoints
from swa_dist.training.learning_rates import PlannedLearningRates


@dataclass(frozen=True)
class Resumed:
    """What an interrupted run had come to when it was saved.

    Attributes:
        completed_epochs: Completed epochs.
        plan: Its plan, with what it had learned.
        progress: How far it had come.
        initial_rates: Learning rates before its first epoch, by the optimizers' names.
    """

    completed_epochs: int
    plan: Plan
    progress: Progress
    initial_rates: Mapping[str, float | None]


class SavedRun:
    """A run in a folder: its average, its progress, and its configuration.

    Args:
        folder: See `Checkpoints`.
        model: The model that is trained.
        keras_api: Its Keras version.
        with_weights: Whether trained weights and BN statistics are saved, too: the model may be
            saved elsewhere with the average in their place.
        ema_momentum: See `SWA`.
        bn_data: Whether BN statistics come from data of the user's own.

    Distribution:
        Everything in cross-replica context, on every worker.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: Model,
        keras_api: KerasAPI,
        with_weights: bool,
        ema_momentum: float | None,
        bn_data: bool,
    ) -> None:
        self._checkpoints = Checkpoints(folder, is_chief(model.distribute_strategy))
        self._model = model
        self._keras_api = keras_api
        self._with_weights = with_weights
        self._ema_momentum, self._bn_data = ema_momentum, bn_data
        self._record: dict[str, Any] = {}
        self._saved_epoch: int | None = None
        self._updates_before_epoch: int | None = None
        self._updates_per_epoch: int | None = None

    @classmethod
    def open(cls, options: Options, model: Model, keras_api: KerasAPI) -> "SavedRun | None":
        """Create and lock the folder that the options name, if they do. See `Checkpoints.open`."""
        if options.backup_dir is None:
            return None
        saved = cls(
            *(options.backup_dir, model, keras_api, options.validate_average),
            *(options.ema_momentum, options.bn_data is not None),
        )
        saved._checkpoints.open()
        return saved

    def close(self) -> None:
        """Release the folder, and keep what is in it."""
        self._checkpoints.close()

    def remove(self) -> None:
        """Remove what is saved, and release the folder."""
        self._checkpoints.remove()

    def __str__(self) -> str:
        """Return which folder it is, and what is in it."""
        there = ", ".join(map(str, self._checkpoints.epochs)) or "none"
        return f"{self._checkpoints.folder!r}, which has it as it was after these epochs: {there}"

    def resume(self, epoch: int, plan: Plan, average: ModelAverage) -> Resumed | None:
        """Restore what was saved no later than an epoch.

        Args:
            epoch: The epoch at which the run is resumed, which is the number of completed ones.
            plan: Its plan, as far as it is known.
            average: Gets the average that was saved.

        Returns:
            What there was; None if there is nothing.

        Raises:
            ValueError: It is of another configuration.
        """
        checkpoints = self._checkpoints
        later = [e for e in checkpoints.epochs if e > epoch + 1]
        if later and not plan.snapshot_epochs(0, epoch):
            message = messages.earlier_run_overwritten(checkpoints.folder, later[-1], epoch)
            warnings.warn(message, SWAWarning, stacklevel=3)
        if not epoch:
            return None
        found = checkpoints.newest(epoch, self._configuration(plan), average.layout)
        if not found:
            return None
        saved_epoch, self._record = found
        record = self._record
        steps = self._keras_api.update_count(self._model)
        if record["layout"]:
            # If the model is further on than what was saved, its weights are the right ones.
            same = saved_epoch == epoch and steps in (None, 0, record["update_count"])
            with_weights = self._with_weights and same
            checkpoints.restore(saved_epoch, self._buffers(average, with_weights))
        optimizers = self._keras_api.step_optimizers(self._model)
        zero = [name for name, rate in optimizers.read_rates().items() if rate == 0.0]
        # The model was saved within the BN pass.
        optimizers.write_rates({name: record["rates"].get(name) or None for name in zero})
        self._updates_per_epoch = record["updates_per_epoch"]
        plan = replace(plan, steps_per_epoch=plan.steps_per_epoch or record["steps_per_epoch"])
        if record["stopped"] and epoch < plan.epochs:
            # A BN pass that was already finished when the run was interrupted is repeated.
            plan = plan.stopped_after(epoch - 1)
        progress = Progress(**{f.name: record[f.name] for f in fields(Progress)})
        return Resumed(saved_epoch, plan, progress, record["initial_rates"])

    def is_at_end_of_epoch(self, epoch: int, saved_epoch: int) -> bool:
        """Return whether a resumed model is at the end of an epoch, as far as can be known.

        Args:
            epoch: Completed epochs.
            saved_epoch: Completed epochs when the run was saved.
        """
        if not self._record:
            return False
        if self._with_weights and epoch in self._checkpoints.epochs:
            # A damaged checkpoint had the weights. The model was saved with the average.
            return False
        now, then = self._keras_api.update_count(self._model), self._record["update_count"]
        # Without an optimizer, or with a new one, it cannot be known.
        return (
            not now
            or then is None
            or self._updates_per_epoch is None
            or now - then == self._updates_per_epoch * (epoch - saved_epoch)
        )

    def begin_epoch(self) -> None:
        """Remember how often the optimizer had updated the model when an epoch began."""
        self._updates_before_epoch = self._keras_api.update_count(self._model)

    def end_epoch(self) -> None:
        """Count the optimizer's updates in the epoch. In a BN pass there are none."""
        steps = self._keras_api.update_count(self._model)
        if steps and self._updates_before_epoch is not None:
            self._updates_per_epoch = steps - self._updates_before_epoch or self._updates_per_epoch

    def save(
        self,
        completed: int,
        plan: Plan,
        progress: Progress,
        rates: PlannedLearningRates,
        snapshots: Snapshots,
    ) -> None:
        """Save a checkpoint of the end of an epoch, if there is anything new to save.

        The model has its trained weights meanwhile, and carries the average again afterwards.

        Args:
            completed: Completed epochs.
            plan: The run's plan, with what was learned.
            progress: How far it has come.
            rates: Its learning rates.
            snapshots: Its average.

        Raises:
            CheckpointError: See `Checkpoints.save`.
        """
        content = {
            **asdict(progress),
            "initial_rates": dict(rates.initial),
            "steps_per_epoch": plan.steps_per_epoch,
        }
        carried = snapshots.average_is_carried
        is_saved = self._record and content.items() <= self._record.items()
        # Weights, if they are saved, are new in each epoch; and once others are written into a
        # model that carries the average, it does so no more.
        if is_saved and (not self._with_weights or (carried and completed == self._saved_epoch)):
            return
        record = {
            **content,
            "update_count": self._keras_api.update_count(self._model),
            "updates_per_epoch": self._updates_per_epoch,
            "rates": rates.optimizers.settable_rates,
            "configuration": self._configuration(plan),
            # Before the first snapshot it may change.
            "layout": snapshots.average.layout if progress.n_averaged else {},
        }
        snapshots.end_carrying()
        average = snapshots.average
        try:
            self._checkpoints.save(completed, self._buffers(average, self._with_weights), record)
        finally:
            if carried:
                average.carry()
        self._record, self._saved_epoch = record, completed

    def _buffers(self, average: ModelAverage, with_weights: bool) -> dict[str, Any]:
        if not with_weights:
            return average.buffers
        layers = self._keras_api.trainable_batch_norm(self._model)
        statistics = [v for layer in layers for v in layer.variables]
        return {**average.buffers, "trained": [*trainable_variables(self._model), *statistics]}

    def _configuration(self, plan: Plan) -> dict[str, Any]:
        """Return what must be the same in a run that is resumed."""
        return {
            "start_epoch": plan.start_epoch,
            "lr_schedule": str(plan.lr_schedule),
            **{
                name: rate if isinstance(rate, str) else float(rate)
                for name, rate in (("swa_lr", plan.swa_lr), ("swa_lr2", plan.swa_lr2))
            },
            "swa_freq": plan.swa_freq,
            "snapshot_freq": plan.snapshot_steps or "epoch",
            "ema_momentum": self._ema_momentum and float(self._ema_momentum),
            "validate_average": self._with_weights,
            "bn_data": self._bn_data,
        }
