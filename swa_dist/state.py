"""The state of a run: its plan, its progress and its average, and all that changes them."""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from swa_dist.averaging.snapshots import Snapshots
from swa_dist.batch_norm.bn_pass import BatchNormPass
from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import (
    check_strategy,
    check_trainable_variables,
    trainable_variables,
)
from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning
from swa_dist.plan.options import Options
from swa_dist.plan.plan import Plan
from swa_dist.plan.progress import Progress
from swa_dist.protocols import Model
from swa_dist.resume.start import Start
from swa_dist.training.learning_rates import InitialOptimizers, PlannedLearningRates
from swa_dist.training.sample_counter import SampleCounter


@dataclass(frozen=True)
class Position:
    """Where training is.

    Attributes:
        epoch: The epoch, counted from 0; None before the first.
        is_closed: Whether the epoch has trained, and its snapshot has been taken if it was due.
        has_stepped: Whether a first step has been made.
        is_last_batch: Whether the model is to have the average after the batch that is trained.
        average_is_final: Whether the model has the average for good, unless training continues.
        bn_pass: The BN pass, once it has begun.
        declared_steps: The steps per epoch that `fit` has declared, while epochs have had as many;
            else None.
        steps_per_execution: Steps that a call of the train function runs, once it was asked for in
            this epoch.
        batches_before: Batches that were counted before the epoch.
    """

    epoch: int | None = None
    is_closed: bool = False
    has_stepped: bool = False
    is_last_batch: bool = False
    average_is_final: bool = False
    bn_pass: BatchNormPass | None = None
    declared_steps: int | None = None
    steps_per_execution: int | None = None
    batches_before: int = 0


