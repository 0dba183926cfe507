"""Exact statistics of the inputs of BN layers, pooled over batches and replicas."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from swa_dist.batch_norm.accumulate import SharedAccumulate
from swa_dist.batch_norm.hooks import Observer, observe_layers
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.layer_group import LayerGroup
from swa_dist.distribution import (
    LocalCopy,
    local_variable,
)
from swa_dist.replica_function import Communicating, ReplicaFunction, mean_over_replicas


class BatchNormStatistics:
    """Count, mean and squared deviations of the positions that reach each layer.

    A position is one vector over the channel axes: an image of 28 x 28 pixels has 784. While
    `observe` is open, each replica accumulates the positions that it sees; `pool` then assigns
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
        self._accumulate = SharedAccumulate()
        with strategy.scope():
            self._moments = [_Moments(group) for group in LayerGroup.of(layers)]
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
        return any(any(self._read(moments.reached)) for moments in self._moments)

    @property
    def unobserved(self) -> list[Any]:
        """Layers that ran in training mode until the last `pool` without being observed."""
        return [
            layer.keras_layer
            for moments in self._moments
            for layer, unobserved in zip(
                moments.group.layers, self._read(moments.unobserved), strict=True
            )
            if unobserved
        ]

    def observe(self) -> AbstractContextManager[None]:
        """Return a context manager that observes the layers while it is open."""
        return observe_layers(
            (layer, self._observer(layer, variable))
            for moments in self._moments
            for layer, variable in zip(moments.group.layers, moments.of_layers, strict=True)
        )

    def _observer(self, layer: BatchNormLayer, moments: tf.Variable) -> Observer:
        @tf.autograph.experimental.do_not_convert
        def add(inputs: tf.Tensor, mask: tf.Tensor | None, training: Any) -> None:
            before = tf.convert_to_tensor(moments)
            after = self._accumulate(layer, before, inputs, mask)
            if tf.is_tensor(training):
                after = tf.where(tf.cast(training, tf.bool), after, before)
            # One assignment that depends on the batch: at the end of the data the step runs once
            # more, fails for want of a batch, and must leave the moments as they are.
            moments.assign(after)

        return add

    def _read(self, variable: tf.Variable) -> Any:
        """Return the array that a local variable is on this worker's first replica."""
        return self._strategy.experimental_local_results(variable)[0].numpy()

    def _begin_replica(self) -> None:
        for moments in self._moments:
            moments.begin()

    def _restore_replica(self) -> None:
        for moments in self._moments:
            moments.restore()

    def _pool_replica(self) -> Communicating[None]:
        # n = sum(n_r), mean = sum(n_r mean_r) / n, M2 = sum(M2_r + n_r (mean_r - mean)^2)
        parts = [moments.of_all_channels() for moments in self._moments]
        counts = [high[0] + low[0] for high, low in parts]
        totals = yield counts
        fractions = [tf.math.divide_no_nan(n, t) for n, t in zip(counts, totals, strict=True)]
        own_means = [(high[1], low[1]) for high, low in parts]
        means, deviations = yield from mean_over_replicas(own_means, fractions)
        squares = yield [
            high[2] + low[2] + n * tf.square(deviation)
            for (high, low), n, deviation in zip(parts, counts, deviations, strict=True)
        ]
        for moments, total, mean, square in zip(self._moments, totals, means, squares, strict=True):
            moments.assign(total > 0, mean, tf.math.divide_no_nan(square, total))


class _Moments:
    """The moments of the layers of a group, and the statistics that the layers had before."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        n_layers = len(group.layers)
        self.of_layers = [local_variable(tf.zeros([2, 3, n], group.dtype)) for n in group.channels]
        self.reached = local_variable(tf.zeros([n_layers], tf.bool))
        self.unobserved = local_variable(tf.zeros([n_layers], tf.bool))
        self._before = local_variable(tf.zeros([group.n_statistics], group.dtype))

    def begin(self) -> None:
        for moments in self.of_layers:
            LocalCopy(moments).assign(tf.zeros(moments.shape, moments.dtype))
        LocalCopy(self._before).assign(self.group.read_statistics())

    def restore(self) -> None:
        self.group.write_statistics(LocalCopy(self._before).read())

    def of_all_channels(self) -> list[tf.Tensor]:
        """Return the high and the low part of the moments of all layers' channels."""
        return tf.unstack(tf.concat([LocalCopy(m).read() for m in self.of_layers], -1))

    def assign(self, counted: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Assign to all layers that were counted; the others get the statistics of `begin`."""
        group, before = self.group, LocalCopy(self._before).read()
        reached = group.any_channel(counted)
        # In training mode a layer updates its moving statistics, observed or not.
        moved = group.any_statistic(group.read_statistics() != before)
        LocalCopy(self.reached).assign(reached)
        LocalCopy(self.unobserved).assign(tf.logical_and(moved, tf.logical_not(reached)))
        after = group.statistics_of(mean, variance)
        group.write_statistics(tf.where(group.of_each_statistic(reached), after, before))
