"""One `fit` with SWA: what happens at its hooks, in the order in which training calls them."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from swa_dist.backup import BackupError
from swa_dist.batch_size import CountingTrainFunction
from swa_dist.bn_pass import BatchNormPass, describe_unobserved
from swa_dist.flavour import Flavour
from swa_dist.model_average import ModelAverage
from swa_dist.optimizers import StepOptimizers
from swa_dist.plan import Arguments, Plan, listed
from swa_dist.replicas import built_trainable_variables, check_strategy, trainable_variables
from swa_dist.saved_run import Progress, SavedRun
from swa_dist.train_function import before_training, before_writing

_FINAL = "final model weights set to stochastic weight average"


@dataclass(frozen=True)
class Beginning:
    """What a model's optimizers were before any callback's `on_train_begin`.

    There, BackupAndRestore sets the learning rate that a run had when it was interrupted.

    Attributes:
        rates: Learning rates, by the optimizers' names; None where it cannot be set.
        updates: How often each had changed weights; None if it does not count.
    """

    rates: Mapping[str, float | None]
    updates: Mapping[str, int | None]

    @classmethod
    def of(cls, optimizers: StepOptimizers) -> "Beginning":
        """Return that of some optimizers."""
        return cls(optimizers.settable, optimizers.updates)


class Run:
    """One `fit`, from `on_train_begin` on. If an exception ends it, nothing tells of that.

    Args:
        arguments: The callback's.
        model: The model that is trained.
        params: What Keras tells callbacks of the `fit`: `epochs`, and `steps` if they are known.
        flavour: The model's Keras version.
        beginning: What the model's optimizers were before.

    Attributes:
        progress: How far it has come.
        plan: What it will be, as far as it is known.
        epoch: The epoch that runs, counted from 0; None before the first.

    Raises:
        ValueError: The model cannot be averaged, or the plan does not suit it.
        OSError: `backup_dir` cannot be used.
    """

    def __init__(
        self,
        arguments: Arguments,
        model: Any,
        params: Mapping[str, Any],
        flavour: Flavour,
        beginning: Beginning,
    ) -> None:
        self._arguments = arguments
        self._model = model
        self._flavour = flavour
        # `fit` builds a model that has no weights yet in its first step. To go on with an average
        # that was saved, it takes the weights before.
        if model.built or arguments.backup_dir is not None:
            built_trainable_variables(model)
        check_strategy(model.distribute_strategy, trainable_variables(model))

        self._optimizers = flavour.step_optimizers(model)
        now = self._optimizers.settable
        # A rate reads 0 where a BN pass was cut short; by now that has been undone.
        self._initial_rates = {name: beginning.rates.get(name) or now[name] for name in now}
        self._updates = beginning.updates
        self._steps = None if params.get("steps") is None else int(params["steps"])
        self._adopt(
            Plan(
                arguments,
                epochs=params["epochs"],
                has_bn=flavour.has_batch_norm(model),
                initial_rate=next(iter(self._initial_rates.values())),
                steps=self._steps,
            )
        )

        self._saved_run: SavedRun | None = None
        if arguments.backup_dir is not None:
            self._saved_run = SavedRun(
                arguments.backup_dir, model, flavour, arguments.validate_average
            )
            self._saved_run.open()
        self.progress = Progress()
        self.epoch: int | None = None
        self._is_first_step = True
        self._first_batch_of_execution = 0
        self._closed: int | None = None  # the last epoch of which the snapshot, if due, is taken
        self._shown: tuple[str, ...] | None = None  # the optimizers whose rates are in the logs
        self._average: ModelAverage | None = None
        self._weight_names: list[str] = []
        self._counts: CountingTrainFunction | None = None
        self._counted = 0  # batches before the epoch that runs
        self._steps_hold = self._steps is not None
        self._bn_pass: BatchNormPass | None = None
        self._carrying = contextlib.ExitStack()  # open while the model carries the average
        self._fingerprint: list[bytes] = []
        self._average_is_lost = False
        self._is_final = False  # whether the model has got the average for good
        if self.plan.has_bn:
            self._say_that_there_is_bn()

    # Hooks

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch; before the first of them, take up what was saved."""
        self._take_average_out()
        if self._is_final:
            self._warn_of_withdrawn_stop(epoch)
        if self.epoch is None:
            try:
                self._begin(epoch)
            except BaseException:
                self.close()
                raise
        elif not self._bn_pass:
            self._optimizers = self._flavour.step_optimizers(self._model)  # compiled anew?
            self._follow_weights()
        self.epoch = epoch
        if self._counts:
            self._counted = self._counts.batches
        if self._saved_run:
            self._saved_run.begin_epoch()
        if self.plan.is_start(epoch):
            self._say_of_epoch(epoch, "starting stochastic weight averaging")
        if not self.plan.is_bn_pass(epoch):
            self._set_learning_rates(epoch)
        elif self.progress.n_averaged:
            self._begin_bn_pass(epoch)

    def begin_batch(self, batch: int) -> None:
        """Set the learning rates, where they change within the epoch."""
        self._first_batch_of_execution = batch
        if self.epoch is None:
            return
        if self._closed == self.epoch and self._average_is_carried:
            self._take_average_out()
            self._warn(
                f"Epoch {self.epoch + 1} goes on after its end: its data has grown, or a callback "
                "has evaluated the model with SWA among the callbacks. The epoch's snapshot was "
                "taken before."
            )
        if self.plan.changes_within(self.epoch):
            self._set_learning_rates(self.epoch, batch)

    def end_batch(self, batch: int) -> None:
        """Have the final model ready for all that looks at it at the end of the last epoch."""
        if self.epoch is None:
            return
        if self._is_first_step:
            self._is_first_step = False
            if not self._bn_pass:
                self._follow_weights(after_first_step=True)
        if not self._bn_pass and not self._may_deliver(self.epoch):
            return
        done = self._flavour.last_batch(self._model, self._first_batch_of_execution, batch) + 1
        if self._bn_pass:
            # More batches may come nevertheless: the data may have grown.
            enough = self._arguments.bn_steps is not None and done >= self._arguments.bn_steps
            if enough or (self.plan.steps and done >= self.plan.steps):
                self._bn_pass.settle()
            if enough:
                self._model.stop_training = True
        elif self._steps and done >= self._steps and self._steps_hold:
            self._carry_average_after_training()

    def begin_test(self) -> None:
        """Have validation be of what it is to be of: the final model, or the average."""
        if self._bn_pass:
            self._bn_pass.finish()
        elif self.epoch is not None and (
            self._arguments.validate_average or self._may_deliver(self.epoch)
        ):
            self._carry_average_after_training()

    def end_epoch(self, epoch: int, logs: dict[str, Any] | None) -> None:
        """End an epoch: take its snapshot, show the learning rate, and save the average."""
        if self._bn_pass:
            self._bn_pass.finish()
        self._close_epoch()
        if logs is not None:
            for name, rate in self._rates_to_show().items():
                logs.setdefault(name, 0.0 if self._bn_pass else rate)
        self._follow_early_stop(epoch)
        saved = self._save_if_possible()
        if not self._is_last(epoch) or not self.progress.n_averaged:
            return
        if self._average_is_carried or (saved and not self.plan.has_bn):
            # No epoch comes that would exchange them back. What others put into the model at the
            # end of training, earlier weights or an optimizer's average, is not the average.
            self._take_average_out()
            if self.progress.n_averaged:
                self._model_average.copy_to_model()
                self._is_final = not self.plan.has_bn

    def end(self) -> None:
        """Leave the average in the model, and say what had to be done without."""
        self._take_average_out()
        if self._bn_pass and self._arguments.bn_steps:
            self._model.stop_training = bool(self.progress.stopped)
        was_over = self.epoch is None and self._saved_run is not None
        if was_over:  # it was interrupted after its last epoch
            self._begin(self.plan.epochs)
        if not self.progress.n_averaged:
            self._warn_of_no_snapshot()
        elif was_over and (not self.plan.has_bn or self._is_finished):
            self._model_average.weights.copy_to_model()
            self._say(_FINAL)
        else:
            # Again after a BN pass: an optimizer with `use_ema`, or a callback that restores
            # earlier weights, has just put others there.
            self._model_average.copy_to_model()
            if not self.plan.has_bn:
                self._say_of_epoch(self.plan.epochs, _FINAL)
            elif self._bn_pass and self._bn_pass.delivered:
                self._bn_pass.deliver_again()
                self._warn_of_unobserved(self._bn_pass.unobserved)
                if self._bn_pass.moved_weights:
                    self._warn_of_moved_weights()
            else:
                self._warn_of_no_bn_pass()
        self._leave_idle_optimizers()
        if self._saved_run:
            self._saved_run.remove()

    def close(self) -> None:
        """Let go of the folder, and of nothing in it."""
        if self._saved_run:
            self._saved_run.close()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the average in the model while open. See `SWA.averaged_weights`."""
        if not self.progress.n_averaged or self._average_is_lost:
            raise RuntimeError(
                "`averaged_weights` must be called after the first snapshot. Received: a call "
                + (
                    "after weights were restored while the average was in the model: it is lost."
                    if self._average_is_lost
                    else f"before the end of epoch {self.plan.first_snapshot}."
                )
            )
        average = self._model_average
        # The pass has statistics of its own for it. After an exception others may have written.
        is_there = self._bn_pass is not None and self._bn_pass.in_force
        is_there = is_there and average.weights.is_in_model
        with contextlib.nullcontext() if is_there else average.averaged():
            yield

    # The plan, and what it is made for

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self._plans = {}
        for name, rate in self._initial_rates.items():
            try:
                self._plans[name] = replace(plan, initial_rate=rate)
            except ValueError as error:
                if len(self._initial_rates) == 1:
                    raise
                raise ValueError(
                    f"{error} It is the model's `{name}`: a schedule sets the rates of all "
                    "optimizers that the training step may use."
                ) from error

    def _set_learning_rates(self, epoch: int, batch: int = 0) -> None:
        self._optimizers.write(
            {name: plan.learning_rate(epoch, batch) for name, plan in self._plans.items()}
        )

    @property
    def _used(self) -> list[str]:
        """Names of the optimizers that have changed weights, or may have."""
        now = self._optimizers.updates
        return [n for n, count in now.items() if count is None or count != self._updates.get(n)]

    def _rates_to_show(self) -> dict[str, float]:
        rates = self._optimizers.read()
        if self._shown is None and not self._bn_pass:
            # Once and for all: CSVLogger wants the same entries in each epoch.
            self._shown = tuple(n for n in self._used if n in rates)
        shown = [name for name in self._shown or () if name in rates] or list(rates)[:1]
        if not shown:
            return {}
        each = {f"learning_rate_{name}": rates[name] for name in shown} if len(shown) > 1 else {}
        return {"learning_rate": rates[shown[0]], **each}

    def _leave_idle_optimizers(self) -> None:
        """Give optimizers that the training step has never used the rates that they had."""
        if self._arguments.lr_schedule != "manual" and len(self._initial_rates) > 1:
            used = self._used
            self._optimizers.write({n: r for n, r in self._initial_rates.items() if n not in used})

    def _follow_weights(self, after_first_step: bool = False) -> None:
        """Average all weights there are now: some may have been built, or begun to train, since."""
        model = self._model
        # By `id`: variables compare by value.
        known = {id(v) for v in self._average.weights.weights} if self._average else set()
        new = [v for v in trainable_variables(model) if id(v) not in known]
        if new and self.progress.n_averaged:
            raise ValueError(
                "`trainable` must not change from False to True, and no weights may be added, once "
                f"SWA has taken a snapshot. Received: the weight {new[0].name!r}, which is not in "
                f"the {self.progress.n_averaged} snapshots. Change it before epoch "
                f"{self.plan.first_snapshot}, or between two calls of `fit`."
            )
        if new or not self._average:
            self._prepare_average()
        if new or after_first_step:
            self._follow_batch_norm(after_first_step)

    def _follow_batch_norm(self, after_first_step: bool) -> None:
        assert self.epoch is not None or not after_first_step
        has_bn = bool(self._flavour.live_batch_norm(self._model))
        if has_bn == self.plan.has_bn:
            return
        try:
            plan = replace(self.plan, has_bn=has_bn)
            plan.check_first_epoch(self.epoch or 0)
        except ValueError:
            if after_first_step:
                raise
            warnings.warn(
                "Batch normalization layers began to train when no epoch was left for their "
                "statistics. The average will have the average of the snapshots' moving "
                "statistics, which are not those of the averaged weights. For exact ones, call "
                "`update_bn(model, data)` after `fit`, or train for more epochs.",
                stacklevel=4,
            )
            return
        self._adopt(plan)
        if has_bn:
            self._say_that_there_is_bn()

    # Where a run begins

    def _begin(self, epoch: int) -> None:
        """Begin with an epoch, or behind the last: from the start, or where it was interrupted."""
        if trainable_variables(self._model):
            self._prepare_average()
        over, saved = 0, self._saved_run
        resumed = saved.resume(epoch, self.plan, self._model_average) if saved else None
        if resumed:
            over, self.progress = resumed.over, resumed.progress
            self._initial_rates.update(resumed.initial_rates)
            self._adopt(resumed.plan)
        if self.progress.n_averaged:
            self._say(f"Going on with the average of {self.progress.n_averaged} snapshots")
        missed = self.plan.snapshots(over, min(epoch, self.progress.stopped or epoch))
        if list(missed[:2]) == [epoch - 1] and saved and saved.is_at_end_of_epoch(epoch, over):
            # What saved the model did so before the callback, and the interruption came in between:
            # these are the weights.
            self._take_snapshot(epoch - 1)
            missed = missed[:0]
        if epoch >= self.plan.epochs:
            return
        if missed and saved:
            raise ValueError(
                f"`backup_dir` must have the average as it was before epoch {epoch + 1}. Received: "
                f"{saved}. But snapshots were due at the end of epoch {listed(missed)}. Go on with "
                "the weights of the end of an epoch that is there, and with its number as "
                "`initial_epoch`; or leave `backup_dir` out, and the average will have later "
                "snapshots only."
            )
        if not self.progress.n_averaged:
            self.plan.check_first_epoch(epoch)
        if epoch and not resumed:
            self._warn_of_what_is_unknown(epoch, missed)
        self._save(epoch)  # what cannot be saved now could not be saved later
        self._count()

    def _warn_of_what_is_unknown(self, epoch: int, missed: range) -> None:
        begins = f"Training begins with epoch {epoch + 1}: "
        remedy = "With `backup_dir`, from the first epoch on, {} for a run that is resumed."
        if missed:
            self._warn(
                f"{begins}the snapshots that were due at the end of epoch {listed(missed)} are not "
                f"in the average. {remedy.format('they are kept')}"
                + (
                    " With `validate_average`, a model that was saved at the end of one of these "
                    "epochs, by BackupAndRestore or ModelCheckpoint say, was saved with the "
                    "average in place of its trained weights: training then goes on from the "
                    "average. `backup_dir` keeps the trained weights, too."
                    if self._arguments.validate_average
                    else ""
                )
            )
        # An optimizer that has not changed anything yet was made for this `fit`, at its first rate.
        is_new = all(count == 0 for count in self._updates.values())
        if self.plan.needs_initial_rate(epoch) and not is_new:
            rate = next(iter(self._initial_rates.values()))
            self._warn(
                f"{begins}its learning rates are planned from the optimizer's present rate, "
                f"{rate:.4g}, as the initial one. If an earlier part of this run has lowered it, "
                "compile the model with the initial rate before `fit`. "
                + remedy.format("it is kept")
            )

    def _prepare_average(self) -> None:
        model = self._model
        check_strategy(model.distribute_strategy, trainable_variables(model))
        self._average = ModelAverage(model, self._flavour.live_batch_norm(model))
        self._weight_names = self._flavour.weight_names(model)  # later some may be frozen

    @property
    def _model_average(self) -> ModelAverage:
        assert self._average, "The model has weights by now."
        return self._average

    def _count(self) -> None:
        counts = self._model.train_function
        if not isinstance(counts, CountingTrainFunction):
            # `fit` has just made the one that is replaced, and not traced it yet.
            counts = CountingTrainFunction(self._model)
            counts.install()
        counts.reset()
        self._counts = counts

    # Snapshots

    def _close_epoch(self) -> None:
        """Do what is due when an epoch has trained: once, at its validation or at its end."""
        assert self.epoch is not None
        if self._closed == self.epoch:
            return
        self._closed = self.epoch
        if self.plan.is_snapshot(self.epoch):
            if not self.progress.n_averaged:
                self._follow_weights()
            self._take_snapshot(self.epoch)
        self._learn_from_counts()

    def _take_snapshot(self, epoch: int) -> None:
        average = self._model_average
        if average.update():
            self.progress = replace(self.progress, n_averaged=self.progress.n_averaged + 1)
            return
        self.progress = replace(self.progress, not_finite=self.progress.not_finite + 1)
        cause = (
            "a batch had fewer samples than there are replicas, and training on none makes NaN; "
            "choose batches that reach every replica"
            if self._flavour.is_keras_3 and self._counts and self._counts.empty_shares
            else "training has diverged; lower the learning rate, or clip the gradients"
        )
        first = average.weights.first_non_finite()
        self._warn(
            f"The weights at the end of epoch {epoch + 1} are not finite, and do not enter the "
            f"average, which has {self.progress.n_averaged} snapshots. The first such weight is "
            f"{self._weight_names[first or 0]!r}. Likely cause: {cause}."
        )

    def _learn_from_counts(self) -> None:
        assert self._counts
        knew_nothing = self.progress.batch_size is None
        batch_size = self._counts.largest_batch or None
        self.progress = replace(self.progress, batch_size=batch_size)
        if self._counts.batches - self._counted != self._steps:
            self._steps_hold = False
        if self.plan.steps is None:
            self._adopt(replace(self.plan, steps=self._counts.batches or None))
        given = self._arguments.batch_size
        if knew_nothing and given is not None and batch_size not in (None, given):
            self._warn(
                f"`batch_size`={given} was given to SWA, but training feeds global batches of "
                f"{batch_size}. SWA goes by what it is fed; leave `batch_size` out."
            )

    # The end of training, and the average in the model before it

    def _is_last(self, epoch: int) -> bool:
        return self._model.stop_training or epoch + 1 == self.plan.epochs

    def _may_deliver(self, epoch: int) -> bool:
        """Whether the model is to have the average as soon as this epoch has trained."""
        return not self.plan.has_bn and self._is_last(epoch)

    def _follow_early_stop(self, epoch: int) -> None:
        if self.plan.is_bn_pass(epoch):
            if self.progress.stopped:
                self._model.stop_training = True
        elif self._model.stop_training and self.plan.has_bn and self.progress.n_averaged:
            self._adopt(self.plan.stopped_after(epoch))
            self.progress = replace(self.progress, stopped=epoch + 1)
            self._model.stop_training = False

    @property
    def _average_is_carried(self) -> bool:
        return self._average is not None and self._average.weights.swapped

    def _carry_average_after_training(self) -> None:
        """Take the epoch's snapshot, and have the model carry the average until it trains again."""
        self._close_epoch()
        if not self.progress.n_averaged or self._average_is_lost or self._average_is_carried:
            return
        # What saves the model at the end of the epoch saves the average: what training goes on
        # with is to be saved before, and the average as the swap will leave it.
        self._model_average.weights.settle()
        if self._save_if_possible() or self._arguments.validate_average:
            self._carry_average()

    def _carry_average(self) -> None:
        """Put the average into the model, until it trains again or other weights are written.

        What is written then is what training goes on from, with or without this run.
        """
        average = self._model_average
        average.swap_in()
        self._fingerprint = average.fingerprint()
        # Not a context manager that an exception would leave open for the garbage collector.
        self._carrying.enter_context(before_training(self._model, self._before_training))
        self._carrying.enter_context(
            before_writing(self._model, average.variables, self._take_average_out)
        )

    def _take_average_out(self) -> None:
        """Give the model what it had before `_carry_average`, if it still carries the average."""
        self._carrying.close()
        if self._average_is_lost:
            self._begin_average_anew()
        elif self._average:
            self._average.swap_out()

    def _before_training(self) -> None:
        """Give it back before training, unless weights were restored past all that is watched."""
        if self._model_average.fingerprint() == self._fingerprint:
            self._take_average_out()
        else:
            self._carrying.close()
            self._average_is_lost = True

    def _begin_average_anew(self) -> None:
        self._average_is_lost = False
        lost = self.progress.n_averaged
        self._prepare_average()
        self.progress = replace(self.progress, n_averaged=0)
        self._warn(
            f"The average of {lost} snapshots is lost: weights were restored, and trained, while "
            "the model carried the average for validation. Later snapshots begin a new one. "
            "Restore weights with the model's `load_weights` or `set_weights`, which SWA notices."
        )

    def _warn_of_withdrawn_stop(self, epoch: int) -> None:
        self._is_final = False
        self._warn(
            f"Training goes on with epoch {epoch + 1}, from the average: `stop_training` was set "
            "when SWA gave it to the model, and a callback after SWA has withdrawn it. Put that "
            "callback before SWA."
        )

    # The BN pass

    def _begin_bn_pass(self, epoch: int) -> None:
        model, average = self._model, self._model_average
        average.copy_to_model()
        self._say_of_epoch(epoch, _FINAL)
        self._say_of_epoch(epoch, "reinitializing batch normalization layers")
        self._bn_pass = BatchNormPass(
            model,
            layers=self._flavour.live_batch_norm(model),
            optimizers=list(self._flavour.optimizers(model).values()),
            learning_rates=self._optimizers,
            average=average.weights,
            untraced=self._flavour.untraced(model),
        )
        self._bn_pass.begin()
        self._say_of_epoch(epoch, "running forward pass to adjust batch normalization")

    @property
    def _is_finished(self) -> bool:
        """Whether the model comes out of a BN pass: with the average, and learning rates again."""
        rates = self._optimizers.read().values()
        return all(rates) and self._model_average.weights.is_in_model

    # What is saved

    def _save(self, epoch: int) -> None:
        saved = self._saved_run
        if not saved or saved.is_up_to_date(self.plan, self.progress, self._initial_rates):
            return
        carried = self._average_is_carried
        self._take_average_out()
        try:
            saved.save(epoch, self.plan, self.progress, self._initial_rates, self._model_average)
        finally:
            if carried:
                self._carry_average()

    def _save_if_possible(self) -> bool:
        """Save the end of the epoch that runs, if it is to be; return whether that has worked."""
        if not self._saved_run or self.epoch is None:
            return True
        self._saved_run.end_epoch()
        try:
            self._save(self.epoch + 1)
        except BackupError as error:
            # The training that is done is worth more than the chance of having to resume it.
            self._warn(
                f"The average at the end of epoch {self.epoch + 1} was not saved, and training "
                f"goes on: {error}"
            )
            return False
        return True

    # What is said

    @property
    def _end(self) -> str:
        return "before its first epoch" if self.epoch is None else f"with epoch {self.epoch + 1}"

    def _warn_of_no_snapshot(self) -> None:
        self._warn(
            "The model keeps the weights that it has: "
            + (
                "no snapshot was finite."
                if self.progress.not_finite
                else f"training ended {self._end}, and SWA would have taken its first snapshot at "
                f"the end of epoch {self.plan.first_snapshot}."
            )
        )

    def _warn_of_unobserved(self, layers: list[Any]) -> None:
        if layers:
            self._warn(
                f"{describe_unobserved(layers)} Until then they hold the average of the snapshots' "
                "moving statistics."
            )

    def _warn_of_moved_weights(self) -> None:
        self._warn(
            "The training step changes weights by other means than the optimizers that SWA finds, "
            "as sharpness-aware minimization and adversarial perturbations of weights do. It did "
            "so in the BN pass, too: the batch normalization statistics are partly those of other "
            "weights than the average. For exact ones, call `update_bn(model, data)` after `fit`."
        )

    def _warn_of_no_bn_pass(self) -> None:
        if self._bn_pass:
            why = "there was no data in the BN pass, or the model was trained in the midst of it"
            remedy = "let `fit` have data for one more epoch after the last snapshot"
        else:
            why = (
                f"training ended {self._end}, and the BN pass would have been the epoch after. "
                "Either a callback that stands after SWA in the list set `stop_training`, or the "
                "data ran out"
            )
            remedy = "put such a callback before SWA, or let `fit` have data for every epoch"
        self._warn(
            f"The batch normalization statistics were not recomputed: {why}. The model holds the "
            f"average of {self.progress.n_averaged} snapshots, and of their moving statistics, "
            f"which are not those of the averaged weights. For exact ones, {remedy}."
        )

    def _warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=4)

    def _say_that_there_is_bn(self) -> None:
        self._say(
            "Model uses batch normalization. SWA will require last epoch to be a forward pass "
            "and will run with no learning rate"
        )

    def _say_of_epoch(self, epoch: int, what: str) -> None:
        self._say(f"Epoch {epoch + 1:05d}: {what}")

    def _say(self, line: str) -> None:
        if self._arguments.verbose:
            print("\n" + line)
