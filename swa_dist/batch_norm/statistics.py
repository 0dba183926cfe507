"""Exact statistics of the inputs of BN layers, pooled over batches and replicas."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from swa_dist.batch_norm.hooks import observe_layers
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.moments import moments, two_sum
from swa_dist.distribution import (
    ReplicaFunction,
    local_variable,
    mean_over_replicas,
    read_local,
    sum_over_replicas,
)


class BatchNormStatistics:
    """Count, mean and squared deviations of the positions that reach each layer.

    A position is one vector over the channel axes: an image of 28 x 28 pixels has 784. While
    `observing` is open, each replica accumulates the positions that it sees; `pool` then assigns
    the mean and the population variance (divisor n) of all positions on all replicas.

    Batches and replicas are combined by the pairwise update of Chan et al., in which a batch enters
    with its own count: uneven batches weigh what they should, and empty ones nothing. It keeps the
    variance *between* batches, which an average of batch variances loses, and does not cancel, as a
    sum of squares does. Sums over batches carry their rounding error along (Knuth's two-sum), so
    that the length of an epoch does not matter in float32.

    Args:
        layers: The layers to observe.
        strategy: The `tf.distribute.Strategy` under which they were created.

    Distribution:
        `begin`, `pool` and `restore` in cross-replica context, on every worker. `pool`
        communicates; nothing else does.

    Reference:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979, eq. 2.1. Knuth, The Art of Computer Programming 2, section 4.2.2.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        with strategy.scope():
            self._accumulators = [_Accumulator(layer) for layer in layers]
        self._begin = ReplicaFunction(self._begin_replica, strategy)
        self._restore = ReplicaFunction(self._restore_replica, strategy)
        self._pool = ReplicaFunction(self._pool_replica, strategy)

    def begin(self) -> None:
        """Reset all counts, and remember the layers' present statistics for `restore`."""
        self._begin()

    def restore(self) -> None:
        """Restore the statistics that the layers had at `begin`, on each replica its own."""
        self._restore()

    def pool(self) -> None:
        """Assign the statistics of all positions to the layers, the same on every replica.

        A layer that no position has reached gets back the statistics that it had at `begin`.
        """
        self._pool()

    @property
    def is_filled(self) -> bool:
        """Whether positions had reached any of the layers at the last `pool`."""
        return any(read_local(a.reached, self._strategy) for a in self._accumulators)

    @property
    def unobserved(self) -> list[Any]:
        """Layers that ran in training mode until the last `pool` without being observed."""
        accumulators = self._accumulators
        return [
            a.layer.keras_layer for a in accumulators if read_local(a.unobserved, self._strategy)
        ]

    def observe(self) -> AbstractContextManager[None]:
        """Return a context manager that observes the layers while it is open."""
        return observe_layers((a.layer, a.add) for a in self._accumulators)

    def _begin_replica(self) -> None:
        for accumulator in self._accumulators:
            accumulator.begin()

    def _restore_replica(self) -> None:
        for accumulator in self._accumulators:
            accumulator.restore()

    def _pool_replica(self) -> None:
        # n = sum(n_r), mean = sum(n_r mean_r) / n, M2 = sum(M2_r + n_r (mean_r - mean)^2)
        accumulators = self._accumulators
        counts = [tf.cast(a.count, a.dtype) for a in accumulators]
        totals = sum_over_replicas(counts)
        fractions = [tf.math.divide_no_nan(n, t) for n, t in zip(counts, totals, strict=True)]
        means, deviations = mean_over_replicas([a.mean for a in accumulators], fractions)
        squares = sum_over_replicas(
            [
                a.squares + n * tf.square(deviation)
                for a, n, deviation in zip(accumulators, counts, deviations, strict=True)
            ]
        )
        for a, total, mean, square in zip(accumulators, totals, means, squares, strict=True):
            a.assign(total, mean, tf.math.divide_no_nan(square, total))


class _Accumulator:
    """One layer's positions on one replica: n, and mean and M2 as unevaluated sums high + low."""

    def __init__(self, layer: BatchNormLayer) -> None:
        self.layer = layer
        self.dtype, channels = layer.dtype, layer.channels
        self.count = local_variable(tf.zeros([channels], tf.int64))
        self.reached = local_variable(tf.zeros([], tf.int64))
        self.unobserved = local_variable(tf.zeros([], tf.int64))
        self._high = local_variable(tf.zeros([2, channels], self.dtype))
        self._low = local_variable(tf.zeros([2, channels], self.dtype))
        self._before = [local_variable(tf.zeros(v.shape, v.dtype)) for v in layer.variables]

    def begin(self) -> None:
        for variable in (self.count, self._high, self._low):
            variable.assign(tf.zeros_like(variable))
        for before, variable in zip(self._before, self.layer.variables, strict=True):
            before.assign(variable)

    def restore(self) -> None:
        for before, variable in zip(self._before, self.layer.variables, strict=True):
            variable.assign(before)

    @tf.autograph.experimental.do_not_convert
    def add(self, inputs: tf.Tensor, mask: tf.Tensor | None, training: Any) -> None:
        """Accumulate the positions of one call of the layer (Chan et al., eq. 2.1)."""
        # The channels are the layer's, as the tensor may lack them: a generator's batches have no
        # static shape, and a convolution of no samples can have a wrong one (oneDNN, TensorFlow
        # 2.21).
        reduced = [axis for axis, size in enumerate(self.layer.input_shape) if size is None]
        shape: list[Any] = list(self.layer.input_shape)
        for axis in reduced:
            shape[axis] = tf.shape(inputs)[axis]
        inputs = tf.reshape(inputs, shape)
        batch_count, batch_mean, rest, batch_squares = moments(
            tf.cast(tf.stop_gradient(inputs), self.dtype),
            reduced,
            mask if self.layer.uses_mask else None,
        )
        if tf.is_tensor(training):
            trains = tf.cast(training, tf.bool)
            batch_count = tf.where(trains, batch_count, 0)
            batch_squares = tf.where(trains, batch_squares, 0)

        count = self.count + batch_count
        fraction = tf.cast(batch_count, self.dtype) / tf.cast(tf.maximum(count, 1), self.dtype)
        # Rounding errors go into the low parts only: added to a large mean they would be lost.
        delta, small = batch_mean - self._high[0], rest - self._low[0]
        between = tf.square(delta + small) * tf.cast(self.count, self.dtype) * fraction
        increment = tf.stack([delta * fraction, batch_squares + between])
        high, error = two_sum(self._high, increment)
        low = self._low + (error + tf.stack([small * fraction, tf.zeros_like(small)]))
        # All or nothing: at the end of the data the step runs once more and fails for want of a
        # batch, of which the count is independent if shapes are static.
        with tf.control_dependencies([high, low]):
            self.count.assign(count)
            self._high.assign(high)
            self._low.assign(low)

    @property
    def mean(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean, as high and low part."""
        return self._high[0], self._low[0]

    @property
    def squares(self) -> tf.Tensor:
        """The sum of squared deviations."""
        return self._high[1] + self._low[1]

    def assign(self, count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> None:
        self.reached.assign(tf.cast(tf.reduce_any(count > 0), tf.int64))
        # In training mode a layer updates its moving statistics, observed or not.
        moved = tf.reduce_any(
            [
                tf.reduce_any(v != before)
                for v, before in zip(self.layer.variables, self._before, strict=True)
            ]
        )
        unobserved = tf.logical_and(moved, tf.reduce_all(count == 0))
        self.unobserved.assign(tf.cast(unobserved, tf.int64))
        self.layer.assign(mean, variance, where=count > 0, otherwise=self._before)
