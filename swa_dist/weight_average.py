"""The running average of a model's weights, kept on every replica."""

from collections.abc import Sequence

import tensorflow as tf

from swa_dist.replicas import ReplicaFunction, local_variable, read


class WeightAverage:
    """Average of the values that variables had at each `update`.

    The buffers are sums, mirrored like the variables. A sum in place moves three streams of memory
    for each update (read the sum, read the variable, write the sum), fewer than a running mean.
    Every replica reads and writes its own copies only: nothing is sent between replicas or to the
    host, and equal inputs keep the copies bitwise equal.

    Args:
        variables: `tf.Variable`s of floating dtype, in any order.
        strategy: The `tf.distribute.Strategy` under which they were created.

    Distribution:
        Call everything in cross-replica context, on every worker.

    Reference:
        Izmailov et al., arXiv 1803.05407, Algorithm 1: w_SWA is the mean of the w visited.
    """

    def __init__(self, variables: Sequence[tf.Variable], strategy: tf.distribute.Strategy) -> None:
        self._variables = list(variables)
        self._strategy = strategy
        with strategy.scope():
            self._sums = [
                local_variable(tf.zeros(v.shape, _sum_dtype(v.dtype))) for v in self._variables
            ]
            self._count = local_variable(tf.zeros([], tf.int64))
        self._update = ReplicaFunction(self._update_replica, strategy)
        self._copy = ReplicaFunction(self._copy_replica, strategy)

    @property
    def n_averaged(self) -> int:
        """Number of updates in the average."""
        return read(self._count, self._strategy)

    def update(self) -> None:
        """Take the variables' present values into the average."""
        self._update()

    def copy_to_model(self) -> None:
        """Assign the average to the variables, on every replica. The average stays as it is."""
        self._copy()

    def _update_replica(self) -> None:
        self._count.assign_add(1)
        done: list[tf.Operation] = []
        for total, variable in zip(self._sums, self._variables, strict=True):
            with tf.control_dependencies(done):
                value = tf.cast(variable, total.dtype)
                added = total.assign_add(value, read_value=False)
            if variable.dtype != total.dtype:
                done = [added]  # one converted copy in memory at a time

    def _copy_replica(self) -> None:
        done: list[tf.Operation] = []
        for total, variable in zip(self._sums, self._variables, strict=True):
            with tf.control_dependencies(done):
                mean = total / tf.cast(self._count, total.dtype)
                assigned = variable.assign(tf.cast(mean, variable.dtype), read_value=False)
            done = [assigned]  # one quotient in memory at a time


def _sum_dtype(dtype: tf.DType) -> tf.DType:
    return dtype if dtype.size > tf.float32.size else tf.float32
