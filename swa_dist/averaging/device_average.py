"""The average of weights on each replica: its buffers, and the graphs that work on them."""

import functools
from collections.abc import Iterable, Sequence

import tensorflow as tf

from swa_dist.averaging.own_weights import OwnWeights
from swa_dist.averaging.packing import Layout, buffer_dtype, groups_of
from swa_dist.averaging.sums import CompensatedMean, LocalGroup, RunningMean, Sum, one_by_one
from swa_dist.distribution import LocalCopy, Untracked, local_variable
from swa_dist.replica_function import ReplicaFunction


class DeviceAverage(tf.Module):
    """The part of a `WeightAverage` that runs on the devices.

    Every replica reads and writes its own copies only; nothing is sent between them.

    Args:
        variables: The weights.
        strategy: The `tf.distribute.Strategy` under which they were created.
        momentum: Weight of an update relative to the next one's, in (0, 1), or 1 for a mean of any
            number of updates: each needs two buffers. None: the mean of a few hundred, in one.

    Attributes:
        buffers: One for each group of weights: the sum of their values, or their mean; the weights
            themselves while the model has the average.
        remainders: With a momentum, what each buffer lacks; else empty.
        count: Updates in the average.
        divisor: Divisor that turns a buffer into the average; 1 after a swap.
        next_weight: With a momentum, the weight of the next update in the divisor; else None.
        buffers_layout: What is in each buffer. A checkpoint of other buffers is refused.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        strategy: tf.distribute.Strategy,
        momentum: float | None,
    ) -> None:
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
            self._sum: Sum = RunningMean() if momentum is None else CompensatedMean(momentum)
            self.divisor, self.next_weight = self._sum.divisor, self._sum.next_weight
            self.remainders = [
                local_variable(tf.zeros(group.shape, group.buffer_dtype))
                for group in self._groups
                if self._sum.has_remainders
            ]
            # While the average is in the model, the buffers hold the weights. Weights narrower
            # than their buffer could not hold the average, which stays in the buffer.
            self._narrow = Untracked(
                local_variable(tf.zeros(group.shape, group.dtype)) if group.is_narrow else None
                for group in self._groups
            )
        in_buffers = {f"buffer {i}": str(group) for i, group in enumerate(self._groups, 1)}
        kind = {} if momentum is None else {"momentum": repr(momentum)}
        self.buffers_layout = Layout({**self.layout, **in_buffers, **kind})
        self._update = ReplicaFunction(self.update_replica, strategy)
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

    def update_replica(self) -> None:
        """Average the weights that this replica has, if they are finite; in replica context."""
        self._own_weights.assertion("`update` must be called")
        groups = self._local_groups()
        # One value that is not finite spoils a mean, so all are checked before any is added. The
        # replicas hold the same values, so that each decides alone, and alike.
        values = [group.read_weights() for group in groups]
        # TPUs ignore assertions.
        taken = tf.logical_and(LocalCopy(self._own_weights.flag).read(), _all_finite(values))
        self._sum.add(groups, values, taken, LocalCopy(self.count))

    def _copy_replica(self) -> None:
        own = self._own_weights.assertion("`copy_to_model` must be called")
        with tf.control_dependencies([own]):
            has_own_weights = LocalCopy(self._own_weights.flag).read()
        groups, divisor = self._local_groups(), LocalCopy(self.divisor).read()

        def copy_one(group: LocalGroup) -> list[tf.Operation]:
            remainder = group.remainder and group.remainder.read()
            return group.assign_weights(self._sum.average(group.buffer.read(), remainder, divisor))

        # TPUs ignore assertions. Without an update there is nothing to copy.
        tf.cond(
            tf.logical_and(has_own_weights, divisor > 0),
            lambda: one_by_one(groups, copy_one),
            lambda: None,
        )

    def _normalize_replica(self) -> None:
        self._sum.normalize(self._local_groups())

    def _swap_replica(self) -> None:
        flag = LocalCopy(self._own_weights.flag)
        has_own_weights = flag.read()

        def swap(group: LocalGroup) -> list[tf.Operation]:
            weights, others = group.read_weights(), group.buffer.read()
            if group.narrow:
                others = tf.where(
                    has_own_weights, tf.cast(others, group.narrow.dtype), group.narrow.read()
                )
            elif group.remainder:
                # What was written into the weights meanwhile has lost nothing to rounding.
                lost = group.remainder.read()
                lost = tf.where(weights + lost == weights, lost, tf.zeros_like(lost))
                lost = tf.where(has_own_weights, group.remainder.read(), lost)
                group.remainder.assign(lost)
            with tf.control_dependencies([weights, others]):
                kept = (group.narrow or group.buffer).assign(weights)
                return [*group.assign_weights(others), kept]

        one_by_one(self._local_groups(), swap)
        flag.assign(tf.logical_not(has_own_weights))

    def _local_groups(self) -> list[LocalGroup]:
        weights = [LocalCopy(v) for v in self._weights]
        remainders = self.remainders or [None] * len(self.buffers)
        return [
            LocalGroup(
                group,
                [weights[i] for i in group.indices],
                LocalCopy(buffer),
                None if remainder is None else LocalCopy(remainder),
                None if narrow is None else LocalCopy(narrow),
            )
            for group, buffer, remainder, narrow in zip(
                self._groups, self.buffers, remainders, self._narrow, strict=True
            )
        ]


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
