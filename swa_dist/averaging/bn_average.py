"""The average of the moving statistics that batch normalization layers have at the snapshots."""

from collections.abc import Sequence

import tensorflow as tf

from swa_dist.averaging.packing import Layout, pack, unpack
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.distribution import (
    LocalCopy,
    ReplicaFunction,
    Untracked,
    local_variable,
    mean_over_replicas,
    sum_over_replicas,
)


class BatchNormAverage(tf.Module):
    """Average of the moving statistics that BN layers had at each `update`.

    It is used where the statistics cannot be recomputed. They are close to those of the averaged
    weights, but not the same. At an update the moving statistics of the replicas, each of its own
    part of the data, are pooled with equal weight, as a mean and a population variance; a replica
    whose statistics of a layer are not finite has no weight. Pooled means and variances then enter
    a running mean, which keeps statistics that never change bitwise.

    Args:
        layers: The layers.
        strategy: The `tf.distribute.Strategy` under which they were created.

    Attributes:
        parts: The average of all layers whose statistics are of one dtype.
        buffers_layout: What is in their buffers. A checkpoint of other ones is refused.

    Distribution:
        Call everything in cross-replica context, on every worker. `update` communicates.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._layers = Untracked(layers)
        by_dtype: dict[tf.DType, list[BatchNormLayer]] = {}
        for layer in layers:
            by_dtype.setdefault(layer.dtype, []).append(layer)
        with strategy.scope():
            self.parts = [_PackedLayers(same, dtype) for dtype, same in by_dtype.items()]
        self.buffers_layout = Layout(self.layout)
        self._update = ReplicaFunction(self._update_replica, strategy)
        self._copy = ReplicaFunction(self._copy_replica, strategy)
        self._remember = ReplicaFunction(self._remember_replica, strategy)
        self._restore = ReplicaFunction(self._restore_replica, strategy)

    @property
    def variables(self) -> list[tf.Variable]:
        """The layers' statistics."""
        return [v for layer in self._layers for v in layer.variables]

    @property
    def layout(self) -> dict[str, str]:
        """What each layer is, in words: averages of other layers cannot be restored."""
        return {
            f"BN layer {i}": f"{layer.channels} channels, {layer.dtype.name}"
            for i, layer in enumerate(self._layers, 1)
        }

    def update(self) -> None:
        """Average the layers' present statistics with the earlier ones."""
        self._update()

    def copy_to_model(self) -> None:
        """Assign the average to the layers, on every replica.

        A layer without one keeps its own, and so does one that was frozen meanwhile.
        """
        for part in self.parts:
            part.note_frozen_layers()
        self._copy()

    def remember(self) -> None:
        """Remember the statistics that the layers have, on each replica its own."""
        self._remember()

    def restore(self) -> None:
        """Restore the statistics that were remembered."""
        self._restore()

    def _update_replica(self) -> None:
        for part in self.parts:
            part.update()

    def _copy_replica(self) -> None:
        for part in self.parts:
            part.copy()

    def _remember_replica(self) -> None:
        for part in self.parts:
            part.remember()

    def _restore_replica(self) -> None:
        for part in self.parts:
            part.restore()


