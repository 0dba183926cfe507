"""The state of a run: its plan, its progress and its average, and all that changes them."""

import contextlib
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from swa_dist.averaging.snapshots import Snapshots
from swa_dist.averaging.step_snapshots import StepSnapshots
from swa_dist.batch_norm.bn_pass import BatchNormPass
from swa_dist.data.inputs import check_inputs
from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import (
    check_strategy,
    check_trainable_variables,
    trainable_variables,
)
from swa_dist.plan import errors, messages
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
        has_recomputed: Whether the BN statistics of the average as it is have been recomputed from
            `bn_data`, in this epoch.
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
    has_recomputed: bool = False


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
        of_steps = self.plan.snapshot_steps is not None
        self.snapshots = Snapshots(model, keras_api, options.ema_momentum, of_steps)
        self._step_snapshots: StepSnapshots | None = None
        if options.bn_data is not None:
            check_inputs(options.bn_data, model)

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
            has_recomputed=False,
        )
        if self.progress.stopped and not self.plan.is_bn_pass(epoch):  # the stop was withdrawn
            self.progress = replace(self.progress, stopped=0)
        if self.plan.averages_steps(epoch):
            self._begin_step_snapshots()
        else:
            self.end_step_snapshots()

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
            # Too few for a snapshot by steps: it is too late for an error, and the end warns of it.
            with contextlib.suppress(ValueError):
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

    def note_steps(self) -> None:
        """Take up the snapshots that the training step has taken, if it takes any."""
        if not self._step_snapshots:
            return
        assert self.position.epoch is not None
        every, steps = self.plan.snapshot_steps or 1, self._step_snapshots.steps
        due = steps // every - self.progress.steps // every
        n_averaged = self.snapshots.note_steps(self.n_averaged)
        missing = due - (n_averaged - self.n_averaged)
        self.progress = replace(
            self.progress,
            steps=steps,
            n_averaged=n_averaged,
            not_finite=self.progress.not_finite + missing,
        )
        if missing:
            weight = self.snapshots.first_non_finite()
            epoch = self.position.epoch
            self.warn(messages.not_finite_steps(epoch, due, missing, n_averaged, weight))

    @property
    def snapshots_so_far(self) -> int:
        """Snapshots in the average, with those that `note_steps` has not taken up yet."""
        if not self._step_snapshots:
            return self.n_averaged
        return self.snapshots.average.weights.n_averaged

    def keep_step_snapshots(self) -> None:
        """Have the training step take snapshots again, if a callback has trained the model."""
        if self._step_snapshots and self.model.train_function is self._counter:
            self._step_snapshots.install()

    def end_step_snapshots(self) -> None:
        """Give the model its train function without snapshots back."""
        if self._step_snapshots:
            self._step_snapshots.uninstall()
            self._step_snapshots = None

    def follow_weights(self, epoch: int, after_first_step: bool = False) -> None:
        """Have the average comprise weights that have been built, or begun to train, since.

        Args:
            epoch: The epoch that begins, runs or ends.
            after_first_step: Whether the model may just have been built, and may still be refused.

        Raises:
            ValueError: There are weights that are not in the snapshots; or, after the first step,
                no snapshot fits into the run, or that step was to be averaged.
        """
        new = self.snapshots.new_weights()
        if new and after_first_step and self._step_snapshots:
            raise ValueError(errors.not_built())
        if new and self.n_averaged:
            first = self.plan.first_snapshot
            raise ValueError(errors.weights_added(new[0], self.n_averaged, first))
        if new or not self.snapshots.has_average:
            self.snapshots.prepare()
        if new or after_first_step:
            self._follow_batch_norm(epoch, may_refuse=after_first_step)

    def stop_after(self, epoch: int) -> None:
        """Plan the end of a run that was stopped with an epoch: the next one is the BN pass."""
        self._adopt(self.plan.stopped_after(epoch))
        self.note_stop(epoch)

    def note_stop(self, epoch: int) -> None:
        """Note that training was stopped with an epoch, for a run that is resumed."""
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

    def _begin_step_snapshots(self) -> None:
        if not self.snapshots.has_average:
            raise ValueError(errors.not_built())
        average, taker = self.snapshots.average.weights, self._step_snapshots
        if taker and taker.average is average and self.model.train_function is taker:
            return
        self.end_step_snapshots()
        self._step_snapshots = StepSnapshots(
            *(self.model, self._counter, average),
            every=self.plan.snapshot_steps or 1,
            steps=self.progress.steps,
        )
        self._step_snapshots.install()

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
            plan.check_first_epoch(epoch, self.progress.steps)
        except ValueError:
            if may_refuse:
                raise
            self.warn(messages.batch_norm_too_late())
            return
        self._adopt(plan)
        if plan.ends_with_bn_pass:
            self.print(messages.HAS_BATCH_NORM)
