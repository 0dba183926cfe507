"""The average of the moving statistics that batch normalization layers have at the snapshots."""

from collections.abc import Sequence

import tensorflow as tf

from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.distribution import (
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

    Distribution:
        Call everything in cross-replica context, on every worker. `update` communicates.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._layers = Untracked(layers)
        with strategy.scope():
            self.counts = [local_variable(tf.zeros([], tf.int64)) for _ in layers]
            self.averages = [
                local_variable(tf.zeros([2, layer.channels], layer.dtype)) for layer in layers
            ]
            self._own = Untracked(
                [local_variable(tf.zeros(v.shape, v.dtype)) for v in layer.variables]
                for layer in layers
            )
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
        """Assign the average to the layers, on every replica. A layer without one keeps its own."""
        self._copy()

    def remember(self) -> None:
        """Remember the statistics that the layers have, on each replica its own."""
        self._remember()

    def restore(self) -> None:
        """Restore the statistics that were remembered."""
        self._restore()

    def _update_replica(self) -> None:
        own = [layer.statistics() for layer in self._layers]
        finite = [tf.reduce_all(tf.math.is_finite(mean_variance)) for mean_variance in own]
        weights = [tf.cast(f, s.dtype) for f, s in zip(finite, own, strict=True)]
        totals = sum_over_replicas(weights)
        fractions = [tf.math.divide_no_nan(w, n) for w, n in zip(weights, totals, strict=True)]
        own = [tf.where(f, s, tf.zeros_like(s)) for f, s in zip(finite, own, strict=True)]

        def mean_of(values: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            return mean_over_replicas([(v, tf.zeros_like(v)) for v in values], fractions)

        means, deviations = mean_of([s[0] for s in own])
        # One addition after the last reduction: of more, TensorFlow's graph optimizer may change
        # the order, and that on one replica only.
        variances, _ = mean_of([s[1] + tf.square(d) for s, d in zip(own, deviations, strict=True)])
        for count, average, n, mean, variance in zip(
            self.counts, self.averages, totals, means, variances, strict=True
        ):
            count.assign_add(tf.cast(n > 0, tf.int64))
            step = tf.stack([mean, variance]) - average
            step /= tf.cast(tf.maximum(count, 1), step.dtype)
            average.assign_add(tf.where(n > 0, step, tf.zeros_like(step)))

    def _copy_replica(self) -> None:
        for layer, count, average in zip(self._layers, self.counts, self.averages, strict=True):
            if not layer.keras_layer.trainable:  # frozen meanwhile
                continue
            layer.assign(average[0], average[1], where=count > 0)

    def _remember_replica(self) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            for variable, remembered in zip(layer.variables, own, strict=True):
                remembered.assign(variable)

    def _restore_replica(self) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            for variable, remembered in zip(layer.variables, own, strict=True):
                variable.assign(remembered)
