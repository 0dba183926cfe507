"""The running average of a model's weights, kept on every replica."""

from collections.abc import Sequence

import tensorflow as tf

from swa_dist.replicas import ReplicaFunction, Untracked, local_variable, read


class WeightAverage(tf.Module):
    """Average of the values that variables had at each `update`.

    The buffers are sums, mirrored like the variables. A sum in place moves three streams of memory
    for each update (read the sum, read the variable, write the sum), fewer than a running mean.
    Every replica reads and writes its own copies only: nothing is sent between replicas or to the
    host, and equal inputs keep the copies bitwise equal. A `tf.train.Checkpoint` of it holds the
    buffers, and not the variables.

    Args:
        variables: `tf.Variable`s of floating dtype, in any order.
        strategy: The `tf.distribute.Strategy` under which they were created.

    Distribution:
        Call everything in cross-replica context, on every worker.

    Reference:
        Izmailov et al., arXiv 1803.05407, Algorithm 1: w_SWA is the mean of the w visited.
    """

    def __init__(self, variables: Sequence[tf.Variable], strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._averaged = Untracked(variables)
        self._strategy = strategy
        with strategy.scope():
            self.sums = [
                local_variable(tf.zeros(v.shape, _sum_dtype(v.dtype))) for v in self._averaged
            ]
            self.count = local_variable(tf.zeros([], tf.int64))
        self._update = ReplicaFunction(self._update_replica, strategy)
        self._copy = ReplicaFunction(self._copy_replica, strategy)

    @property
    def averaged(self) -> dict[int, tf.Variable]:
        """The variables that are averaged, by `id`: they compare by value."""
        return {id(v): v for v in self._averaged}

    @property
    def layout(self) -> dict[str, str]:
        """What each variable is, in words: averages of other variables cannot be taken up."""
        return {
            f"weight {i}": f"{tuple(v.shape)} {v.dtype.name}"
            for i, v in enumerate(self._averaged, 1)
        }

    @property
    def n_averaged(self) -> int:
        """Number of updates in the average."""
        return read(self.count, self._strategy)

    def update(self) -> None:
        """Take the variables' present values into the average, if all of them are finite.

        Values are taken for finite where their sum is: one look at memory, and no temporary.
        """
        self._update()

    def first_non_finite(self) -> int | None:
        """Return the position of the first variable that `update` does not take for finite."""
        sums = (_sum(v) for v in self._averaged)
        return next((i for i, s in enumerate(sums) if not tf.math.is_finite(s)), None)

    def copy_to_model(self) -> None:
        """Assign the average to the variables, on every replica. The average stays as it is."""
        self._copy()

    def _update_replica(self) -> None:
        # A mean with one value that is not finite is lost, so all are looked at before any is
        # added. The replicas hold the same values: each decides alone, and alike.
        finite: list[tf.Tensor] = []
        for variable in self._averaged:
            # One converted copy in memory at a time.
            with tf.control_dependencies(finite[-1:] if variable.dtype.size < 4 else []):
                finite.append(tf.math.is_finite(_sum(variable)))
        tf.cond(tf.reduce_all(finite), self._add_replica, lambda: None)

    def _add_replica(self) -> None:
        self.count.assign_add(1)
        done: list[tf.Operation] = []
        for total, variable in zip(self.sums, self._averaged, strict=True):
            with tf.control_dependencies(done):
                value = tf.cast(variable, total.dtype)
                added = total.assign_add(value, read_value=False)
            if variable.dtype != total.dtype:
                done = [added]  # one converted copy in memory at a time

    def _copy_replica(self) -> None:
        done: list[tf.Operation] = []
        for total, variable in zip(self.sums, self._averaged, strict=True):
            with tf.control_dependencies(done):
                mean = total / tf.cast(self.count, total.dtype)
                assigned = variable.assign(tf.cast(mean, variable.dtype), read_value=False)
            done = [assigned]  # one quotient in memory at a time


def _sum(variable: tf.Variable) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(variable, _sum_dtype(variable.dtype)))


def _sum_dtype(dtype: tf.DType) -> tf.DType:
    return dtype if dtype.size > tf.float32.size else tf.float32
