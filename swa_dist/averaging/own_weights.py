"""Whether a model has its own weights, or the average for a while."""

import tensorflow as tf

from swa_dist.distribution import local_variable


class OwnWeights(tf.train.experimental.PythonState):
    """Whether the model has its own weights: only then may an average be saved or restored.

    Else the buffers hold the weights, which would be restored as an average.

    Args:
        strategy: The `tf.distribute.Strategy` of the model.

    Attributes:
        flag: The same on each replica. The graph that swaps writes it, so that it is right after an
            interruption, and in graphs that were traced before.
        certain: Whether the model certainly has its own weights, so that the flag need not be read
            from the device, which may be busy.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        self.certain = True
        with strategy.scope():
            self.flag = local_variable(tf.constant(True))

    def __bool__(self) -> bool:
        with tf.init_scope():  # `update` asks while a graph is traced, too
            return self.certain or bool(self._strategy.experimental_local_results(self.flag)[0])

    def require(self, what: str) -> None:
        """Refuse a call that needs the model's own weights."""
        if not self:
            raise RuntimeError(_refusal(what))

    def assertion(self, what: str) -> tf.Operation:
        """Return an assertion for a graph, which may have been traced before a swap."""
        return tf.debugging.Assert(self.flag, [_refusal(what)])

    def serialize(self) -> str:
        """Refuse to be saved while the average is in the model."""
        self.require("A `WeightAverage` must be saved")
        return ""

    def deserialize(self, string_value: str) -> None:
        """Refuse to be restored then. TensorFlow calls this before it assigns anything."""
        self.require("A `WeightAverage` must be restored")


def _refusal(what: str) -> str:
    return (
        f"{what} while the model has its own weights. Received: a call while the average is in the "
        "model. Swap back, or leave `averaged_weights`, first."
    )
