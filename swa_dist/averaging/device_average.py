"""The average of weights on each replica: its buffers, and the graphs that work on them."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from swa_dist.averaging.own_weights import OwnWeights
from swa_dist.distribution import ReplicaFunction, Untracked, local_variable

# Updates for which the buffers are sums. A sum needs less memory traffic than a running mean, but
# loses digits as it grows; if weights hardly move, all rounding errors have the same sign.
_LONGEST_SUM = 32


class DeviceAverage(tf.Module):
    """The part of a `WeightAverage` that runs on the devices.

    Every replica reads and writes its own copies only; nothing is sent between them.

    Args:
        variables: The weights.
        strategy: The `tf.distribute.Strategy` under which they were created.

    Attributes:
        buffers: One per weight: the sum of its values, or their mean; the weight itself while the
            model has the average.
        count: Updates in the average.
        divisor: Divisor that turns a buffer into the average: the terms of a sum, or 1 for a mean.
    """

    def __init__(self, variables: Sequence[tf.Variable], strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._weights = Untracked(variables)
        self._own_weights = OwnWeights(strategy)
        with strategy.scope():
            self.buffers = [
                local_variable(tf.zeros(v.shape, _buffer_dtype(v.dtype))) for v in variables
            ]
            self.count = local_variable(tf.zeros([], tf.int64))
            self.divisor = local_variable(tf.zeros([], tf.int64))
            # While the average is in the model, the buffers hold the weights. A weight narrower
            # than its buffer could not hold the average, which stays in the buffer.
            self._narrow = Untracked(
                local_variable(tf.zeros(v.shape, v.dtype)) if _is_narrow(v) else None
                for v in variables
            )
        self._update = ReplicaFunction(self._update_replica, strategy)
        self._copy = ReplicaFunction(self._copy_replica, strategy)
        self._normalize = ReplicaFunction(self._normalize_replica, strategy)
        self._swap_in = ReplicaFunction(self._swap_in_replica, strategy)
        self._swap_out = ReplicaFunction(self._swap_out_replica, strategy)

    @property
    def weights(self) -> list[tf.Variable]:
        """The weights that are averaged."""
        return list(self._weights)

    @property
    def layout(self) -> dict[str, str]:
        """What each weight is, in words: averages of other weights cannot be restored."""
        return {
            f"weight {i}": f"{tuple(v.shape)} {v.dtype.name}"
            for i, v in enumerate(self._weights, 1)
        }

    def first_non_finite(self) -> int | None:
        """Return the index of the first weight whose values do not count as finite."""
        return next((i for i, v in enumerate(self._weights) if not _is_finite(v)), None)

    def _update_replica(self) -> None:
        self._own_weights.assertion("`update` must be called")
        # One value that is not finite spoils a mean, so all are checked before any is added. The
        # replicas hold the same values, so that each decides alone, and alike.
        finite: list[tf.Tensor] = []
        for variable in self._weights:
            # One converted copy in memory at a time.
            with tf.control_dependencies(finite[-1:] if _is_narrow(variable) else []):
                finite.append(_is_finite(variable))
        # TPUs ignore assertions.
        taken = tf.reduce_all([self._own_weights.flag, *finite])
        # After a swap the buffers hold means, and stay means.
        terms = self.count.read_value()
        are_sums = tf.logical_and(self.divisor == terms, terms < _LONGEST_SUM)
        # One choice of three, not nested ones: each captures every variable.
        tf.switch_case(
            tf.where(taken, tf.where(are_sums, 1, 2), 0),
            [lambda: None, self._add_to_sums, self._move_means],
        )

    def _add_to_sums(self) -> None:
        self.count.assign_add(1)
        done: list[tf.Operation] = []
        for buffer, variable in zip(self.buffers, self._weights, strict=True):
            with tf.control_dependencies(done):
                value = tf.cast(variable, buffer.dtype)
                added = buffer.assign_add(value, read_value=False)
            if _is_narrow(variable):
                done = [added]  # one converted copy in memory at a time
        self.divisor.assign(self.count)

    def _move_means(self) -> None:
        self.count.assign_add(1)

        def move(buffer: tf.Variable, variable: tf.Variable, _: Any) -> tf.Operation:
            # Not a - (a - w) / n, whose single rounding has the same sign each time if w drifts.
            # Those of a - a / n do not, as a / n is another fraction of a in each update.
            average, n = self._average(buffer), tf.cast(self.count, buffer.dtype)
            return buffer.assign(average - average / n + tf.cast(variable, buffer.dtype) / n)

        self._each(move)
        self.divisor.assign(1)

    def _copy_replica(self) -> None:
        own = self._own_weights.assertion("`copy_to_model` must be called")
        with tf.control_dependencies([own]):
            self._each(lambda buffer, v, _: v.assign(tf.cast(self._average(buffer), v.dtype)))

    def _normalize_replica(self) -> None:
        def divide() -> None:
            self._each(lambda buffer, *_: buffer.assign(self._average(buffer)))
            self.divisor.assign(1)

        tf.cond(self.divisor > 1, divide, lambda: None)

    def _swap_in_replica(self) -> None:
        def swap(buffer: tf.Variable, variable: tf.Variable, narrow: Any) -> tf.Operation:
            average, weight = buffer.read_value(), variable.read_value()
            with tf.control_dependencies([average, weight]):
                kept = [variable.assign(tf.cast(average, variable.dtype))]
                kept += [(buffer if narrow is None else narrow).assign(weight)]
            return tf.group(kept)

        self._each(swap)
        self._own_weights.flag.assign(False)

    def _swap_out_replica(self) -> None:
        def swap(buffer: tf.Variable, variable: tf.Variable, narrow: Any) -> tf.Operation:
            if narrow is not None:
                return variable.assign(narrow)
            average, weight = variable.read_value(), buffer.read_value()
            with tf.control_dependencies([average, weight]):
                return tf.group(variable.assign(weight), buffer.assign(average))

        self._each(swap)
        self._own_weights.flag.assign(True)

    def _average(self, buffer: tf.Variable) -> tf.Tensor:
        return buffer / tf.cast(self.divisor, buffer.dtype)

    def _each(self, change: Callable[..., tf.Operation]) -> None:
        """Call `change` with each buffer, its weight, and the copy that a narrow weight has.

        One after the other, so that no more than one of them is in memory twice.
        """
        done: list[tf.Operation] = []
        for each in zip(self.buffers, self._weights, self._narrow, strict=True):
            with tf.control_dependencies(done):
                done = [change(*each)]


def _is_narrow(variable: tf.Variable) -> bool:
    return variable.dtype != _buffer_dtype(variable.dtype)


def _buffer_dtype(dtype: tf.DType) -> tf.DType:
    return dtype if dtype.size > tf.float32.size else tf.float32


def _is_finite(variable: tf.Variable) -> tf.Tensor:
    total = tf.reduce_sum(tf.cast(variable, _buffer_dtype(variable.dtype)))
    if total.dtype.is_complex:
        return tf.math.is_finite(tf.math.real(total)) & tf.math.is_finite(tf.math.imag(total))
    return tf.math.is_finite(total)