class RunState:
    """The state of one `fit`. Plan, progress and position are replaced here, and nowhere else.

    Args:
        options: The callback's options.
        model: The model that is trained.
        params: What Keras tells callbacks of the `fit`: `epochs`, and `steps` if they are known.
        keras_api: The model's Keras version.
        before: What the model's optimizers were before.

    Attributes:
        options: The callback's options.
        model: The model that is trained.
        keras_api: The model's Keras version.
        plan: What the run will be, as far as it is known.
        progress: How far it has come.
        position: Where training is.
        rates: The learning rates of the model's optimizers.
        snapshots: The average, and the weights that it is of.

    Raises:
        ValueError: The model cannot be averaged, or the options do not suit it.
    """

    def __init__(
        self,
        options: Options,
        model: Model,
        params: Mapping[str, Any],
        keras_api: KerasAPI,
        before: InitialOptimizers,
    ) -> None:
        self.options, self.model, self.keras_api = options, model, keras_api
        # `fit` builds a model without weights in its first step. To resume, they must be there.
        if keras_api.has_all_weights(model) or options.backup_dir is not None:
            check_trainable_variables(model)
        check_strategy(model.distribute_strategy, trainable_variables(model))
        self.rates = PlannedLearningRates(options, keras_api.step_optimizers(model), before)
        self.position = Position(declared_steps=params.get("steps") and int(params["steps"]))
        has_bn = keras_api.has_batch_norm(model)
        # Each optimizer has a plan of its own, with its rate.
        self._adopt(Plan.of(options, params["epochs"], self.position.declared_steps, None, has_bn))
        self.progress = Progress()
        self.snapshots = Snapshots(model, keras_api)

    @property
    def n_averaged(self) -> int:
        """Snapshots in the average."""
        return self.progress.n_averaged

    def resume(self, start: Start) -> None:
        """Take up what an earlier part of the run had learned."""
        self.progress = start.progress
        self.rates.initial.update(start.initial_rates)
        self._adopt(start.plan)

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self.move(
            epoch=epoch,
            is_closed=False,
            average_is_final=False,
            steps_per_execution=None,
            batches_before=self._counter.batches,
        )

    def move(self, **changes: Any) -> None:
        """Change where training is: see `Position`."""
        self.position = replace(self.position, **changes)

    def learn_from_counts(self) -> None:
        """Learn the batch size and the steps per epoch from what the training step has counted."""
        known, fed = self.progress.batch_size, self._counter.largest_batch or None
        self.progress = replace(self.progress, batch_size=fed)
        batches = self._counter.batches
        # The last execution of several steps may have more of them than were declared.
        surplus = batches - self.position.batches_before - (self.position.declared_steps or 0)
        if not 0 <= surplus < self.keras_api.steps_per_execution(self.model):
            self.move(declared_steps=None)
        if self.plan.steps_per_epoch is None:
            self._adopt(replace(self.plan, steps_per_epoch=batches or None))
        given = self.options.batch_size
        if known is None and given is not None and fed not in (None, given):
            self.warn(messages.other_batch_size(given, fed))

    def take_snapshot(self, epoch: int) -> None:
        """Take the snapshot of an epoch, if the weights are finite."""
        name, n_averaged = self.snapshots.take(), self.n_averaged
        if name is None:
            self.progress = replace(self.progress, n_averaged=n_averaged + 1)
            return
        self.progress = replace(self.progress, not_finite=self.progress.not_finite + 1)
        # Keras 3 trains a replica without samples to NaN.
        has_trained = self.keras_api.is_keras_3 and self.position.epoch is not None
        empty = has_trained and bool(self._counter.batches_with_empty_replica)
        self.warn(messages.not_finite(epoch, n_averaged, name, empty))

    def follow_weights(self, epoch: int, after_first_step: bool = False) -> None:
        """Have the average comprise weights that have been built, or begun to train, since.

        Args:
            epoch: The epoch that begins, runs or ends.
            after_first_step: Whether the model may just have been built, and may still be refused.

        Raises:
            ValueError: There are weights that are not in the snapshots; or, after the first step,
                no snapshot fits into the run.
        """
        new = self.snapshots.new_weights()
        if new and self.n_averaged:
            first = self.plan.first_snapshot
            raise ValueError(messages.weights_added(new[0], self.n_averaged, first))
        if new or not self.snapshots.has_average:
            self.snapshots.prepare()
        if new or after_first_step:
            self._follow_batch_norm(epoch, may_refuse=after_first_step)

    def stop_after(self, epoch: int) -> None:
        """Plan the end of a run that was stopped with an epoch: the next one is the BN pass."""
        self._adopt(self.plan.stopped_after(epoch))
        self.progress = replace(self.progress, stopped=epoch + 1)

    def note_final_statistics(self, has_statistics: bool) -> None:
        """Remember which BN statistics the BN pass has ended with, if it has any."""
        if has_statistics:
            statistics = self.snapshots.average.statistics_of_model
            self.progress = replace(self.progress, final_statistics=statistics)

    def end_carrying(self) -> None:
        """Give the model its own weights back, if it carries the average."""
        if self.snapshots.end_carrying():
            self.warn(messages.average_lost(self.n_averaged))
            self.progress = replace(self.progress, n_averaged=0)

    def warn(self, message: str) -> None:
        """Warn of something, also if `verbose` is 0."""
        warnings.warn(message, SWAWarning, stacklevel=5)

    def print(self, line: str) -> None:
        """Print a line if `verbose` asks for it."""
        if self.options.verbose:
            print("\n" + line)

    @functools.cached_property
    def _counter(self) -> SampleCounter:
        """Counts what the training step is fed, from the first use of this on."""
        return SampleCounter.install_in(self.model)

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.rates.follow(plan)

    def _follow_batch_norm(self, epoch: int, may_refuse: bool) -> None:
        has_bn = bool(self.keras_api.trainable_batch_norm(self.model))
        if has_bn == self.plan.batch_norm:
            return
        try:
            plan = replace(self.plan, batch_norm=has_bn)
            plan.check_first_epoch(epoch)
        except ValueError:
            if may_refuse:
                raise
            self.warn(messages.batch_norm_too_late())
            return
        self._adopt(plan)
        if has_bn:
            self.print(messages.HAS_BATCH_NORM)
