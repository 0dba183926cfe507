"""Exact statistics of the inputs of BN layers, pooled over batches and replicas."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from swa_dist.batch_norm.accumulate import SharedAccumulate
from swa_dist.batch_norm.hooks import Observer, observe_layers
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.distribution import (
    ReplicaFunction,
    local_variable,
    mean_over_replicas,
    sum_over_replicas,
)


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
            self._groups = [
                _Group(dtype, [layer for layer in layers if layer.dtype == dtype])
                for dtype in dict.fromkeys(layer.dtype for layer in layers)
            ]
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
        return any(any(self._read(group.reached)) for group in self._groups)

    @property
    def unobserved(self) -> list[Any]:
        """Layers that ran in training mode until the last `pool` without being observed."""
        return [
            layer.keras_layer
            for group in self._groups
            for layer, unobserved in zip(group.layers, self._read(group.unobserved), strict=True)
            if unobserved
        ]

    def observe(self) -> AbstractContextManager[None]:
        """Return a context manager that observes the layers while it is open."""
        return observe_layers(
            (layer, self._observer(layer, moments))
            for group in self._groups
            for layer, moments in zip(group.layers, group.moments, strict=True)
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
        for group in self._groups:
            group.begin()

    def _restore_replica(self) -> None:
        for group in self._groups:
            group.restore()

    def _pool_replica(self) -> None:
        # n = sum(n_r), mean = sum(n_r mean_r) / n, M2 = sum(M2_r + n_r (mean_r - mean)^2)
        parts = [group.all_moments() for group in self._groups]
        counts = [high[0] + low[0] for high, low in parts]
        totals = sum_over_replicas(counts)
        fractions = [tf.math.divide_no_nan(n, t) for n, t in zip(counts, totals, strict=True)]
        own_means = [(high[1], low[1]) for high, low in parts]
        means, deviations = mean_over_replicas(own_means, fractions)
        squares = sum_over_replicas(
            [
                high[2] + low[2] + n * tf.square(deviation)
                for (high, low), n, deviation in zip(parts, counts, deviations, strict=True)
            ]
        )
        for group, total, mean, square in zip(self._groups, totals, means, squares, strict=True):
            group.assign(total > 0, mean, tf.math.divide_no_nan(square, total))


class _Group:
    """The layers whose statistics are accumulated in one dtype.

    Each layer's moments are a variable of its own. Apart from reads and writes of variables, all
    work is on vectors over the channels, or the moving statistics, of all layers: a graph costs
    about 1 ms for each operation on each replica, to trace.
    """

    def __init__(self, dtype: tf.DType, layers: list[BatchNormLayer]) -> None:
        self.layers = layers
        self._dtype = dtype
        self._channels = [layer.channels for layer in layers]
        self._sizes = [layer.channels * len(layer.variables) for layer in layers]
        self._variables = [variable for layer in layers for variable in layer.variables]
        self.moments = [local_variable(tf.zeros([2, 3, n], dtype)) for n in self._channels]
        self.reached = local_variable(tf.zeros([len(layers)], tf.bool))
        self.unobserved = local_variable(tf.zeros([len(layers)], tf.bool))
        self._before = local_variable(tf.zeros([sum(self._sizes)], dtype))

    def begin(self) -> None:
        for moments in self.moments:
            moments.assign(tf.zeros(moments.shape, self._dtype))
        self._before.assign(self._read_statistics())

    def restore(self) -> None:
        self._write_statistics(self._before)

    def all_moments(self) -> list[tf.Tensor]:
        """Return the high and the low part of the moments of all layers' channels."""
        return tf.unstack(tf.concat(self.moments, -1))

    def assign(self, counted: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Assign to all channels that were counted; the others get the statistics of `begin`."""
        before = tf.convert_to_tensor(self._before)
        reached = _any_of_each(counted, self._channels)
        # In training mode a layer updates its moving statistics, observed or not.
        moved = _any_of_each(self._read_statistics() != before, self._sizes)
        self.reached.assign(reached)
        self.unobserved.assign(tf.logical_and(moved, tf.logical_not(reached)))

        parts = [tf.split(values, self._channels) for values in (counted, mean, variance)]
        where, after = [], []
        for layer, counted_, mean_, variance_ in zip(self.layers, *parts, strict=True):
            where += [counted_] * len(layer.variables)
            after += layer.values(mean_, variance_)
        self._write_statistics(tf.where(tf.concat(where, 0), tf.concat(after, 0), before))

    def _read_statistics(self) -> tf.Tensor:
        values = [tf.cast(variable, self._dtype) for variable in self._variables]
        return tf.concat([_reshaped(value, [value.shape.num_elements()]) for value in values], 0)

    def _write_statistics(self, values: tf.Tensor) -> None:
        sizes = [variable.shape.num_elements() for variable in self._variables]
        for variable, value in zip(self._variables, tf.split(values, sizes), strict=True):
            variable.assign(tf.cast(_reshaped(value, variable.shape), variable.dtype))


def _reshaped(value: tf.Tensor, shape: Any) -> tf.Tensor:
    """Return a tensor in another shape, without an operation if it has it."""
    return value if value.shape == shape else tf.reshape(value, shape)


def _any_of_each(flags: tf.Tensor, sizes: list[int]) -> tf.Tensor:
    """Return whether any flag is set in each of the parts of a vector that have these sizes."""
    part = [i for i, size in enumerate(sizes) for _ in range(size)]
    return tf.math.unsorted_segment_max(tf.cast(flags, tf.int32), part, len(sizes)) > 0
