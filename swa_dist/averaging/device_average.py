"""The average of weights on each replica: its buffers, and the graphs that work on them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf

from swa_dist.averaging.own_weights import OwnWeights
from swa_dist.averaging.packing import Group, Layout, buffer_dtype, groups_of
from swa_dist.distribution import LocalCopy, Untracked, local_variable
from swa_dist.replica_function import ReplicaFunction

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
        buffers: One for each group of weights: the sum of their values, or their mean; the weights
            themselves while the model has the average.
        count: Updates in the average.
        divisor: Divisor that turns a buffer into the average: the terms of the sum, as long as it
            grows; 1 after a swap.
        buffers_layout: What is in each buffer. A checkpoint of other buffers is refused.
    """

    def __init__(self, variables: Sequence[tf.Variable], strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._weights = Untracked(variables)
        self._groups = Untracked(groups_of(variables))
        self._own_weights = OwnWeights(strategy)
        with strategy.scope():
            self.buffers = [
                local_variable(tf.zeros(group.shape, group.buffer_dtype)) for group in self._groups
            ]
            self.count = local_variable(tf.zeros([], tf.int64))
            self.divisor = local_variable(tf.zeros([], tf.int64))
            # While the average is in the model, the buffers hold the weights. Weights narrower
            # than their buffer could not hold the average, which stays in the buffer.
            self._narrow = Untracked(
                local_variable(tf.zeros(group.shape, group.dtype)) if group.is_narrow else None
                for group in self._groups
            )
        in_buffers = {f"buffer {i}": str(group) for i, group in enumerate(self._groups, 1)}
        self.buffers_layout = Layout({**self.layout, **in_buffers})
        self._update = ReplicaFunction(self._update_replica, strategy)
        self._copy = ReplicaFunction(self._copy_replica, strategy)
        self._normalize = ReplicaFunction(self._normalize_replica, strategy)
        self._swap = ReplicaFunction(self._swap_replica, strategy)

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
        return next(
            (i for i, v in enumerate(self._weights) if not _all_finite([v.read_value()])), None
        )

    def _update_replica(self) -> None:
        self._own_weights.assertion("`update` must be called")
        groups = self._local_groups()
        # One value that is not finite spoils a mean, so all are checked before any is added. The
        # replicas hold the same values, so that each decides alone, and alike.
        values = [group.read_weights() for group in groups]
        # TPUs ignore assertions.
        taken = tf.logical_and(LocalCopy(self._own_weights.flag).read(), _all_finite(values))
        count, divisor = LocalCopy(self.count), LocalCopy(self.divisor)
        terms = count.read()
        # After a swap the buffers hold means, and stay means. The longest sum becomes a multiple of
        # the mean, and stays one.
        are_sums = tf.logical_and(divisor.read() == terms, terms < _LONGEST_SUM)

        def add_to_sums() -> None:
            done: list[tf.Operation] = []
            for group, value in zip(groups, values, strict=True):
                with tf.control_dependencies(done):
                    added = group.buffer.add(tf.cast(value, group.buffer.dtype))
                if group.narrow:
                    done = [added]  # one converted copy in memory at a time
            count.assign(terms + 1)
            divisor.assign(terms + 1)

        def move_means() -> None:
            n, d = _cast_once(terms + 1), _cast_once(divisor.read())
            part = functools.cache(lambda dtype: 1 / n(dtype))
            minus_part = functools.cache(lambda dtype: -d(dtype) * part(dtype))
            done: list[tf.Operation] = []
            for group, value in zip(groups, values, strict=True):
                buffer, dtype = group.buffer, group.buffer.dtype
                # a - a / n + w / n, and not a - (a - w) / n, whose single rounding has the same
                # sign each time if w drifts. Those of a - a / n do not, as a / n is another
                # fraction of a in each update. The buffer is a times the divisor, a power of two.
                with tf.control_dependencies(done):
                    shrunk = buffer.subtract(buffer.read() * part(dtype))
                with tf.control_dependencies([shrunk]):
                    done = [buffer.subtract_multiple(minus_part(dtype), tf.cast(value, dtype))]
            count.assign(terms + 1)

        # One choice of three, not nested ones: each captures every variable.
        tf.switch_case(
            tf.where(taken, tf.where(are_sums, 1, 2), 0), [lambda: None, add_to_sums, move_means]
        )

    def _copy_replica(self) -> None:
        own = self._own_weights.assertion("`copy_to_model` must be called")
        with tf.control_dependencies([own]):
            has_own_weights = LocalCopy(self._own_weights.flag).read()
        groups, terms = self._local_groups(), LocalCopy(self.divisor).read()

        def copy() -> None:
            divisor = _cast_once(terms)
            _one_by_one(
                groups,
                lambda group: group.assign_weights(
                    group.buffer.read() / divisor(group.buffer.dtype)
                ),
            )

        # TPUs ignore assertions. Without an update there is nothing to copy.
        tf.cond(tf.logical_and(has_own_weights, terms > 0), copy, lambda: None)

    def _normalize_replica(self) -> None:
        groups, divisor = self._local_groups(), LocalCopy(self.divisor)
        terms = divisor.read()

        def divide() -> None:
            d = _cast_once(terms)

            def divide_one(group: _LocalGroup) -> list[tf.Operation]:
                return [group.buffer.assign(group.buffer.read() / d(group.buffer.dtype))]

            _one_by_one(groups, divide_one)
            divisor.assign(tf.ones_like(terms))

        tf.cond(terms > 1, divide, lambda: None)

    def _swap_replica(self) -> None:
        flag = LocalCopy(self._own_weights.flag)
        has_own_weights = flag.read()

        def swap(group: _LocalGroup) -> list[tf.Operation]:
            weights, others = group.read_weights(), group.buffer.read()
            if group.narrow:
                others = tf.where(
                    has_own_weights, tf.cast(others, group.narrow.dtype), group.narrow.read()
                )
            with tf.control_dependencies([weights, others]):
                kept = (group.narrow or group.buffer).assign(weights)
                return [*group.assign_weights(others), kept]

        _one_by_one(self._local_groups(), swap)
        flag.assign(tf.logical_not(has_own_weights))

    def _local_groups(self) -> list["_LocalGroup"]:
        weights = [LocalCopy(v) for v in self._weights]
        return [
            _LocalGroup(
                group,
                [weights[i] for i in group.indices],
                LocalCopy(buffer),
                None if narrow is None else LocalCopy(narrow),
            )
            for group, buffer, narrow in zip(self._groups, self.buffers, self._narrow, strict=True)
        ]


class _LocalGroup(NamedTuple):
    """What a replica has of a group: the weights, their buffer, and a copy of narrow ones."""

    group: Group
    weights: list[LocalCopy]
    buffer: LocalCopy
    narrow: LocalCopy | None

    def read_weights(self) -> tf.Tensor:
        return self.group.pack([weight.read() for weight in self.weights])

    def assign_weights(self, packed: tf.Tensor) -> list[tf.Operation]:
        values = self.group.unpack(tf.cast(packed, self.group.dtype))
        return [weight.assign(value) for weight, value in zip(self.weights, values, strict=True)]


def _one_by_one(
    groups: Iterable[_LocalGroup], change: Callable[[_LocalGroup], list[tf.Operation]]
) -> None:
    """Change the groups one after the other, so that no more than one is in memory twice."""
    done: list[tf.Operation] = []
    for group in groups:
        with tf.control_dependencies(done):
            done = change(group)


def _cast_once(value: tf.Tensor) -> Callable[[tf.DType], tf.Tensor]:
    """Return a function that converts a number to a dtype, by one operation for all its calls."""
    return functools.cache(lambda dtype: tf.cast(value, dtype))


def _all_finite(values: Iterable[tf.Tensor]) -> tf.Tensor:
    """Return whether the sum of each tensor is finite: that reads memory once."""
    totals: dict[tf.DType, list[tf.Tensor]] = {}
    axes = functools.cache(lambda rank: tf.constant([*range(rank)], tf.int32))
    done: list[tf.Tensor] = []
    for value in values:
        dtype = buffer_dtype(value.dtype)
        with tf.control_dependencies(done):
            total = tf.raw_ops.Sum(input=tf.cast(value, dtype), axis=axes(value.shape.rank))
        if dtype != value.dtype:
            done = [total]  # one converted copy in memory at a time
        totals.setdefault(dtype, []).append(total)
    parts = [
        part
        for dtype, ts in totals.items()
        for part in ([tf.math.real(ts), tf.math.imag(ts)] if dtype.is_complex else [tf.stack(ts)])
    ]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in parts])
