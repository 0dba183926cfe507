"""The SWA callback: its arguments, and hooks that pass on to the run."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import check_eager
from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning
from swa_dist.plan.options import Options
from swa_dist.plan.plan import Plan
from swa_dist.plan.progress import Progress
from swa_dist.run import Run
from swa_dist.state import RunState
from swa_dist.training.learning_rates import InitialOptimizers

if TYPE_CHECKING:  # at run time a binding puts its Keras's Callback here

    class _Callback:
        model: Any
        params: dict[str, Any]

        def set_model(self, model: Any) -> None: ...

else:
    _Callback = object


# In the parameters of a `fit`, which all of its callbacks share: a callback for it has begun.
_MARK = "swa_dist"


class SWACallback(_Callback):
    """Stochastic weight averaging, exact on every replica of a `tf.distribute` strategy.

    After `fit` the model holds the mean of the trainable weights that it had at the ends of the
    averaged epochs, w_SWA = (w_1 + ... + w_n) / n. If it has batch normalization (BN) layers that
    train, the last epoch is a forward pass over the data (the BN pass) that recomputes their moving
    statistics for those weights, over all samples on all replicas.

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
        swa_freq: Epochs from one snapshot to the next, >= 1, with "cyclic" >= 2: the weights enter
            the average at the ends of the epochs `start_epoch` + k `swa_freq` - 1, k = 1, 2, ...,
            which are the ends of the cycles. An incomplete last cycle is in no snapshot.
        batch_size: Global batch size, if you want to be warned when training feeds another. It is
            never needed.
        verbose: 1 prints a line when averaging begins and when the model takes the average.
        backup_dir: Folder for checkpoints of the average while `fit` runs, from which an
            interrupted run is resumed. The model itself is resumed by other means:
            `BackupAndRestore`, or `initial_epoch` and saved weights. Several workers share the
            folder. It is removed when `fit` has finished.
        validate_average: Whether validation within `fit` evaluates the average, from the first
            snapshot on. From the beginning of an epoch's validation to that of the next epoch the
            model carries the average, with the average of the snapshots' BN statistics: callbacks
            that judge or save the model see it. Training is not affected.
        bn_steps: Batches after which the BN pass ends; None: all of the epoch. A few thousand
            samples give near-optimal statistics (Wu & Johnson, 2021, arXiv 2105.07576, section 3).

    Attributes:
        n_averaged: Number of snapshots in the average.
        inferred_batch_size: Samples in the largest global batch that training was fed; None
            during the first epoch.

    Raises:
        ValueError: An argument is out of range, or does not suit the model or its optimizers.
            Raised at construction or at the beginning of `fit`, before the first batch; for a model
            that `fit` builds, or one of several optimizers, after the first step at the latest.
        TypeError: The model is one of the other Keras version.
        RuntimeError: Eager execution was disabled.
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

    keras_api: ClassVar[KerasAPI]

    # tf_keras then does not wait for the device after each batch, to convert the logs to NumPy.
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
        self.options = Options(
            *(start_epoch, lr_schedule, swa_lr, swa_lr2, swa_freq, batch_size, verbose),
            backup_dir=backup_dir,
            validate_average=validate_average,
            bn_steps=bn_steps,
        )
        for message in messages.options_without_effect(lr_schedule, swa_lr, swa_lr2):
            warnings.warn(message, SWAWarning, stacklevel=2)
        # Here, as Keras 3 fails before it calls a callback for the first time.
        self.keras_api.warn_of_several_workers()
        self._last_progress = Progress()
        self._optimizers_before: InitialOptimizers | None = None
        self._run: Run | None = None
        self._is_in_other_loop = False  # of `evaluate` or `predict`

    @property
    def n_averaged(self) -> int:
        """Number of snapshots in the average."""
        return self._progress.n_averaged

    @property
    def inferred_batch_size(self) -> int | None:
        """Samples in the largest global batch so far; None during the first epoch."""
        return self._progress.batch_size

    @property
    def _progress(self) -> Progress:
        return self._run.progress if self._run else self._last_progress

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: options and results, but neither model nor average."""
        state = {
            **vars(self),
            "_last_progress": self._progress,
            "_optimizers_before": None,
            "_run": None,
        }
        for name in ("_model", "model"):  # Keras 3's and tf_keras's
            if name in state:
                state[name] = None
        return state

    def __repr__(self) -> str:
        """Return the arguments that are not the default ones."""
        return repr(self.options).replace("Options", "SWA", 1)

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
            A `Plan`: it prints as a table, and its methods answer for a single epoch or batch, both
            counted from 0.

        Raises:
            ValueError: An argument is out of its range, or no snapshot fits into the run.

        Example:
            >>> print(SWA(45, "constant", swa_lr=0.01).plan(60, learning_rate=0.1))
        """
        return Plan.of(self.options, epochs, steps_per_epoch, learning_rate, batch_norm)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the average in the model while open; afterwards all is bitwise as it was.

        For other callbacks while `fit` runs, and for use after an exception or Ctrl-C has ended it,
        until the next `fit` with this instance begins. BN layers get the average of the statistics
        that they had at the snapshots; in the BN pass, the model has the average already. Within
        itself, and while the model carries the average for validation, it does nothing more. What
        is written into float32 or float64 weights meanwhile becomes the average; what is written
        into narrower ones and into BN statistics is dropped.

        Raises:
            RuntimeError: There is no snapshot yet, or `fit` has ended as it should: then the model
                holds the average.

        Distribution:
            In cross-replica context, on every worker.

        Example:
            >>> with swa.averaged_weights():
            ...     model.evaluate(test_data)
        """
        if not self._run:
            raise RuntimeError(
                "`averaged_weights` must be called while `fit` runs, after the first snapshot, or "
                "after an exception has ended it. Received: a call outside of it. After `fit` the "
                "model holds the average, unless a callback after SWA has restored other weights."
            )
        with self._run.averaged_weights():
            yield

    def set_model(self, model: Any) -> None:
        check_eager()
        self.keras_api.check_model(model)
        super().set_model(model)
        self._optimizers_before = self._optimizers_now()
        self._is_in_other_loop = True  # unless training begins

    def on_train_begin(self, logs: Any = None) -> None:
        params = getattr(self, "params", None) or {}
        if "epochs" not in params:
            raise ValueError(
                "SWA must know how many epochs `fit` trains. Received: a CallbackList without the "
                "parameter `epochs`. Make it with `CallbackList(..., epochs=...)`, or give `fit` a "
                "list of callbacks."
            )
        if params.get(_MARK):
            raise ValueError(
                "`callbacks` must have one SWA: two in one `fit` would undo each other's work. "
                "Received: a second one."
            )
        params[_MARK] = True
        self._is_in_other_loop = False
        self._run = None  # of a `fit` that an exception has ended
        # A CallbackList that serves several fits sets the model once, before the first.
        before = self._optimizers_before or self._optimizers_now()
        self._optimizers_before = None
        self._run = Run(RunState(self.options, self.model, params, self.keras_api, before))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.params.pop(_MARK, None)
        self._running.begin_epoch(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._run:
            self._run.begin_batch(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._run:
            self._run.end_batch()

    def on_test_begin(self, logs: Any = None) -> None:
        if self._run and not self._is_in_other_loop:
            self._run.begin_test()

    def on_test_end(self, logs: Any = None) -> None:
        self._is_in_other_loop = False

    def on_predict_end(self, logs: Any = None) -> None:
        self._is_in_other_loop = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._running.end_epoch(epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        run = self._running
        try:
            run.end()
        finally:
            # The buffers are as large as the weights.
            self._last_progress = run.progress
            self._run = None

    # Python names it in its errors.
    __init__.__qualname__ = "SWA.__init__"

    def _optimizers_now(self) -> InitialOptimizers:
        return InitialOptimizers.of(self.keras_api.step_optimizers(self.model))

    @property
    def _running(self) -> Run:
        if not self._run:
            raise RuntimeError(
                "This SWA has been used in another `fit` while this one was running. Give each "
                "`fit` that runs at the same time an SWA of its own."
            )
        return self._run
