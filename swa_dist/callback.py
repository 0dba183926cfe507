"""The SWA callback: its arguments, and what can be asked of it."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

from swa_dist.data.inputs import check_reusable
from swa_dist.fit_hooks import FitHooks
from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning
from swa_dist.plan.options import Options
from swa_dist.plan.plan import Plan


class SWACallback(FitHooks):
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
        bn_steps: Batches after which the BN pass ends, or of `bn_data`; None: all. A few thousand
            samples give near-optimal statistics (Wu & Johnson, 2021, arXiv 2105.07576, section 3).
        snapshot_freq: "epoch": snapshots are taken at the ends of epochs, see `swa_freq`. An
            integer N >= 1: after every N-th training step, counted from the beginning of
            `start_epoch` on, also where several steps run in one execution. It takes a second
            buffer for each weight. Not with "cyclic", nor with `swa_freq`.
        ema_momentum: A number b in (0, 1) makes the average an exponential moving one: snapshot k
            of n has the weight (1 - b) b^(n-k) / (1 - b^n). See `WeightAverage`.
        bn_data: Data for BN statistics, whatever `update_bn` takes that can be read more than once.
            Then every epoch trains; the average gets its statistics from one forward pass over this
            data at the end of the last epoch, before its validation, or when training has ended
            otherwise, and with `validate_average` before each validation. Arrays are cut into
            batches as large as those of training. If the data fails, the model has the average,
            with the average of the snapshots' BN statistics.

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
        snapshot_freq: int | str = "epoch",
        ema_momentum: float | None = None,
        bn_data: Any = None,
    ) -> None:
        options = Options(
            *(start_epoch, lr_schedule, swa_lr, swa_lr2, swa_freq, batch_size, verbose),
            backup_dir=backup_dir,
            validate_average=validate_average,
            bn_steps=bn_steps,
            snapshot_freq=snapshot_freq,
            ema_momentum=ema_momentum,
            bn_data=bn_data,
        )
        if bn_data is not None:
            check_reusable(bn_data, bn_steps)
        super().__init__(options)
        for message in messages.options_without_effect(lr_schedule, swa_lr, swa_lr2):
            warnings.warn(message, SWAWarning, stacklevel=2)
        # Here, as Keras 3 fails before it calls a callback for the first time.
        self.keras_api.warn_of_several_workers()

    @property
    def n_averaged(self) -> int:
        """Number of snapshots in the average."""
        return self._progress.n_averaged

    @property
    def inferred_batch_size(self) -> int | None:
        """Samples in the largest global batch so far; None during the first epoch."""
        return self._progress.batch_size

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

    # Python names it in its errors.
    __init__.__qualname__ = "SWA.__init__"
