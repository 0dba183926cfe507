"""How much data a training step is fed, counted where it is fed."""

from typing import Any

import tensorflow as tf

from swa_dist.replicas import ReplicaFunction, local_variable, read, sum_over_replicas
from swa_dist.train_function import TrainFunction, shadowed


class CountingTrainFunction(TrainFunction):
    """A model's train function that also counts batches and rows.

    The counting is part of the traced step, one scalar for each replica and batch: it costs no
    synchronization, needs nothing from the data, and knows the ragged last batch, a generator's
    moods and every one of the batches in an execution of `steps_per_execution`.

    Args:
        model: A compiled Keras model.
    """

    def __init__(self, model: Any) -> None:
        self._strategy = model.distribute_strategy
        with self._strategy.scope():
            # Each replica has its worker's mean over replicas, so that they add up to the whole.
            self._largest = local_variable(tf.zeros([]))
            self._batches = local_variable(tf.zeros([], tf.int64))
            self._empty_shares = local_variable(tf.zeros([], tf.int64))
            self._total = local_variable(tf.zeros([], tf.int64))
        self._add_up = ReplicaFunction(self._add_up_replica, self._strategy)
        train_step = model.train_step

        def counted_train_step(data):  # type: ignore[no-untyped-def]
            self._count(data)
            return train_step(data)

        super().__init__(model, lambda: shadowed([(model, "train_step", counted_train_step)]))

    @property
    def largest_batch(self) -> int:
        """Rows of the largest global batch since `reset`; 0 if there was none with rows.

        With several workers it is the sum of each worker's largest. Every worker must ask.
        """
        self._add_up()
        return read(self._total, self._strategy)

    @property
    def batches(self) -> int:
        """Global batches since `reset`."""
        return read(self._batches, self._strategy)

    @property
    def empty_shares(self) -> int:
        """Batches since `reset` of which some replica got no rows."""
        return read(self._empty_shares, self._strategy)

    def reset(self) -> None:
        """Forget what was counted."""
        for variable in (self._largest, self._batches, self._empty_shares):
            variable.assign(0)

    def _add_up_replica(self) -> None:
        (total,) = sum_over_replicas([self._largest.read_value()])
        self._total.assign(tf.cast(tf.round(total), tf.int64))

    @tf.autograph.experimental.do_not_convert
    def _count(self, data: Any) -> None:
        context = tf.distribute.get_replica_context()
        share, without = context.merge_call(_local_rows, args=(rows(data),))
        # At the end of the data the step is run once more and fails for want of a batch. Nothing
        # may be counted then, not even where the number of rows is static.
        fed = [t for t in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(t)]
        with tf.control_dependencies(fed):
            self._largest.assign(tf.maximum(self._largest, share))
            self._batches.assign_add(1)
            self._empty_shares.assign_add(without)


def rows(element: Any) -> tf.Tensor:
    """Return the number of rows of a batch, or of one replica's share of it.

    Args:
        element: Tensors, ragged and sparse ones included, or NumPy arrays, in any structure. The
            first that is no scalar counts.

    Returns:
        An int64 scalar; 0 if there is no such thing.
    """
    for leaf in tf.nest.flatten(element):
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(leaf.nrows(), tf.int64)
        if isinstance(leaf, tf.SparseTensor):
            return leaf.dense_shape[0]
        if tf.is_tensor(leaf):
            if leaf.shape.rank != 0:
                return tf.shape(leaf, tf.int64)[0]
        elif getattr(leaf, "shape", ()):
            return tf.constant(leaf.shape[0], tf.int64)
    return tf.zeros([], tf.int64)


def _local_rows(strategy: tf.distribute.Strategy, rows: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the mean rows of this worker's replicas, and 1 if one of them has none, else 0."""
    local = tf.stack(strategy.experimental_local_results(rows))
    mean = tf.reduce_mean(tf.cast(local, tf.float32))
    return mean, tf.cast(tf.reduce_min(local) == 0, tf.int64)
