"""The BN pass: an epoch of the user's own training step in which only BN statistics change."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import tensorflow as tf

from swa_dist.bn_layer import BatchNormLayer
from swa_dist.bn_statistics import BatchNormStatistics
from swa_dist.replicas import local_variable
from swa_dist.train_function import Shadow, TrainFunction, before_training, shadowed, writing
from swa_dist.weight_average import WeightAverage


class LearningRates(Protocol):
    """What the pass must know of the learning rates of optimizers."""

    def read(self) -> Mapping[str, float]:
        """Return the present rates, by name."""

    def write(self, rates: Mapping[str, float]) -> None:
        """Set those that can be set."""


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
        learning_rates: The learning rates that are to read 0 during the pass.
        average: The weights for which the statistics are to hold. They are given to the model again
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
        learning_rates: LearningRates,
        average: WeightAverage,
        untraced: Sequence[Shadow] = (),
    ) -> None:
        self._learning_rates = learning_rates
        self._average = average
        self._strategy = model.distribute_strategy
        self._statistics = BatchNormStatistics(layers, self._strategy)
        self._rates: dict[str, float] = {}
        self._taken_over = contextlib.ExitStack()
        self._running = self._stepped = self._settled = False
        self._strayed = False
        with self._strategy.scope():
            self._wrote = local_variable(tf.constant(False))
        self.delivered = False
        self.unobserved: list[Any] = []
        shadows = [
            *(shadow for optimizer in optimizers for shadow in _standing_still(optimizer)),
            *writing(average.weights, self._note_write),
            *untraced,
        ]
        super().__init__(model, lambda: observing(self._statistics, layers, shadows))

    @property
    def in_force(self) -> bool:
        """Whether the model has the average for the pass, or after it with its statistics."""
        return self._running or self.delivered

    @property
    def moved_weights(self) -> bool:
        """Whether weights were others than the average's at any time within a step, or after it.

        What the step writes is looked at where it writes. What escapes that, an optimizer that SWA
        does not know, say, has left its traces after the first execution, and at the end.
        """
        wrote = self._strategy.experimental_local_results(self._wrote)
        return self._strayed or any(bool(value) for value in wrote)

    def begin(self) -> None:
        """Take over the model's train function, and its learning rates."""
        self._average.copy_to_model()
        self._statistics.begin()
        # The statistics stay when it is undone: weights may have been loaded since.
        self._taken_over.enter_context(before_training(self._model, self._put_back))
        self._running = True
        self.install()
        self._hold_learning_rates()

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step. Keras calls this."""
        first = not self._stepped
        try:
            if self._settled or first:
                self._settled = False
                self._average.copy_to_model()
                self._hold_learning_rates()
            result = super().__call__(iterator)
            self._stepped = True
            if first:
                self._look_for_other_weights()
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
            self._look_for_other_weights()
            self._statistics.pool()
            self._average.copy_to_model()
        except BaseException:
            self._fail()
            raise
        self._release_learning_rates()
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

    def _look_for_other_weights(self) -> None:
        self._strayed = self._strayed or (self._stepped and not self._average.is_in_model)

    def _note_write(self, variable: tf.Variable, assign: Callable[[], Any]) -> Any:
        """Write a weight, and note whether that changed it on this replica."""
        before = tf.identity(variable)
        result = assign()
        changed = tf.reduce_any(tf.not_equal(before, tf.identity(variable)))
        self._wrote.assign(tf.logical_or(self._wrote, changed))
        return result

    def _hold_learning_rates(self) -> None:
        # What another callback has set for this epoch comes after the pass.
        scheduled = {name: rate for name, rate in self._learning_rates.read().items() if rate}
        if scheduled and self._running:
            self._rates.update(scheduled)
            self._learning_rates.write(dict.fromkeys(scheduled, 0.0))

    def _release_learning_rates(self) -> None:
        # A rate that is not 0 was set since, by somebody who knew.
        now = self._learning_rates.read()
        self._learning_rates.write({n: r for n, r in self._rates.items() if now.get(n) == 0.0})

    def _fail(self) -> None:
        try:
            self._statistics.restore()
        finally:
            self._put_back()

    def _put_back(self) -> None:
        self._running = False
        self._taken_over.close()
        self.uninstall()
        self._release_learning_rates()


def _standing_still(optimizer: Any) -> list[Shadow]:
    def do_nothing(*args: Any, **kwargs: Any) -> Any:
        return getattr(optimizer, "iterations", None)  # those of TensorFlow 1 have none

    return [
        (optimizer, name, do_nothing)
        for name in ("apply", "apply_gradients")
        if hasattr(optimizer, name)
    ]
