"""A batch normalization layer of Keras 3 or tf_keras, as far as its statistics are concerned."""

from collections.abc import Sequence
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

    def statistics(self) -> tf.Tensor:
        """Return this replica's moving mean and variance, of shape (2, channels)."""
        return tf.stack(
            [tf.cast(tf.reshape(v, [-1]), self.dtype) for v in (self.mean, self.variance)]
        )

    def values(self, mean: tf.Tensor, variance: tf.Tensor) -> list[tf.Tensor]:
        """Return the values of `variables` that go with a mean and a variance."""
        if self.renorm is None:
            return [mean, variance]
        stddev = tf.sqrt(variance + self.epsilon)
        return [mean, variance, mean, stddev, stddev]

    def assign(
        self,
        mean: tf.Tensor,
        variance: tf.Tensor,
        where: tf.Tensor,
        otherwise: Sequence[tf.Tensor] | None = None,
    ) -> None:
        """Assign a mean and a variance to the layer, on this replica.

        Args:
            mean: Mean of each channel.
            variance: Variance of each channel.
            where: Booleans, one per channel or one for all: whether to assign them.
            otherwise: Values of `variables` for the other channels; None: their present ones.
        """
        for variable, value, old in zip(
            self.variables,
            self.values(mean, variance),
            otherwise or self.variables,
            strict=True,
        ):
            chosen = tf.where(where, tf.cast(value, variable.dtype), tf.reshape(old, [-1]))
            variable.assign(tf.reshape(chosen, variable.shape))
