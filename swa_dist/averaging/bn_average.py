"""The average of the moving statistics that batch normalization layers have at the snapshots."""

from collections.abc import Sequence

import tensorflow as tf

from swa_dist.averaging.packing import Layout
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.layer_group import LayerGroup
from swa_dist.distribution import (
    LocalCopy,
    Untracked,
    local_variable,
)
from swa_dist.replica_function import Communicating, ReplicaFunction, mean_over_replicas


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
        momentum: Weight of a snapshot relative to the next one's, in (0, 1]; 1: all are equal.

    Attributes:
        groups: The average of all layers whose statistics are of one dtype.
        buffers_layout: What is in their buffers. A checkpoint of other ones is refused.

    Distribution:
        Call everything in cross-replica context, on every worker. `update` communicates.
    """

    def __init__(
        self,
        layers: Sequence[BatchNormLayer],
        strategy: tf.distribute.Strategy,
        momentum: float = 1.0,
    ) -> None:
        super().__init__()
        self._layers = Untracked(layers)
        self._momentum = momentum
        with strategy.scope():
            self._shares = Untracked([local_variable(tf.zeros([2], tf.float64))])
            self.groups = [_GroupAverage(group) for group in LayerGroup.of(layers)]
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

    def update(self, snapshots: int = 1) -> None:
        """Average the layers' present statistics with the earlier ones.

        Args:
            snapshots: The last snapshots, for which they stand.
        """
        kept = self._momentum**snapshots
        for variable in self._shares:
            variable.assign([kept, snapshots if kept == 1 else 1 - kept])
        self._update()

    def copy_to_model(self) -> None:
        """Assign the average to the layers, on every replica.

        A layer without one keeps its own, and so does one that was frozen meanwhile.
        """
        for group in self.groups:
            group.note_frozen_layers()
        self._copy()

    def remember(self) -> None:
        """Remember the statistics that the layers have, on each replica its own."""
        self._remember()

    def restore(self) -> None:
        """Restore the statistics that were remembered."""
        self._restore()

    def _update_replica(self) -> Communicating[None]:
        (shares,) = self._shares
        kept, gained = tf.unstack(LocalCopy(shares).read())
        for group in self.groups:
            yield from group.update(kept, gained)

    def _copy_replica(self) -> None:
        for group in self.groups:
            group.copy()

    def _remember_replica(self) -> None:
        for group in self.groups:
            group.remember()

    def _restore_replica(self) -> None:
        for group in self.groups:
            group.restore()


class _GroupAverage(tf.Module):
    """The average of BN layers whose statistics are of one dtype.

    Args:
        group: The layers.

    Attributes:
        weights: The snapshots' weights in each layer's average: with equal ones, their number.
        averages: Means of all layers' channels, and their variances.

    Distribution:
        Create it in the strategy's scope. All but `note_frozen_layers` is for replica context.
    """

    def __init__(self, group: LayerGroup) -> None:
        super().__init__()
        self._group = group
        n_layers = len(group.layers)
        self.weights = local_variable(tf.zeros([n_layers], group.dtype))
        self.averages = local_variable(tf.zeros([2, sum(group.channels)], group.dtype))
        self._own = Untracked([local_variable(tf.zeros([group.n_statistics], group.dtype))])
        self._is_trained = Untracked([local_variable(tf.fill([n_layers], True))])

    def note_frozen_layers(self) -> None:
        """Have `copy` leave the layers alone that are frozen by now."""
        # In a variable: a graph would keep what was true when it was traced.
        trained = [bool(layer.keras_layer.trainable) for layer in self._group.layers]
        for variable in self._is_trained:
            variable.assign(trained)

    def update(self, kept: tf.Tensor, gained: tf.Tensor) -> Communicating[None]:
        """Average the layers' present statistics with the earlier ones.

        Args:
            kept: What the earlier ones keep of their weight.
            gained: Weight of the present ones.
        """
        group = self._group
        own = group.read_mean_and_variance()
        finite = ~group.any_channel(tf.reduce_any(~tf.math.is_finite(own), 0))
        counts = tf.cast(finite, group.dtype)
        (totals,) = yield [counts]
        fractions = [group.of_each_channel(tf.math.divide_no_nan(counts, totals))]
        own = tf.where(group.of_each_channel(finite), own, tf.zeros_like(own))
        nothing = tf.zeros_like(own[0])
        (mean,), (deviation,) = yield from mean_over_replicas([(own[0], nothing)], fractions)
        # One addition after the last reduction: of more, TensorFlow's graph optimizer may change
        # the order, and that on one replica only.
        (variance,), _ = yield from mean_over_replicas(
            [(own[1] + tf.square(deviation), nothing)], fractions
        )
        weights, averages = LocalCopy(self.weights), LocalCopy(self.averages)
        counted = totals > 0
        kept, gained = (tf.cast(share, group.dtype) for share in (kept, gained))
        weight = tf.where(counted, kept * weights.read() + gained, weights.read())
        weights.assign(weight)
        step = tf.stack([mean, variance]) - averages.read()
        step *= group.of_each_channel(tf.math.divide_no_nan(gained, weight))
        averages.add(tf.where(group.of_each_channel(counted), step, tf.zeros_like(step)))

    def copy(self) -> None:
        """Assign the average to the layers."""
        group = self._group
        average = group.statistics_of(*tf.unstack(LocalCopy(self.averages).read()))
        (is_trained,) = self._is_trained
        chosen = tf.logical_and(LocalCopy(self.weights).read() > 0, LocalCopy(is_trained).read())
        chosen = group.of_each_statistic(chosen)
        group.write_statistics(tf.where(chosen, average, group.read_statistics()))

    def remember(self) -> None:
        """Remember the statistics that the layers have."""
        (own,) = self._own
        LocalCopy(own).assign(self._group.read_statistics())

    def restore(self) -> None:
        """Restore the statistics that were remembered."""
        (own,) = self._own
        self._group.write_statistics(LocalCopy(own).read())
