"""The BN pass: an epoch of the user's own training step in which only BN statistics change."""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from swa_dist.batch_norm import BatchNormLayer, BatchNormStatistics
from swa_dist.train_function import Shadow, TrainFunction, shadowed


class LearningRate(Protocol):
    """What the pass must know of an optimizer's learning rate."""

    def read(self) -> float | None:
        """Return the present rate; None if there is none."""

    def write(self, rate: float) -> None:
        """Set it, if it can be set."""


class BatchNormPass:
    """Recompute the statistics of a model's BN layers, in the course of a `fit`.

    From `begin` to `finish` the model's train function is this one: it runs the model's own
    training step, with its data, losses and metrics, while the optimizers' `apply` does nothing.
    Gradients that nobody uses are not computed, so the step is a forward pass. The layers count
    and pool what reaches them (see `BatchNormStatistics`).

    If the step or the data fails, all is put back at once. If anything else ends `fit` before
    `finish`, it is put back when the model is next about to train.

    Args:
        model: A compiled Keras model.
        layers: The BN layers to observe.
        optimizers: Every optimizer that its training step may use.
        learning_rate: The learning rate that is to read 0 during the pass.

    Distribution:
        All methods in cross-replica context, on every worker.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[BatchNormLayer],
        optimizers: Sequence[Any],
        learning_rate: LearningRate,
    ) -> None:
        self._model = model
        self._learning_rate = learning_rate
        self._statistics = BatchNormStatistics(layers, model.distribute_strategy)
        self._function = TrainFunction(
            model,
            [
                *self._statistics.observers(),
                # A Batch Renormalization layer corrects towards running statistics that belong to
                # other weights. Without the correction it is plain batch normalization.
                *((layer.layer, "renorm", False) for layer in layers if layer.renorm),
                *(shadow for optimizer in optimizers for shadow in _standing_still(optimizer)),
            ],
        )
        self._trains_with: Any = None
        self._rate: float | None = None
        self._taken_over = contextlib.ExitStack()
        self._running = False

    def begin(self) -> None:
        """Take over the model's train function, and its learning rate."""
        self._statistics.begin()
        self._trains_with = self._model.train_function
        self._rate = self._learning_rate.read()
        # Both Kerases call this before anything else when a model is about to train. Only a `fit`
        # that was cut short still has it then.
        self._taken_over.enter_context(
            shadowed([(self._model, "make_train_function", self._make_train_function)])
        )
        self._running = True
        self._model.train_function = self
        self._learning_rate.write(0.0)

    def hold_learning_rate(self) -> None:
        """Set the learning rate to 0 again; what another callback has set comes after the pass."""
        scheduled = self._learning_rate.read()
        if scheduled and self._running:
            self._rate = scheduled
            self._learning_rate.write(0.0)

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step. Keras calls this."""
        try:
            return self._function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise  # the way in which Keras learns that the data is at its end
        except BaseException:
            self._fail()
            raise

    def finish(self) -> bool:
        """Give the BN layers their statistics, and the model back what was taken over.

        Returns:
            Whether the layers have new statistics: rows reached them, and nothing ended the pass.
        """
        if not self._running:
            return False
        try:
            self._statistics.pool()
        except BaseException:
            self._fail()
            raise
        self._put_back()
        return self._statistics.saw_rows

    def deliver_again(self) -> None:
        """Give the BN layers the statistics of `finish` once more."""
        self._statistics.pool()

    def _fail(self) -> None:
        try:
            self._statistics.restore()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        self._running = False
        self._taken_over.close()
        if self._model.train_function is self:  # else it was compiled anew
            self._model.train_function = self._trains_with
        # A rate that is not 0 was set since, by somebody who knew.
        if self._rate is not None and self._learning_rate.read() == 0.0:
            self._learning_rate.write(self._rate)

    def _make_train_function(self, *args: Any, **kwargs: Any) -> Any:
        # The statistics stay: weights may have been loaded since.
        self._put_back()
        return self._model.make_train_function(*args, **kwargs)


def _standing_still(optimizer: Any) -> list[Shadow]:
    def do_nothing(*args: Any, **kwargs: Any) -> Any:
        return optimizer.iterations

    return [
        (optimizer, name, do_nothing)
        for name in ("apply", "apply_gradients")
        if hasattr(optimizer, name)
    ]
