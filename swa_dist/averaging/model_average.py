"""The average of a whole model: of its weights, and of its batch normalization statistics."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from swa_dist.averaging.bn_average import BatchNormAverage
from swa_dist.averaging.weight_average import LongWeightAverage, WeightAverage
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.distribution import fingerprint
from swa_dist.model_checks import last_restore
from swa_dist.protocols import Model
from swa_dist.training.patches import before_training, before_writing


class ModelAverage:
    """The average of a model over its snapshots, which the model can carry for a while.

    While the model carries the average, its weights may be written by:

    | writer | effect |
    |---|---|
    | the training step | the trained weights are restored first |
    | `set_weights`, `load_weights`, a variable's `assign` | the trained weights are restored first, then the new values are assigned, and stay |
    | `tf.train.Checkpoint.restore` | the values stay, and the average is lost |
    | what escapes these, such as `tf.raw_ops` | within the run, the values become the average at its next hook; if the model trains before, they stay, and the average is lost |
    | anything within `averaged` | the values become the average, or are dropped: see `WeightAverage.averaged_weights` |

    Args:
        model: A built Keras model.
        layers: Its trainable BN layers.
        ema_momentum: See `WeightAverage`.
        of_steps: Whether it is of steps, of which there are many.

    Attributes:
        weights: The average of the weights.
        is_lost: Whether the average was overwritten in the model, and the trained weights with it.

    Raises:
        ValueError: See `WeightAverage`.

    Distribution:
        Everything in cross-replica context, on every worker.
    """  # noqa: E501

    def __init__(
        self,
        model: Model,
        layers: Sequence[BatchNormLayer],
        ema_momentum: float | None = None,
        of_steps: bool = False,
    ) -> None:
        self._model = model
        average = LongWeightAverage if of_steps else WeightAverage
        self.weights = average(model, ema_momentum=ema_momentum)
        strategy = model.distribute_strategy
        self._statistics = BatchNormAverage(layers, strategy, ema_momentum or 1.0)
        self._carrying = contextlib.ExitStack()
        self._fingerprint = ""
        self._restores: list[int] = []
        self.is_lost = False

    @property
    def buffers(self) -> dict[str, Any]:
        """What a `tf.train.Checkpoint` takes of it: the average, and nothing of the model."""
        return {"weights": self.weights, "batch_norm": self._statistics}

    @property
    def layout(self) -> dict[str, str]:
        """What is averaged, in words: buffers of another layout cannot be restored."""
        return {**self.weights.layout, **self._statistics.layout}

    @property
    def statistics(self) -> list[tf.Variable]:
        """The BN statistics that are averaged."""
        return self._statistics.variables

    @property
    def is_carried(self) -> bool:
        """Whether the model has the average for a while, and the buffers its own weights."""
        return self.weights.swapped

    @property
    def statistics_of_model(self) -> str:
        """A fingerprint of the BN statistics that the model has at present."""
        return fingerprint(self._statistics.variables, self._model.distribute_strategy)

    def update(self) -> bool:
        """Take a snapshot; return whether it was finite. One that is not is left out."""
        n_averaged = self.weights.n_averaged
        self.weights.update()
        if self.weights.n_averaged == n_averaged:
            return False
        self._statistics.update()
        return True

    def update_statistics(self, snapshots: int) -> None:
        """Average the present BN statistics, which stand for the last snapshots of weights."""
        self._statistics.update(snapshots)

    def copy_to_model(self) -> None:
        """Give the average to the model, for good."""
        self.weights.copy_to_model()
        self._statistics.copy_to_model()

    def carry(self) -> None:
        """Put the average into the model, until it trains again or other weights are written.

        Training then continues from its own weights, or from what was written, with or without the
        run that this average belongs to: no hook is called when an exception ends `fit`.
        """
        self._restores = self._last_restores()
        try:
            self._swap_in()
            self._watch()
        except BaseException:  # Ctrl-C, say: nothing would give the weights back
            self.end_carrying()
            raise

    @contextlib.contextmanager
    def writing_statistics(self) -> Iterator[None]:
        """Have BN statistics written that the model keeps as long as it carries the average."""
        self._carrying.close()
        try:
            yield
        finally:
            self._watch()

    def end_carrying(self) -> None:
        """Give the model back what it had before `carry`, bitwise, if it carries the average."""
        if self.is_carried and self._last_restores() != self._restores:
            self.is_lost = True
        self._carrying.close()
        if not self.is_lost:
            self._swap_out()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the average in the model while open; afterwards all is bitwise as it was.

        Within itself, and while the model carries the average, it does nothing more.
        """
        if self.is_carried:
            yield
            return
        try:
            self._swap_in()
            yield
        finally:
            self._swap_out()

    def _watch(self) -> None:
        self._fingerprint = self._fingerprint_of_model()
        # No context manager here, which the garbage collector would close after an exception.
        self._carrying.enter_context(before_training(self._model, self._before_training))
        self._carrying.enter_context(
            before_writing(self._model, self._variables, self.end_carrying)
        )

    def _before_training(self) -> None:
        if self._fingerprint_of_model() == self._fingerprint:
            self.end_carrying()
        else:
            self._carrying.close()
            self.is_lost = True

    def _swap_in(self) -> None:
        self._statistics.remember()
        self.weights.swap()
        self._statistics.copy_to_model()

    def _swap_out(self) -> None:
        if self.weights.swapped:
            self._statistics.restore()
            self.weights.swap()

    @property
    def _variables(self) -> list[tf.Variable]:
        return [*self.weights.weights, *self._statistics.variables]

    def _fingerprint_of_model(self) -> str:
        return fingerprint(self._variables, self._model.distribute_strategy)

    def _last_restores(self) -> list[int]:
        return [last_restore(v) for v in [*self._model.variables, *self._variables]]
