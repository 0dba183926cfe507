"""How buffers become an average: one number for each weight, or two where one would not do."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import tensorflow as tf

from swa_dist.averaging.packing import Group
from swa_dist.distribution import LocalCopy, local_variable

# Updates for which a buffer is a sum. A sum needs less memory traffic than a running mean, but
# loses digits as it grows; if weights hardly move, all rounding errors have the same sign.
_LONGEST_SUM = 32

# Updates that a remainder adds up before it is carried over. Their rounding errors, at most 5e-7 of
# their mean, stay; in return fifteen updates of sixteen read and write one buffer instead of two.
_UPDATES_TO_CARRY = 16

# It and all that is added with it must be far from the largest float32.
_LARGEST_WEIGHT = 2.0**16

_SMALL_MOMENTUM = 0.9

# Of the snapshot before the last one a smaller momentum leaves nothing that a float32 shows.
_SMALLEST_MOMENTUM = 2.0**-40


class LocalGroup(NamedTuple):
    """What a replica has of a group of weights.

    Attributes:
        group: The group.
        weights: The weights.
        buffer: Their buffer.
        remainder: What the buffer has lost to rounding, and what is not yet in it; None where one
            number for each weight is enough.
        narrow: Where weights are kept while the model has the average, if they are narrower than
            their buffer.
    """

    group: Group
    weights: list[LocalCopy]
    buffer: LocalCopy
    remainder: LocalCopy | None
    narrow: LocalCopy | None

    def read_weights(self) -> tf.Tensor:
        """Return the weights as one tensor."""
        return self.group.pack([weight.read() for weight in self.weights])

    def assign_weights(self, packed: tf.Tensor) -> list[tf.Operation]:
        """Assign values, of any dtype, to the weights."""
        values = self.group.unpack(tf.cast(packed, self.group.dtype))
        return [weight.assign(value) for weight, value in zip(self.weights, values, strict=True)]


Groups = Sequence[LocalGroup]
Values = Sequence[tf.Tensor]  # one for each group


class Sum(Protocol):
    """What turns buffers into the average.

    Attributes:
        has_remainders: Whether each buffer has a remainder beside it.
        divisor: What turns a buffer into the average; 1 after `normalize`.
        next_weight: What the next update adds to the divisor; None: 1.

    Distribution:
        Create it in the strategy's scope. The methods are for replica context; `average` is for
        the host, too.
    """

    has_remainders: bool
    divisor: tf.Variable
    next_weight: tf.Variable | None

    def add(self, groups: Groups, values: Values, taken: tf.Tensor, count: LocalCopy) -> None:
        """Average the values of each group's weights with the earlier ones, and count them.

        Args:
            groups: The groups.
            values: The values.
            taken: Whether they are to be averaged.
            count: Updates in the average.
        """

    def average(
        self, buffer: tf.Tensor, remainder: tf.Tensor | None, divisor: tf.Tensor
    ) -> tf.Tensor:
        """Return the average that a buffer stands for, in the widest dtype that it has."""

    def normalize(self, groups: Groups) -> None:
        """Have the buffers hold the average."""


class RunningMean:
    """A sum at first, then a running mean a_n = (a_(n-1) - a_(n-1) / n) + w_n / n."""

    has_remainders, next_weight = False, None

    def __init__(self) -> None:
        self.divisor = local_variable(tf.zeros([], tf.int64))

    def add(self, groups: Groups, values: Values, taken: tf.Tensor, count: LocalCopy) -> None:
        """See `Sum.add`."""
        divisor = LocalCopy(self.divisor)
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
            n, d = cast_once(terms + 1), cast_once(divisor.read())
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

    def average(
        self, buffer: tf.Tensor, remainder: tf.Tensor | None, divisor: tf.Tensor
    ) -> tf.Tensor:
        """See `Sum.average`."""
        return buffer / tf.cast(divisor, buffer.dtype)

    def normalize(self, groups: Groups) -> None:
        """See `Sum.normalize`."""
        divisor = LocalCopy(self.divisor)
        terms = divisor.read()

        def divide() -> None:
            d = cast_once(terms)

            def divide_one(group: LocalGroup) -> list[tf.Operation]:
                return [group.buffer.assign(group.buffer.read() / d(group.buffer.dtype))]

            one_by_one(groups, divide_one)
            divisor.assign(tf.ones_like(terms))

        tf.cond(terms > 1, divide, lambda: None)


class CompensatedMean:
    """A weighted mean of any number of updates, each a share of the next one's weight.

    Buffer and remainder together are s_n = s_(n-1) + g_n w_n, of which the average is s_n / d_n,
    with d_n = d_(n-1) + g_n and g_(n+1) = g_n / momentum. Updates are added to the remainder, which
    is carried over to the buffer from time to time and then is what that loses to rounding. Before
    g_(n+1) becomes too large, it and s_n are divided by d_n.

    Args:
        momentum: Weight of an update relative to the next one's, in (0, 1]; 1: all are equal.

    Reference:
        Knuth, The Art of Computer Programming 2, section 4.2.2: what a sum loses to rounding.
    """

    has_remainders = True

    def __init__(self, momentum: float) -> None:
        self._momentum = max(momentum, _SMALLEST_MOMENTUM)
        # With a smaller momentum the last of so many updates would outweigh all others.
        self._updates_to_carry = _UPDATES_TO_CARRY if self._momentum > _SMALL_MOMENTUM else 1
        self._largest_weight = _LARGEST_WEIGHT if self._updates_to_carry > 1 else 0.0
        # float64: on their digits depend all updates that are still to come.
        self.divisor = local_variable(tf.zeros([], tf.float64))
        self.next_weight = local_variable(tf.ones([], tf.float64))

    def add(self, groups: Groups, values: Values, taken: tf.Tensor, count: LocalCopy) -> None:
        """See `Sum.add`."""
        divisor, next_weight = LocalCopy(self.divisor), LocalCopy(self.next_weight)
        terms, weight = count.read() + 1, next_weight.read()
        # The weight that it has as a float32, so that the divisor is that of what is added.
        rounded = tf.cast(weight, tf.float32)
        total = divisor.read() + tf.cast(rounded, tf.float64)

        def add_to_remainders() -> None:
            minus_weight = cast_once(-rounded)
            done: list[tf.Operation] = []
            for group, value in zip(groups, values, strict=True):
                assert group.remainder
                dtype = group.remainder.dtype
                with tf.control_dependencies(done):
                    added = group.remainder.subtract_multiple(
                        minus_weight(dtype), tf.cast(value, dtype)
                    )
                if group.narrow:
                    done = [added]  # one converted copy in memory at a time
            count.assign(terms)
            divisor.assign(total)
            next_weight.assign(weight / self._momentum)

        def add_and_carry() -> None:
            add_to_remainders()
            one_by_one(groups, _carry)

        def add_and_divide() -> None:
            add_to_remainders()
            self._divide(groups, total, weight / self._momentum)

        is_due = terms % self._updates_to_carry == 0
        is_large = weight / self._momentum > self._largest_weight
        which = tf.where(is_due, tf.where(is_large, 3, 2), 1)
        tf.switch_case(
            tf.where(taken, which, 0),
            [lambda: None, add_to_remainders, add_and_carry, add_and_divide],
        )

    def average(
        self, buffer: tf.Tensor, remainder: tf.Tensor | None, divisor: tf.Tensor
    ) -> tf.Tensor:
        """See `Sum.average`."""
        wide = tf.complex128 if buffer.dtype.is_complex else tf.float64
        return (tf.cast(buffer, wide) + tf.cast(remainder, wide)) / tf.cast(divisor, wide)

    def normalize(self, groups: Groups) -> None:
        """See `Sum.normalize`."""
        divisor = LocalCopy(self.divisor).read()
        next_weight = LocalCopy(self.next_weight).read()
        tf.cond(divisor > 0, lambda: self._divide(groups, divisor, next_weight), lambda: None)

    def _divide(self, groups: Groups, divisor: tf.Tensor, next_weight: tf.Tensor) -> None:
        """Have the buffers hold the average, and the remainders what that loses to rounding."""

        def divide(group: LocalGroup) -> list[tf.Operation]:
            assert group.remainder
            average = self.average(group.buffer.read(), group.remainder.read(), divisor)
            rounded = tf.cast(average, group.buffer.dtype)
            lost = tf.cast(average - tf.cast(rounded, average.dtype), rounded.dtype)
            return [group.buffer.assign(rounded), group.remainder.assign(lost)]

        one_by_one(groups, divide)
        LocalCopy(self.divisor).assign(tf.ones_like(divisor))
        LocalCopy(self.next_weight).assign(next_weight / divisor)


def _carry(group: LocalGroup) -> list[tf.Operation]:
    """Carry the remainder over to the buffer, but for what that cannot hold."""
    assert group.remainder
    high, low = group.buffer.read(), group.remainder.read()
    total = high + low
    added = total - high
    lost = (high - (total - added)) + (low - added)
    return [group.buffer.assign(total), group.remainder.assign(lost)]


def one_by_one(
    groups: Iterable[LocalGroup], change: Callable[[LocalGroup], list[tf.Operation]]
) -> None:
    """Change the groups one after the other, so that no more than one is in memory twice."""
    done: list[tf.Operation] = []
    for group in groups:
        with tf.control_dependencies(done):
            done = change(group)


def cast_once(value: tf.Tensor) -> Callable[[tf.DType], tf.Tensor]:
    """Return a function that converts a number to a dtype, by one operation for all its calls."""
    return functools.cache(lambda dtype: tf.cast(value, dtype))