class _PackedLayers(tf.Module):
    """The average of BN layers whose statistics are of one dtype, each kind as one vector.

    Args:
        layers: The layers.
        dtype: Dtype in which their statistics are averaged.

    Attributes:
        counts: Updates in each layer's average.
        averages: Means of all layers' channels, and their variances.

    Distribution:
        Create it in the strategy's scope. All but `note_frozen_layers` is for replica context.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], dtype: tf.DType) -> None:
        super().__init__()
        self._layers = Untracked(layers)
        self._dtype = dtype
        channels = [layer.channels for layer in layers]
        self._layer_of_channel = Untracked(_repeated(channels))
        self.counts = local_variable(tf.zeros([len(channels)], tf.int64))
        self.averages = local_variable(tf.zeros([2, sum(channels)], dtype))
        sizes = [sum(v.shape.num_elements() for v in layer.variables) for layer in layers]
        self._layer_of_statistic = Untracked(_repeated(sizes))
        self._own = Untracked([local_variable(tf.zeros([sum(sizes)], dtype))])
        self._is_trained = Untracked([local_variable(tf.fill([len(channels)], True))])

    def note_frozen_layers(self) -> None:
        """Have `copy` leave the layers alone that are frozen by now."""
        # In a variable: a graph would keep what was true when it was traced.
        trained = [bool(layer.keras_layer.trainable) for layer in self._layers]
        for variable in self._is_trained:
            variable.assign(trained)

    def update(self) -> None:
        """Average the layers' present statistics with the earlier ones."""
        own = tf.stack(
            [
                self._read([layer.mean for layer in self._layers]),
                self._read([layer.variance for layer in self._layers]),
            ]
        )
        layers = tf.constant(list(self._layer_of_channel))

        def of_channels(of_layers: tf.Tensor) -> tf.Tensor:
            return tf.gather(of_layers, layers)

        exceptions = tf.cast(tf.reduce_any(~tf.math.is_finite(own), 0), self._dtype)
        n_layers = self.counts.shape[0]
        finite = tf.math.unsorted_segment_sum(exceptions, layers, n_layers) == 0
        weights = tf.cast(finite, self._dtype)
        (totals,) = sum_over_replicas([weights])
        fractions = [of_channels(tf.math.divide_no_nan(weights, totals))]
        own = tf.where(of_channels(finite), own, tf.zeros_like(own))
        nothing = tf.zeros_like(own[0])
        (mean,), (deviation,) = mean_over_replicas([(own[0], nothing)], fractions)
        # One addition after the last reduction: of more, TensorFlow's graph optimizer may change
        # the order, and that on one replica only.
        (variance,), _ = mean_over_replicas([(own[1] + tf.square(deviation), nothing)], fractions)
        counts, averages = LocalCopy(self.counts), LocalCopy(self.averages)
        count = counts.read() + tf.cast(totals > 0, tf.int64)
        counts.assign(count)
        step = tf.stack([mean, variance]) - averages.read()
        step /= of_channels(tf.cast(tf.maximum(count, 1), step.dtype))
        averages.add(tf.where(of_channels(totals > 0), step, tf.zeros_like(step)))

    def copy(self) -> None:
        """Assign the average to the layers."""
        mean, variance = tf.unstack(LocalCopy(self.averages).read())
        channels = [tf.TensorShape([layer.channels]) for layer in self._layers]
        values: list[tf.Tensor] = []
        for layer, *mean_variance in zip(
            self._layers, unpack(mean, channels), unpack(variance, channels), strict=True
        ):
            values += mean_variance
            if layer.renorm is not None:
                values += 2 * [tf.sqrt(mean_variance[1] + layer.epsilon)]
        (is_trained,) = self._is_trained
        chosen = tf.logical_and(LocalCopy(self.counts).read() > 0, LocalCopy(is_trained).read())
        chosen = tf.gather(chosen, list(self._layer_of_statistic))
        self._write(tf.where(chosen, pack(values), self._read(self._variables)))

    def remember(self) -> None:
        """Remember the statistics that the layers have."""
        (own,) = self._own
        LocalCopy(own).assign(self._read(self._variables))

    def restore(self) -> None:
        """Restore the statistics that were remembered."""
        (own,) = self._own
        self._write(LocalCopy(own).read())

    @property
    def _variables(self) -> list[tf.Variable]:
        return [v for layer in self._layers for v in layer.variables]

    def _read(self, variables: Sequence[tf.Variable]) -> tf.Tensor:
        return pack([tf.cast(LocalCopy(v).read(), self._dtype) for v in variables])

    def _write(self, packed: tf.Tensor) -> None:
        values = unpack(packed, [v.shape for v in self._variables])
        for variable, value in zip(self._variables, values, strict=True):
            LocalCopy(variable).assign(tf.cast(value, variable.dtype))


def _repeated(times: Sequence[int]) -> list[int]:
    """Return 0, 1, 2 and so on, each so many times."""
    return [i for i, n in enumerate(times) for _ in range(n)]
