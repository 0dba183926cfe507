"""A batch normalization layer of Keras 3 or tf_keras, as far as its statistics are concerned."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class BatchNormLayer:
    """What it takes to recompute the statistics of a batch normalization layer.

    Args:
        keras_layer: The Keras layer.
        base: The class, its own or an ancestor, whose `call` computes the moments.
        input_shape: Sizes of its input's axes: a number for each channel axis, None for the others,
            over which the moments are taken.
        mean: Variable of its moving mean.
        variance: Variable of its moving variance.
        epsilon: What the layer adds to a variance before taking the root.
        uses_mask: Whether its moments respect a mask.
        renorm: Its `renorm_mean`, `renorm_stddev` and `moving_stddev`, if it has them.
    """

    keras_layer: Any
    base: type
    input_shape: tuple[int | None, ...]
    mean: tf.Variable
    variance: tf.Variable
    epsilon: float
    uses_mask: bool
    renorm: tuple[tf.Variable, tf.Variable, tf.Variable] | None

    @property
    def variables(self) -> list[tf.Variable]:
        """The layer's statistics."""
        return [self.mean, self.variance, *(self.renorm or ())]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.mean.shape.num_elements()

    @property
    def dtype(self) -> tf.DType:
        """Dtype in which its statistics are accumulated."""
        return tf.float64 if self.mean.dtype == tf.float64 else tf.float32

    def values(self, mean: tf.Tensor, variance: tf.Tensor) -> list[tf.Tensor]:
        """Return the values of `variables` that go with a mean and a variance."""
        if self.renorm is None:
            return [mean, variance]
        stddev = tf.sqrt(variance + self.epsilon)
        return [mean, variance, mean, stddev, stddev]
