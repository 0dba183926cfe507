"""The SWA callback, for any Keras: its hooks, in the order in which training calls them."""

import contextlib
import os
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from swa_dist.backup import BackupError
from swa_dist.batch_size import CountingTrainFunction
from swa_dist.bn_pass import BatchNormPass, describe_unobserved
from swa_dist.flavour import Flavour
from swa_dist.model_average import ModelAverage
from swa_dist.plan import Arguments, Plan, listed
from swa_dist.replicas import check_strategy, trainable_variables
from swa_dist.saved_run import Progress, SavedRun
from swa_dist.train_function import before_training

if TYPE_CHECKING:  # at run time a binding puts its Keras's Callback here

    class _Callback:
        model: Any
        params: dict[str, Any]

        def set_model(self, model: Any) -> None: ...

else:
    _Callback = object

_FINAL = "final model weights set to stochastic weight average"


class SWACallback(_Callback):
    """Stochastic weight averaging, exact on every replica of a `tf.distribute` strategy.

    After `fit` the model holds the mean of the trainable weights that it had at the ends of the
    averaged epochs, w_SWA = (w_1 + ... + w_n) / n. If it has batch normalization (BN) layers that
    train, the last epoch is a forward pass over the data (the BN pass) that recomputes their moving
    statistics for those weights, over all rows on all replicas.

    Args:
        start_epoch: Epoch, counted from 1, at whose end averaging may begin; or a float in (0, 1),
            the fraction of `epochs` that is over when it begins (0.75 of 60: epoch 46).
        lr_schedule: "manual" leaves the learning rate alone. "constant" keeps the initial rate for
            the first half of the way to `start_epoch`, lowers it linearly to `swa_lr` at 0.9 of the
            way, and keeps that. "cyclic" does the same until `start_epoch`; then the rate falls
            batch by batch from `swa_lr2` to `swa_lr` over `swa_freq` epochs, again and again
            (execution by execution where `steps_per_execution` is not 1).
        swa_lr: Learning rate > 0 while averaging; "auto": 0.1 of the initial rate.
        swa_lr2: Upper learning rate of a cycle, >= `swa_lr`; "auto": `swa_lr` + 0.25 (initial rate
            - `swa_lr`).
        swa_freq: Epochs from one snapshot to the next: the weights enter the average at the ends
            of the epochs `start_epoch` + k `swa_freq` - 1, k = 1, 2, ..., which are the ends of the
            cycles.
        batch_size: Global batch size, if you want to be warned when training feeds another. It is
            never needed.
        verbose: 1 prints a line when averaging begins and when the model takes the average.
        backup_dir: Folder in which the average is kept while `fit` runs, so that a run that was
            killed can go on with it. The model itself is resumed by other means:
            `BackupAndRestore`, or `initial_epoch` and saved weights. Several workers share the
            folder. It is removed when `fit` has finished.
        validate_average: Whether validation within `fit` is of the average, from the first
            snapshot on. From the beginning of an epoch's validation to that of the next epoch the
            model carries the average, with BN statistics averaged from the snapshots' own:
            callbacks that judge or save the model see it. Training goes on as it would have.
        bn_steps: Batches after which the BN pass ends; None: all of the epoch. A few thousand rows
            give near-optimal statistics (Wu & Johnson, 2021, arXiv 2105.07576, section 3).

    Attributes:
        n_averaged: Number of snapshots in the average.
        inferred_batch_size: Rows in the largest global batch that training was fed; None during
            the first epoch.

    Raises:
        ValueError: An argument, or the model's optimizer, does not allow what is asked. Raised at
            construction or at the beginning of `fit`, before the first batch.
        TypeError: The model belongs to another Keras.
        OSError: `backup_dir` cannot be written to, or another run uses it.

    Distribution:
        Works with `fit` under the model's strategy. Create the model under its `scope()`; the
        callback may be created anywhere.

    Example:
        >>> with tf.distribute.MirroredStrategy().scope():
        ...     model = build_model()
        ...     model.compile(optimizer="sgd", loss="mse")
        >>> model.fit(data, epochs=60, callbacks=[SWA(start_epoch=45)])

    Reference:
        Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging Weights Leads to Wider Optima
        and Better Generalization", 2018, arXiv 1803.05407, Algorithm 1.
    """

    flavour: ClassVar[Flavour]
    _average: Any  # a ModelAverage, while a `fit` runs
    _counts: Any  # a CountingTrainFunction, then
    _learning_rate: Any  # an OptimizerLearningRate, then
    _initial_rate: float | None
    _execution: int  # the first batch of the one that runs
    _closed: int | None  # the last epoch of which the snapshot, if it was due, is taken
    _plan: Plan

    # The parameters of each model's `fit` that is about to begin: they are one object for all
    # callbacks of a `fit`, and another one for each `fit`.
    _beginning: ClassVar[MutableMapping[Any, dict]] = WeakKeyDictionary()

    # What tf_keras asks of a callback that does not need logs as NumPy, so that it need not wait
    # for the device after each batch.
    _supports_tf_logs = True

    def __init__(
        self,
        start_epoch: int | float,
        lr_schedule: str = "manual",
        swa_lr: float | str = "auto",
        swa_lr2: float | str = "auto",
        swa_freq: int = 1,
        batch_size: int | None = None,
        verbose: int = 0,
        *,
        backup_dir: str | os.PathLike | None = None,
        validate_average: bool = False,
        bn_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.arguments = Arguments(
            *(start_epoch, lr_schedule, swa_lr, swa_lr2, swa_freq, batch_size, verbose),
            backup_dir=backup_dir,
            validate_average=validate_average,
            bn_steps=bn_steps,
        )
        # Here, as Keras 3 fails before it calls a callback for the first time.
        self.flavour.warn_of_several_workers()
        self._progress = Progress()
        self._epoch: int | None = None
        self._bn_pass: BatchNormPass | None = None
        self._saved_run: SavedRun | None = None
        self._average_in_model = contextlib.ExitStack()
        self._in_fit = False

    @property
    def n_averaged(self) -> int:
        """Number of snapshots in the average."""
        return self._progress.n_averaged

    @property
    def inferred_batch_size(self) -> int | None:
        """Rows in the largest global batch so far; None during the first epoch."""
        return self._progress.batch_size

    def plan(
        self,
        epochs: int,
        steps_per_epoch: int | None = None,
        learning_rate: float | None = None,
        batch_norm: bool = True,
    ) -> Plan:
        """Return what each epoch of a run will be, and which learning rates it will see.

        Args:
            epochs: Epochs of the run, as given to `fit`.
            steps_per_epoch: Batches in an epoch; needed only for the rates within a cycle.
            learning_rate: Learning rate of the optimizer before training. Without it, rates that
                depend on it are NaN, and printed as "?".
            batch_norm: Whether the model has batch normalization layers that train.

        Returns:
            A `Plan`: `print` shows it as a table, and its methods answer for a single epoch or
            batch, both counted from 0.

        Raises:
            ValueError: An argument is out of its range, or no snapshot fits into the run.

        Example:
            >>> print(SWA(45, "constant", swa_lr=0.01).plan(60, learning_rate=0.1))
        """
        return self.arguments.plan(epochs, steps_per_epoch, learning_rate, batch_norm)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the average in the model while open; afterwards all is bitwise as it was.

        For use while `fit` runs: in other callbacks, say. BN layers get the average of the
        statistics that they had at the snapshots; in the BN pass, the model has the average anyway.
        Within itself, and where `validate_average` has put the average there, it does nothing more.
        What is written into float32 or float64 weights meanwhile becomes the average; what is
        written into narrower ones and BN statistics is dropped.

        Raises:
            RuntimeError: `fit` is not running, or there is no snapshot yet.

        Distribution:
            In cross-replica context, on every worker.

        Example:
            >>> with swa.averaged_weights():
            ...     model.evaluate(test_data)
        """
        if not (self._in_fit and self.n_averaged):
            raise RuntimeError(
                "`averaged_weights` must be called while `fit` runs, after the first snapshot. "
                + (
                    f"Received: a call before the end of epoch {self._plan.first_snapshot}."
                    if self._in_fit
                    else "Received: a call outside of it. After `fit` the model holds the average."
                )
            )
        with contextlib.nullcontext() if self._bn_pass else self._average.averaged():
            yield

    def set_model(self, model: Any) -> None:
        self.flavour.check_model(model)
        super().set_model(model)
        # Before any `on_train_begin`: there, BackupAndRestore sets the rate that a run had when it
        # was interrupted.
        self._learning_rate = self.flavour.learning_rate(model)
        self._initial_rate = self._read_rate()

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        if self._beginning.get(model) is self.params:
            raise ValueError(
                "`callbacks` must hold one SWA: two in one `fit` would undo each other's work. "
                "Received: a second one."
            )
        self._beginning[model] = self.params
        check_strategy(model.distribute_strategy, trainable_variables(model))
        self._learning_rate = self.flavour.learning_rate(model)
        self._plan = Plan(
            self.arguments,
            epochs=self.params["epochs"],
            has_bn=bool(self.flavour.live_batch_norm(model)),
            # It reads 0 where a BN pass was cut short; by now that has been put back.
            initial_rate=self._initial_rate or self._read_rate(),
            steps=None if self.params.get("steps") is None else int(self.params["steps"]),
        )
        self._saved_run = None
        if self.arguments.backup_dir is not None:
            self._saved_run = SavedRun(
                self.arguments.backup_dir, model, self.flavour, self.arguments.validate_average
            )
            self._saved_run.open()
        self._progress = Progress()
        self._counts = self._closed = None
        self._epoch = None
        self._bn_pass = None
        self._in_fit = True
        if self._plan.has_bn:
            self._say(
                "Model uses batch normalization. SWA will require last epoch to be a forward pass "
                "and will run with no learning rate"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._check_in_fit()
        self._beginning.pop(self.model, None)
        self._average_in_model.close()
        if self._epoch is None:
            try:
                self._begin(epoch)
            except BaseException:
                if self._saved_run:
                    self._saved_run.close()
                raise
        elif not self._bn_pass:
            self._follow_changes()
        self._epoch = epoch
        if self._saved_run:
            self._saved_run.begin_epoch()
        if self._plan.is_start(epoch):
            self._say_of_epoch(epoch, "starting stochastic weight averaging")
        if not self._plan.is_bn_pass(epoch):
            self._set_learning_rate(self._plan.learning_rate(epoch))
        elif self.n_averaged:
            self._begin_bn_pass(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._execution = batch
        if self._epoch is not None and self._plan.changes_within(self._epoch):
            self._set_learning_rate(self._plan.learning_rate(self._epoch, batch))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self._bn_pass:
            return
        # Whoever looks at the model at the end of the last epoch, wherever in the list, is to find
        # the final one. More batches may come nevertheless: the data may have grown.
        done = self.flavour.last_batch(self.model, self._execution, batch) + 1
        enough = self.arguments.bn_steps is not None and done >= self.arguments.bn_steps
        if enough or (self._plan.steps and done >= self._plan.steps):
            self._bn_pass.settle()
        if enough:
            self.model.stop_training = True

    def on_test_begin(self, logs: Any = None) -> None:
        if self._bn_pass:
            self._bn_pass.finish()
        elif self.arguments.validate_average and self._in_fit and self._epoch is not None:
            self._close_epoch()
            if self.n_averaged:
                # What saves the model at the end of the epoch saves the average: what training
                # goes on with is to be saved before, and the average as the swap will leave it.
                self._average.weights.settle()
                self._save_if_possible()
                self._carry_average()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check_in_fit()
        if self._bn_pass:
            self._bn_pass.finish()
        self._close_epoch()
        rate = self._learning_rate.read()
        if logs is not None and rate is not None:
            logs.setdefault("learning_rate", 0.0 if self._bn_pass else rate)
        self._mind_an_early_stop(epoch)
        self._save_if_possible()
        ends = self.model.stop_training or epoch + 1 == self._plan.epochs
        if ends and self._average.weights.swapped:
            # No epoch comes that would exchange them back. What others put into the model at the
            # end of training, earlier weights or an optimizer's average, is not ours.
            self._average_in_model.close()
            self._average.copy_to_model()

    def on_train_end(self, logs: Any = None) -> None:
        self._average_in_model.close()
        if self._bn_pass and self.arguments.bn_steps:
            self.model.stop_training = bool(self._progress.stopped)
        was_over = self._epoch is None and self._saved_run is not None
        if was_over:  # the kill came after the last epoch
            self._begin(self._plan.epochs)
        if not self.n_averaged:
            self._warn_of_no_snapshot()
        elif was_over and (not self._plan.has_bn or self._is_finished):
            self._average.weights.copy_to_model()
            self._say(_FINAL)
        else:
            # Again after a BN pass: an optimizer with `use_ema`, or a callback that restores
            # earlier weights, has just put others there.
            self._average.copy_to_model()
            if not self._plan.has_bn:
                self._say_of_epoch(self._plan.epochs, _FINAL)
            elif self._bn_pass and self._bn_pass.delivered:
                self._bn_pass.deliver_again()
                self._warn_of_unobserved(self._bn_pass.unobserved)
            else:
                self._warn_of_no_bn_pass()
        self._end_fit()

    def _end_fit(self) -> None:
        self._in_fit = False
        if self._saved_run:
            self._saved_run.remove()
        # The buffers are as large as the weights, and a callback without them can be pickled.
        self._average = self._bn_pass = self._counts = self._saved_run = None
        self._learning_rate = self._initial_rate = None

    @property
    def _is_finished(self) -> bool:
        """Whether the model comes out of a BN pass: with the average, and a learning rate again."""
        return self._learning_rate.read() != 0.0 and self._average.is_in_model

    @property
    def _end(self) -> str:
        return "before its first epoch" if self._epoch is None else f"with epoch {self._epoch + 1}"

    def _check_in_fit(self) -> None:
        if not self._in_fit:
            raise RuntimeError(
                "This SWA has served another `fit` while this one was running. Give each `fit` "
                "that runs at the same time an SWA of its own."
            )

    def _begin(self, epoch: int) -> None:
        """Begin with an epoch, or behind the last: from the start, or where a run was killed."""
        self._prepare_average()
        over, saved = 0, self._saved_run
        resumed = saved.resume(epoch, self._plan, self._average) if saved else None
        if resumed:
            over, self._plan, self._progress = resumed
        if self.n_averaged:
            self._say(f"Going on with the average of {self.n_averaged} snapshots")
        missed = self._plan.snapshots(over, min(epoch, self._progress.stopped or epoch))
        if missed == [epoch - 1] and saved and saved.is_at_end_of_epoch(epoch, over):
            # Whoever saved the model did so before the callback, and the kill came in between:
            # these are the weights.
            self._take_snapshot(epoch - 1)
            missed = []
        if epoch >= self._plan.epochs:
            return
        if missed and saved:
            raise ValueError(
                f"`backup_dir` must have the average as it was before epoch {epoch + 1}. Received: "
                f"{saved}. But snapshots were due at the end of epoch {listed(missed)}. Go on with "
                "the weights of the end of an epoch that is there, and with its number as "
                "`initial_epoch`; or leave `backup_dir` out, and the average will have later "
                "snapshots only."
            )
        if not self.n_averaged:
            self._plan.check_first_epoch(epoch)
        if missed:
            self._warn(
                f"Training begins with epoch {epoch + 1}: the snapshots that were due at the end "
                f"of epoch {listed(missed)} are not in the average. With `backup_dir`, from the "
                "first epoch on, they are kept for a run that goes on."
            )
        self._save(epoch)  # what cannot be saved now could not be saved later
        self._count()

    def _save(self, epoch: int) -> None:
        saved = self._saved_run
        if not saved or saved.is_up_to_date(self._plan, self._progress):
            return
        carried = self._average.weights.swapped
        self._average_in_model.close()
        try:
            saved.save(epoch, self._plan, self._progress, self._average)
        finally:
            if carried:
                self._carry_average()

    def _save_if_possible(self) -> None:
        if not self._saved_run or self._epoch is None:
            return
        self._saved_run.end_epoch()
        try:
            self._save(self._epoch + 1)
        except BackupError as error:
            # The training that is done is worth more than the chance of having to resume it.
            self._warn(
                f"The average at the end of epoch {self._epoch + 1} was not saved, and training "
                f"goes on: {error}"
            )

    def _prepare_average(self) -> None:
        self._average = ModelAverage(self.model, self.flavour.live_batch_norm(self.model))
        self._weight_names = self.flavour.weight_names(self.model)  # later some may be frozen

    def _count(self) -> None:
        counts = self.model.train_function
        if not isinstance(counts, CountingTrainFunction):
            # `fit` has just made the one that is replaced, and not traced it yet.
            counts = CountingTrainFunction(self.model)
            counts.install()
        self._counts = counts
        self._counts.reset()

    def _follow_changes(self) -> None:
        """Follow what other callbacks have changed since the last epoch, as far as can be."""
        model = self.model
        self._learning_rate = self.flavour.learning_rate(model)  # compiled anew?
        # By `id`: variables compare by value.
        known = {id(v) for v in self._average.weights.weights}
        new = [v for v in trainable_variables(model) if id(v) not in known]
        if not new:
            return
        if self.n_averaged:
            raise ValueError(
                "`trainable` must not change from False to True, and no weights may be added, once "
                f"SWA has taken a snapshot. Received: the weight {new[0].name!r}, of which the "
                f"{self.n_averaged} snapshots know nothing. Change it before epoch "
                f"{self._plan.first_snapshot}, or between two calls of `fit`."
            )
        self._prepare_average()
        self._plan = replace(self._plan, has_bn=bool(self.flavour.live_batch_norm(model)))

    def _close_epoch(self) -> None:
        """Do what is due when an epoch has trained: once, at its validation or at its end."""
        assert self._epoch is not None
        if self._closed == self._epoch:
            return
        self._closed = self._epoch
        if self._plan.is_snapshot(self._epoch):
            self._take_snapshot(self._epoch)
        self._learn_from_counts()

    def _carry_average(self) -> None:
        """Put the average into the model until its next epoch, or whatever else trains it."""
        stack = self._average_in_model
        stack.enter_context(before_training(self.model, stack.close))
        if not self._average.weights.swapped:
            # No context manager: if an exception ends `fit`, nobody closes it, and the garbage
            # collector would, at some moment.
            stack.callback(self._average.swap_out)
            self._average.swap_in()

    def _take_snapshot(self, epoch: int) -> None:
        if self._average.update():
            self._progress = replace(self._progress, n_averaged=self.n_averaged + 1)
            return
        self._progress = replace(self._progress, not_finite=self._progress.not_finite + 1)
        cause = (
            "a batch had fewer rows than there are replicas, and training on no rows makes NaN; "
            "choose batches that reach every replica"
            if self.flavour.is_keras_3 and self._counts and self._counts.empty_shares
            else "training has diverged; lower the learning rate, or clip the gradients"
        )
        first = self._average.weights.first_non_finite()
        self._warn(
            f"The weights at the end of epoch {epoch + 1} are not finite, and do not enter the "
            f"average, which has {self.n_averaged} snapshots. The first such weight is "
            f"{self._weight_names[first]!r}. Likely cause: {cause}."
        )

    def _mind_an_early_stop(self, epoch: int) -> None:
        if self._plan.is_bn_pass(epoch):
            if self._progress.stopped:
                self.model.stop_training = True
        elif self.model.stop_training and self._plan.has_bn and self.n_averaged:
            self._plan = self._plan.stopped_after(epoch)
            self._progress = replace(self._progress, stopped=epoch + 1)
            self.model.stop_training = False

    def _begin_bn_pass(self, epoch: int) -> None:
        model = self.model
        self._average.copy_to_model()
        self._say_of_epoch(epoch, _FINAL)
        self._say_of_epoch(epoch, "reinitializing batch normalization layers")
        self._bn_pass = BatchNormPass(
            model,
            layers=self.flavour.live_batch_norm(model),
            optimizers=self.flavour.optimizers(model),
            learning_rate=self._learning_rate,
            set_weights=self._average.weights.copy_to_model,
            untraced=self.flavour.untraced(model),
        )
        self._bn_pass.begin()
        self._say_of_epoch(epoch, "running forward pass to adjust batch normalization")

    def _read_rate(self) -> float | None:
        return self._learning_rate.read() if self._learning_rate.settable else None

    def _set_learning_rate(self, rate: float | None) -> None:
        if rate is not None:
            self._learning_rate.write(rate)

    def _learn_from_counts(self) -> None:
        knew_nothing = self.inferred_batch_size is None
        batch_size = self._counts.largest_batch or None
        self._progress = replace(self._progress, batch_size=batch_size)
        if self._plan.steps is None:
            self._plan = replace(self._plan, steps=self._counts.batches or None)
        given = self.arguments.batch_size
        if knew_nothing and given is not None and batch_size not in (None, given):
            self._warn(
                f"`batch_size`={given} was given to SWA, but training feeds global batches of "
                f"{batch_size}. SWA goes by what it is fed; leave `batch_size` out."
            )

    def _warn_of_no_snapshot(self) -> None:
        self._warn(
            "The model keeps its trained weights: "
            + (
                "no snapshot was finite."
                if self._progress.not_finite
                else f"training ended {self._end}, and SWA would have taken its first snapshot at "
                f"the end of epoch {self._plan.first_snapshot}."
            )
        )

    def _warn_of_unobserved(self, layers: list[Any]) -> None:
        if layers:
            self._warn(
                f"{describe_unobserved(layers)} Until then they hold the average of the snapshots' "
                "moving statistics."
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
            f"average of {self.n_averaged} snapshots, and of their moving statistics, which are "
            f"not those of the averaged weights. For exact ones, {remedy}."
        )

    def _warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=3)

    def _say_of_epoch(self, epoch: int, what: str) -> None:
        self._say(f"Epoch {epoch + 1:05d}: {what}")

    def _say(self, line: str) -> None:
        if self.arguments.verbose:
            print("\n" + line)
