"""The BN pass: an epoch of the user's own training step in which only BN statistics change."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

from swa_dist.bn_layer import BatchNormLayer
from swa_dist.bn_statistics import BatchNormStatistics
from swa_dist.train_function import Shadow, TrainFunction, before_training, shadowed


class LearningRate(Protocol):
    """What the pass must know of an optimizer's learning rate."""

    def read(self) -> float | None:
        """Return the present rate; None if there is none."""

    def write(self, rate: float) -> None:
        """Set it, if it can be set."""


@contextlib.contextmanager
def observing(
    statistics: BatchNormStatistics, layers: Sequence[BatchNormLayer], shadows: Sequence[Shadow]
) -> Iterator[None]:
    """Open the surroundings in which a forward pass is traced: what reaches the layers is counted.

    Args:
        statistics: Where it is counted.
        layers: The layers that it observes.
        shadows: What else is to be another while open.
    """
    # A Batch Renormalization layer corrects towards running statistics that belong to other
    # weights. Without the correction it is plain batch normalization.
    plain = [(layer.layer, "renorm", False) for layer in layers if layer.renorm]
    with shadowed([*plain, *shadows]), statistics.observing():
        yield


def describe_unobserved(layers: Sequence[Any]) -> str:
    """Return, for a warning, why layers were not observed, and what to do."""
    names = ", ".join(repr(layer.name) for layer in layers)
    return (
        f"The statistics of some batch normalization layers were not recomputed: {names}. They run "
        "in a `tf.function` of your own, which was traced before. Take that `tf.function` away: "
        "Keras compiles the whole step."
    )


class BatchNormPass(TrainFunction):
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
        set_weights: Gives the model the weights for which the statistics are to hold. It is called
            where others may have put other weights: callbacks that swap them at the beginning of
            an epoch, a training step that writes them by other means than an optimizer.
        untraced: Shadows under which everything runs as Python while the step is traced. A graph
            that was traced before would run as it did in training, unobserved.

    Distribution:
        All methods in cross-replica context, on every worker.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[BatchNormLayer],
        optimizers: Sequence[Any],
        learning_rate: LearningRate,
        set_weights: Callable[[], None],
        untraced: Sequence[Shadow] = (),
    ) -> None:
        self._learning_rate = learning_rate
        self._set_weights = set_weights
        self._statistics = BatchNormStatistics(layers, model.distribute_strategy)
        self._rate: float | None = None
        self._taken_over = contextlib.ExitStack()
        self._running = self._stepped = self._settled = False
        self.delivered = False
        self.unobserved: list[Any] = []
        shadows = [
            *(shadow for optimizer in optimizers for shadow in _standing_still(optimizer)),
            *untraced,
        ]
        super().__init__(model, lambda: observing(self._statistics, layers, shadows))

    def begin(self) -> None:
        """Take over the model's train function, and its learning rate."""
        self._set_weights()
        self._statistics.begin()
        # The statistics stay when it is undone: weights may have been loaded since.
        self._taken_over.enter_context(before_training(self._model, self._put_back))
        self._running = True
        self.install()
        self._hold_learning_rate()

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step. Keras calls this."""
        try:
            if self._settled or not self._stepped:
                self._settled = False
                self._set_weights()
                self._hold_learning_rate()
            result = super().__call__(iterator)
            self._stepped = True
        except (StopIteration, tf.errors.OutOfRangeError):
            self.settle()
            raise  # the way in which Keras learns that the data is at its end
        except BaseException:
            self._fail()
            raise
        return result

    def settle(self) -> None:
        """Give the BN layers the statistics of what they have seen, and the learning rate back.

        It is for the end of the data, or what is taken for it. If more comes, the pass goes on.
        """
        if not self._running or self._settled:
            return
        try:
            self._statistics.pool()
            self._set_weights()
        except BaseException:
            self._fail()
            raise
        self._release_learning_rate()
        self._settled = True

    def finish(self) -> None:
        """Settle, and give the model back what was taken over. A second call does nothing.

        `delivered` then tells whether there was a batch, and nothing ended the pass before;
        `unobserved` has the layers that ran in training mode where they could not be observed.
        """
        if self._running:
            self.settle()
            self._put_back()
            # The data may end within the first execution of several steps.
            self.delivered = self._stepped or self._statistics.saw_rows
            self.unobserved = self._statistics.unobserved

    def deliver_again(self) -> None:
        """Give the BN layers the statistics of `finish` once more."""
        self._statistics.pool()

    def _hold_learning_rate(self) -> None:
        # What another callback has set for this epoch comes after the pass.
        scheduled = self._learning_rate.read()
        if scheduled and self._running:
            self._rate = scheduled
            self._learning_rate.write(0.0)

    def _release_learning_rate(self) -> None:
        # A rate that is not 0 was set since, by somebody who knew.
        if self._rate is not None and self._learning_rate.read() == 0.0:
            self._learning_rate.write(self._rate)

    def _fail(self) -> None:
        try:
            self._statistics.restore()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        self._running = False
        self._taken_over.close()
        self.uninstall()
        self._release_learning_rate()


def _standing_still(optimizer: Any) -> list[Shadow]:
    def do_nothing(*args: Any, **kwargs: Any) -> Any:
        return optimizer.iterations

    return [
        (optimizer, name, do_nothing)
        for name in ("apply", "apply_gradients")
        if hasattr(optimizer, name)
    ]
