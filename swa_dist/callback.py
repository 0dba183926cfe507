"""The SWA callback, for any Keras: its hooks, in the order in which training calls them."""

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from swa_dist.batch_size import CountingTrainFunction
from swa_dist.bn_pass import BatchNormPass
from swa_dist.flavour import Flavour
from swa_dist.plan import Arguments, Plan
from swa_dist.weight_average import WeightAverage

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

    Attributes:
        n_averaged: Number of snapshots in the average.
        inferred_batch_size: Rows in the largest global batch that training was fed; None during
            the first epoch.

    Raises:
        ValueError: An argument, or the model's optimizer, does not allow what is asked. Raised at
            construction or at the beginning of `fit`, before the first batch.
        TypeError: The model belongs to another Keras.

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
    _average: Any  # a WeightAverage, while a `fit` runs
    _plan: Plan

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
    ) -> None:
        super().__init__()
        self.arguments = Arguments(
            start_epoch, lr_schedule, swa_lr, swa_lr2, swa_freq, batch_size, verbose
        )
        self.n_averaged = 0
        self.inferred_batch_size: int | None = None
        self._bn_pass: BatchNormPass | None = None
        self._final_bn: BatchNormPass | None = None

    def set_model(self, model: Any) -> None:
        self.flavour.check_model(model)
        super().set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        if not self.flavour.trainable_variables(model):
            raise ValueError(
                "`model` must be built and have trainable weights before SWA can average them. "
                f"Received: the model {model.name!r}, built={model.built}, with none. Call it on a "
                "batch, or `build` it, before `fit`."
            )
        self._learning_rate = self.flavour.learning_rate(model)
        self._plan = Plan(
            self.arguments,
            epochs=self.params["epochs"],
            has_bn=bool(self.flavour.live_batch_norm(model)),
            initial_rate=self._learning_rate.read() if self._learning_rate.settable else None,
        )
        self._steps: int | None = self.params.get("steps")
        self._epoch: int | None = None
        self._bn_pass = self._final_bn = None
        self.n_averaged = 0
        self.inferred_batch_size = None
        if self._plan.has_bn:
            self._say(
                "Model uses batch normalization. SWA will require last epoch to be a forward pass "
                "and will run with no learning rate"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._epoch is None:
            self._plan.check_first_epoch(epoch)
            self._prepare()
        self._epoch = epoch
        if self._plan.is_start(epoch):
            self._say_of_epoch(epoch, "starting stochastic weight averaging")
        if self._plan.is_bn_pass(epoch):
            self._begin_bn_pass(epoch)
        else:
            self._set_learning_rate(self._plan.learning_rate(epoch, steps=self._steps))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._bn_pass and batch == 0:
            self._bn_pass.hold_learning_rate()
        elif self._epoch is not None and self._plan.changes_within(self._epoch):
            self._set_learning_rate(self._plan.learning_rate(self._epoch, batch, self._steps))

    def on_test_begin(self, logs: Any = None) -> None:
        # Validation of the last epoch is of the final model.
        self._finish_bn_pass()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._finish_bn_pass()
        if self._plan.is_snapshot(epoch):
            self._average.update()
            self.n_averaged = self._average.n_averaged
        self._learn_from_counts()
        rate = 0.0 if self._plan.is_bn_pass(epoch) else self._learning_rate.read()
        if logs is not None and rate is not None:
            logs.setdefault("learning_rate", rate)

    def on_train_end(self, logs: Any = None) -> None:
        if self.n_averaged:
            # Again after a BN pass: an optimizer with `use_ema`, or a callback that restores
            # earlier weights, has just put others there.
            self._average.copy_to_model()
            if not self._plan.has_bn:
                self._say_of_epoch(self._plan.epochs, _FINAL)
            elif self._final_bn:
                self._final_bn.deliver_again()
            else:
                warnings.warn(
                    "The batch normalization statistics were not recomputed: training ended before "
                    f"the end of epoch {self._plan.epochs}, or no data reached the layers in it. "
                    "The model holds the averaged weights with the statistics of the last trained "
                    "ones.",
                    stacklevel=2,
                )
        else:
            warnings.warn(
                "Training ended before SWA took its first snapshot (start_epoch="
                f"{self.arguments.start_epoch}, swa_freq={self.arguments.swa_freq}). The model "
                "keeps its trained weights.",
                stacklevel=2,
            )
        # The buffers are as large as the weights.
        self._average = self._final_bn = None

    def _prepare(self) -> None:
        model = self.model
        self._average = WeightAverage(
            self.flavour.trainable_variables(model), model.distribute_strategy
        )
        if not isinstance(model.train_function, CountingTrainFunction):
            # `fit` has just made the one that is replaced, and not traced it yet.
            model.train_function = CountingTrainFunction(model)
        self._counts: CountingTrainFunction = model.train_function
        self._counts.reset()

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
        )
        self._bn_pass.begin()
        self._say_of_epoch(epoch, "running forward pass to adjust batch normalization")

    def _finish_bn_pass(self) -> None:
        if self._bn_pass:
            self._final_bn = self._bn_pass if self._bn_pass.finish() else None
            self._bn_pass = None
            # The training step may write weights by other means than an optimizer.
            self._average.copy_to_model()

    def _set_learning_rate(self, rate: float | None) -> None:
        if rate is not None:
            self._learning_rate.write(rate)

    def _learn_from_counts(self) -> None:
        knew_nothing = self.inferred_batch_size is None
        self.inferred_batch_size = self._counts.largest_batch or None
        if self._steps is None:
            self._steps = self._counts.batches or None
        given = self.arguments.batch_size
        if knew_nothing and given is not None and self.inferred_batch_size not in (None, given):
            warnings.warn(
                f"`batch_size`={given} was given to SWA, but training feeds global batches of "
                f"{self.inferred_batch_size}. SWA goes by what it is fed; leave `batch_size` out.",
                stacklevel=2,
            )

    def _say_of_epoch(self, epoch: int, what: str) -> None:
        self._say(f"Epoch {epoch + 1:05d}: {what}")

    def _say(self, line: str) -> None:
        if self.arguments.verbose:
            print("\n" + line)
