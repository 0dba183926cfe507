"""The BN pass: an epoch of the user's own training step in which only BN statistics change."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.statistics import BatchNormStatistics
from swa_dist.distribution import local_variable
from swa_dist.keras_api import KerasAPI
from swa_dist.plan import messages
from swa_dist.protocols import Model, Optimizer
from swa_dist.training.optimizers import StepOptimizers
from swa_dist.training.patches import Patch, before_training, patched, writing
from swa_dist.training.train_function import TrainFunction


class Average(Protocol):
    """What the pass asks of an average of weights."""

    @property
    def weights(self) -> Sequence[tf.Variable]:
        """The weights that are averaged."""

    @property
    def equals_model(self) -> bool:
        """Whether the weights are bitwise the average."""

    def copy_to_model(self) -> None:
        """Assign the average to the weights."""


@contextlib.contextmanager
def observe_forward_pass(
    statistics: BatchNormStatistics, layers: Sequence[BatchNormLayer], patches: Sequence[Patch]
) -> Iterator[None]:
    """Observe the inputs of BN layers in a forward pass that is traced or run while open.

    Args:
        statistics: Accumulates them.
        layers: The layers.
        patches: What else is to be patched.
    """
    # A Batch Renormalization layer corrects towards running statistics, which belong to other
    # weights. Without the correction it is plain batch normalization.
    plain = [(layer.keras_layer, "renorm", False) for layer in layers if layer.renorm]
    with patched([*plain, *patches]), statistics.observe():
        yield


class BatchNormPass(TrainFunction):
    """Recompute the statistics of a model's BN layers, in the course of a `fit`.

    From `begin` to `finish` this is the model's train function: it runs the model's own training
    step, with its data, losses and metrics, while the optimizers' `apply` is a no-op. Gradients
    without a use are not computed, so the step is a forward pass. The layers' inputs are counted
    and pooled (see `BatchNormStatistics`).

    The pass ends itself: after as many steps as the epoch has, or `bn_steps`, or at the end of the
    data, the statistics are in place, before any callback looks at the model. If more data comes,
    the pass continues.

    If the step or the data fails, the moving statistics, the train function and the learning rates
    are restored at once. If anything else interrupts `fit`, the last two are restored when the
    model is next about to train; the moving statistics are left, as weights may have been loaded
    since.

    Args:
        model: A compiled Keras model.
        keras_api: Its Keras version.
        average: The weights for which the statistics are to hold. They are assigned again whenever
            others may have been: by callbacks that swap weights at the beginning of an epoch, or by
            a training step that writes them by other means than an optimizer.
        step_optimizers: The optimizers whose learning rates are to read 0 during the pass.
        steps: Steps of the epoch; None: unknown.
        bn_steps: Steps after which training is to stop; None: those of the epoch.

    Attributes:
        has_statistics: Whether anything was counted before `finish`.
        unobserved: Layers that ran in training mode where they could not be observed.

    Distribution:
        All methods in cross-replica context, on every worker.
    """

    def __init__(
        self,
        model: Model,
        keras_api: KerasAPI,
        average: Average,
        step_optimizers: StepOptimizers,
        steps: int | None = None,
        bn_steps: int | None = None,
    ) -> None:
        self._keras_api, self._average, self._optimizers = keras_api, average, step_optimizers
        self._steps, self._bn_steps = steps, bn_steps
        self._steps_done = 0
        self._strategy = model.distribute_strategy
        layers = keras_api.trainable_batch_norm(model)
        self._statistics = BatchNormStatistics(layers, self._strategy)
        self._rates: dict[str, float] = {}
        self._patched_model = contextlib.ExitStack()
        self._steps_per_execution: int | None = None
        self._running = self._finalized = False
        self._weights_moved = False
        with self._strategy.scope():
            self._weights_written = local_variable(tf.constant(False))
        self.has_statistics = False
        self.unobserved: list[Any] = []
        optimizers = keras_api.optimizers(model).values()
        patches = [
            *(patch for optimizer in optimizers for patch in _no_ops(optimizer)),
            *writing(average.weights, self._note_write),
            *keras_api.untraced(model),
            *keras_api.without_gradients(model),
        ]
        super().__init__(model, lambda: observe_forward_pass(self._statistics, layers, patches))

    @property
    def in_force(self) -> bool:
        """Whether the model has the average for the pass, or after it with its statistics."""
        return self._running or self.has_statistics

    def begin(self) -> None:
        """Become the model's train function, and set its learning rates to 0."""
        self._average.copy_to_model()
        self._statistics.begin()
        # On an exception the statistics stay: weights may have been loaded since.
        self._patched_model.enter_context(before_training(self._model, self._restore_model))
        self._running = True
        self.install()
        self._hold_learning_rates()

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step. Keras calls this."""
        first = not self._steps_done
        known = self._steps_per_execution
        steps = self._keras_api.steps_per_execution(self._model, known)
        self._steps_per_execution = steps
        try:
            if self._finalized or first:
                self._finalized = False
                self._average.copy_to_model()
                self._hold_learning_rates()
            result = super().__call__(iterator)
            self._steps_done += steps
            if first:
                self._look_for_moved_weights()
            self._end_if_due()
        except (StopIteration, tf.errors.OutOfRangeError):
            self._finalize()
            raise  # which tells Keras that the data has ended
        except BaseException:
            self._fail()
            raise
        return result

    def finish(self) -> None:
        """Finalize the statistics, and restore the model's train function and learning rates."""
        if self._running:
            self._finalize()
            self._restore_model()
            # The data may end within the first execution of several steps.
            self.has_statistics = bool(self._steps_done) or self._statistics.is_filled
            self.unobserved = self._statistics.unobserved

    def reapply(self) -> list[str]:
        """Assign the statistics of `finish` once more; return what there is to warn of."""
        self._statistics.pool()
        warnings = []
        if self.unobserved:
            names = [layer.name for layer in self.unobserved]
            warnings.append(messages.unobserved_layers(names, averaged=True))
        written = self._strategy.experimental_local_results(self._weights_written)
        if self._weights_moved or any(bool(value) for value in written):
            warnings.append(messages.moved_weights())
        return warnings

    def _end_if_due(self) -> None:
        if self._bn_steps is not None and self._steps_done >= self._bn_steps:
            self._finalize()
            self._model.stop_training = True
        elif self._steps and self._steps_done >= self._steps:
            self._finalize()

    def _finalize(self) -> None:
        """Assign the statistics of what the layers have seen, and the learning rates."""
        if not self._running or self._finalized:
            return
        try:
            self._look_for_moved_weights()
            self._statistics.pool()
            self._average.copy_to_model()
        except BaseException:
            self._fail()
            raise
        self._release_learning_rates()
        self._finalized = True

    def _look_for_moved_weights(self) -> None:
        """Note weights that are not the average's: something has updated them unseen."""
        if self._steps_done and not self._average.equals_model:
            self._weights_moved = True

    def _note_write(self, variable: tf.Variable, assign: Callable[[], Any]) -> Any:
        """Assign to a weight within the step, and note whether that changed it on this replica."""
        before = tf.identity(variable)
        result = assign()
        changed = tf.reduce_any(tf.not_equal(before, tf.identity(variable)))
        self._weights_written.assign(tf.logical_or(self._weights_written, changed))
        return result

    def _hold_learning_rates(self) -> None:
        # Rates that another callback has set for this epoch are set again after the pass.
        rates = {name: rate for name, rate in self._optimizers.read_rates().items() if rate}
        if rates and self._running:
            self._rates.update(rates)
            self._optimizers.write_rates(dict.fromkeys(rates, 0.0))

    def _release_learning_rates(self) -> None:
        # Another callback has set a rate meanwhile if it is not 0; keep it.
        now = self._optimizers.read_rates()
        self._optimizers.write_rates({n: r for n, r in self._rates.items() if now.get(n) == 0.0})

    def _fail(self) -> None:
        try:
            self._statistics.restore()
        finally:
            self._restore_model()

    def _restore_model(self) -> None:
        self._running = False
        self._patched_model.close()
        self.uninstall()
        self._release_learning_rates()


def _no_ops(optimizer: Optimizer) -> list[Patch]:
    def no_op(*args: Any, **kwargs: Any) -> Any:
        return getattr(optimizer, "iterations", None)  # those of TensorFlow 1 have none

    return [
        (optimizer, name, no_op)
        for name in ("apply", "apply_gradients")
        if hasattr(optimizer, name)
    ]
