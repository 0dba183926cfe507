"""The state of a run: its plan, its progress and its average, and all that changes them."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from swa_dist.averaging.snapshots import Snapshots
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


class RunState:
    """The state of one `fit`. Plan and progress are replaced here, and nowhere else.

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
        rates: The learning rates of the model's optimizers.
        snapshots: The average, and the weights that it is of.
        declared_steps: The steps per epoch that `fit` has declared, while epochs have had as many;
            else None.

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
        self.declared_steps: int | None = params.get("steps") and int(params["steps"])
        has_bn = keras_api.has_batch_norm(model)
        # Each optimizer has a plan of its own, with its rate.
        self._adopt(Plan.of(options, params["epochs"], self.declared_steps, None, has_bn))
        self.progress = Progress()
        self.snapshots = Snapshots(model, keras_api)
        self._counter: SampleCounter | None = None
        self._batches_before_epoch = 0

    @property
    def n_averaged(self) -> int:
        """Snapshots in the average."""
        return self.progress.n_averaged

    def resume(self, start: Start) -> None:
        """Take up what an earlier part of the run had learned."""
        self.progress = start.progress
        self.rates.initial.update(start.initial_rates)
        self._adopt(start.plan)

    def begin_counting(self) -> None:
        """Have the training step count what it is fed."""
        self._counter = SampleCounter.install_in(self.model)

    def begin_epoch(self) -> None:
        """Remember what was counted before the epoch."""
        if self._counter:
            self._batches_before_epoch = self._counter.batches

    def learn_from_counts(self) -> None:
        """Learn the batch size and the steps per epoch from what the training step has counted."""
        assert self._counter
        known, fed = self.progress.batch_size, self._counter.largest_batch or None
        self.progress = replace(self.progress, batch_size=fed)
        batches = self._counter.batches
        # The last execution of several steps may have more of them than were declared.
        surplus = batches - self._batches_before_epoch - (self.declared_steps or 0)
        if not 0 <= surplus < self.keras_api.steps_per_execution(self.model):
            self.declared_steps = None
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
        empty = (
            self.keras_api.is_keras_3 and self._counter and self._counter.batches_with_empty_replica
        )
        self.warn(messages.not_finite(epoch, n_averaged, name, bool(empty)))

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
