"""How much data a training step is fed, counted on the device in the step itself."""

from typing import Any

import tensorflow as tf

from swa_dist.data.data_kinds import count_samples
from swa_dist.distribution import local_variable, read_local
from swa_dist.protocols import Model
from swa_dist.replica_function import Communicating, ReplicaFunction
from swa_dist.training.patches import patched
from swa_dist.training.train_function import TrainFunction


class SampleCounter(TrainFunction):
    """A model's train function that also counts batches and samples.

    Counting is part of the traced step. So it is right for partial last batches, generators and
    several steps per execution, and the host need not wait for the device.

    Args:
        model: A compiled Keras model.
    """

    def __init__(self, model: Model) -> None:
        self._strategy = model.distribute_strategy
        with self._strategy.scope():
            # Each replica has the mean over its worker's replicas: these add up to the whole.
            self._largest = local_variable(tf.zeros([]))
            self._batches = local_variable(tf.zeros([], tf.int64))
            self._batches_with_empty_replica = local_variable(tf.zeros([], tf.int64))
            self._total = local_variable(tf.zeros([], tf.int64))
        self._sum = ReplicaFunction(self._sum_replica, self._strategy)
        train_step = model.train_step

        def counted_train_step(data):  # type: ignore[no-untyped-def]
            self.count(data)
            return train_step(data)

        super().__init__(model, lambda: patched([(model, "train_step", counted_train_step)]))

    @classmethod
    def install_in(cls, model: Model) -> "SampleCounter":
        """Return a counter that is the model's train function, at 0; the one it has, if it has one.

        `fit` has just made the train function that is replaced, and not traced it yet.
        """
        counter = model.train_function
        if not isinstance(counter, cls):
            counter = cls(model)
            counter.install()
        counter.reset()
        return counter

    @property
    def largest_batch(self) -> int:
        """Samples in the largest global batch since `reset`; 0 if there was none with samples.

        With several workers it is the sum of each worker's largest. Every worker must ask.
        """
        self._sum()
        return read_local(self._total, self._strategy)

    @property
    def batches(self) -> int:
        """Global batches since `reset`."""
        return read_local(self._batches, self._strategy)

    @property
    def batches_with_empty_replica(self) -> int:
        """Batches since `reset` of which some replica got no samples."""
        return read_local(self._batches_with_empty_replica, self._strategy)

    def reset(self) -> None:
        """Set all counts to 0."""
        for variable in (self._largest, self._batches, self._batches_with_empty_replica):
            variable.assign(0)

    def _sum_replica(self) -> Communicating[None]:
        (total,) = yield [self._largest.read_value()]
        self._total.assign(tf.cast(tf.round(total), tf.int64))

    @tf.autograph.experimental.do_not_convert
    def count(self, data: Any) -> None:
        """Count a batch, in the training step that it is fed to, on each replica."""
        context = tf.distribute.get_replica_context()
        samples, is_empty = context.merge_call(_local_samples, args=(count_samples(data),))
        # At the end of the data the step runs once more, and fails for want of a batch. It must not
        # be counted, not even where the number of samples is static.
        with tf.control_dependencies(batch_tensors(data)):
            self._largest.assign(tf.maximum(self._largest, samples))
            self._batches.assign_add(1)
            self._batches_with_empty_replica.assign_add(is_empty)


def _local_samples(strategy: tf.distribute.Strategy, samples: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the mean over this worker's replicas, and 1 if one of them has no samples, else 0."""
    local = tf.stack(strategy.experimental_local_results(samples))
    mean = tf.reduce_mean(tf.cast(local, tf.float32))
    return mean, tf.cast(tf.reduce_min(local) == 0, tf.int64)


def batch_tensors(data: Any) -> list[tf.Tensor]:
    """Return the tensors in a batch: what depends on them runs only if there is one."""
    return [t for t in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(t)]
