"""The average of a whole model: of its weights, and of its batch normalization statistics."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from swa_dist.bn_average import BatchNormAverage
from swa_dist.bn_layer import BatchNormLayer
from swa_dist.weight_average import WeightAverage


class ModelAverage:
    """Average of what a model was at each snapshot.

    Args:
        model: A built Keras model.
        layers: Its live BN layers.

    Raises:
        ValueError: See `WeightAverage`.

    Distribution:
        Everything in cross-replica context, on every worker.
    """

    def __init__(self, model: Any, layers: Sequence[BatchNormLayer]) -> None:
        self._model = model
        self.weights = WeightAverage(model)
        self._statistics = BatchNormAverage(layers, model.distribute_strategy)

    @property
    def buffers(self) -> dict[str, Any]:
        """What a `tf.train.Checkpoint` takes of it: the average, and nothing of the model."""
        return {"weights": self.weights, "batch_norm": self._statistics}

    @property
    def layout(self) -> dict[str, str]:
        """What is averaged, in words: the buffers of another layout cannot be taken up."""
        return {**self.weights.layout, **self._statistics.layout}

    @property
    def variables(self) -> list[tf.Variable]:
        """The model's variables that `swap_in` and `copy_to_model` write."""
        return [*self.weights.weights, *self._statistics.variables]

    def fingerprint(self) -> list[bytes]:
        """Return a hash of each of `variables`, on this worker's first replica."""
        local = self._model.distribute_strategy.experimental_local_results
        values = (tf.reshape(local(v)[0], [1, -1]) for v in self.variables)
        return [tf.fingerprint(value).numpy().tobytes() for value in values]

    def update(self) -> bool:
        """Take a snapshot; return whether it was finite. One that is not is left out."""
        n_averaged = self.weights.n_averaged
        self.weights.update()
        if self.weights.n_averaged == n_averaged:
            return False
        self._statistics.update()
        return True

    def copy_to_model(self) -> None:
        """Give the average to the model, for good."""
        self.weights.copy_to_model()
        self._statistics.copy_to_model()

    def swap_in(self) -> None:
        """Put the average into the model, for a while."""
        self._statistics.keep()
        self.weights.swap()
        self._statistics.copy_to_model()

    def swap_out(self) -> None:
        """Give the model back what it had before `swap_in`, bitwise, if the average is in it."""
        if self.weights.swapped:
            self._statistics.put_back()
            self.weights.swap()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the average in the model while open; afterwards all is bitwise as it was.

        Within itself it does nothing more.
        """
        if self.weights.swapped:
            yield
            return
        try:
            self.swap_in()
            yield
        finally:
            self.swap_out()
