"""Exact statistics of what batch normalization layers are fed, pooled over batches and replicas."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from swa_dist.replicas import ReplicaFunction, local_variable, read

# Longest run of float32 numbers that is added up in one go. TensorFlow's CPU kernel sums an outer
# axis number by number, and its rounding error grows with the length: 1e-5 to 4e-4 of the variance
# of an image batch, where sums of sums stay below 5e-7.
_LONGEST_SUM = 128


@dataclass(frozen=True)
class BatchNormLayer:
    """A batch normalization layer, as its statistics see it.

    Args:
        layer: The Keras layer.
        base: The class, its own or an ancestor, whose `call` takes the moments.
        input_shape: Sizes of its input's axes: a number for each channel axis, None for the others,
            over which it takes its moments.
        mean: Variable of its moving mean.
        variance: Variable of its moving variance.
        epsilon: What the layer adds to a variance before taking the root.
        uses_mask: Whether a mask reaches its moments.
        renorm: Its `renorm_mean`, `renorm_stddev` and `moving_stddev`, if it has them.
    """

    layer: Any
    base: type
    input_shape: tuple[int | None, ...]
    mean: tf.Variable
    variance: tf.Variable
    epsilon: float
    uses_mask: bool
    renorm: tuple[tf.Variable, tf.Variable, tf.Variable] | None

    @property
    def variables(self) -> list[tf.Variable]:
        """The layer's statistics."""
        return [self.mean, self.variance, *(self.renorm or ())]

    def values(self, mean: tf.Tensor, variance: tf.Tensor) -> list[tf.Tensor]:
        """Return what each of `variables` is for a mean and a variance."""
        if self.renorm is None:
            return [mean, variance]
        stddev = tf.sqrt(variance + self.epsilon)
        return [mean, variance, mean, stddev, stddev]


class BatchNormStatistics:
    """Count, mean and squared deviations of the rows that reach each layer.

    A row is one vector over the channel axes: an image of 28 x 28 pixels is 784 rows. While its
    `observers` stand in for the layers' `call`, each replica accumulates the rows that it sees;
    `pool` then gives the layers the mean and the population variance (divisor n) of all rows on
    all replicas.

    Batches and replicas are combined with the pairwise update of Chan et al., in which a batch
    enters with its own count, so uneven batches weigh what they should and empty ones nothing.
    It also keeps the variance *between* batches, which an average of batch variances loses, and
    does not cancel, as a sum of squares does. Sums over batches carry their rounding error along
    (Knuth's two-sum), so that the length of an epoch does not matter in float32.

    Args:
        layers: The layers to observe.
        strategy: The `tf.distribute.Strategy` under which they were created.

    Distribution:
        `begin`, `pool` and `restore` in cross-replica context, on every worker. `pool`
        communicates; nothing else does.

    Reference:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979, eq. 2.1. Knuth, The Art of Computer Programming 2, section 4.2.2.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        with strategy.scope():
            self._accumulators = [_Accumulator(layer) for layer in layers]
        self._begin = ReplicaFunction(self._begin_replica, strategy)
        self._restore = ReplicaFunction(self._restore_replica, strategy)
        self._pool = ReplicaFunction(self._pool_replica, strategy)

    def begin(self) -> None:
        """Forget all rows, and remember the layers' present statistics for `restore`."""
        self._begin()

    def restore(self) -> None:
        """Give the layers the statistics that they had at `begin`, each replica its own."""
        self._restore()

    def pool(self) -> None:
        """Give the layers the statistics of all rows, on every replica the same.

        A layer that no row reached gets back the statistics it had at `begin`.
        """
        self._pool()

    @property
    def saw_rows(self) -> bool:
        """Whether, at the last `pool`, rows had reached any of the layers."""
        return any(read(a.reached, self._strategy) for a in self._accumulators)

    def observers(self) -> list[tuple[type, str, Callable]]:
        """Return (class, "call", function) for each class of layers: put them in place to observe.

        The classes, not the layers: a subclass may hand its ancestor other inputs than its own.
        """
        accumulators = {id(a.layer.layer): a for a in self._accumulators}
        bases = {a.layer.base for a in self._accumulators}
        return [(base, "call", _observed(base, accumulators)) for base in bases]

    def _begin_replica(self) -> None:
        for accumulator in self._accumulators:
            accumulator.begin()

    def _restore_replica(self) -> None:
        for accumulator in self._accumulators:
            accumulator.restore()

    def _pool_replica(self) -> None:
        context = tf.distribute.get_replica_context()

        def add_up(values: list[tf.Tensor]) -> list[tf.Tensor]:
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values)

        # n = sum(n_r), mean = sum(n_r mean_r) / n, M2 = sum(M2_r + n_r (mean_r - mean)^2), where
        # all means are taken from one rounded mean c: their differences need digits of their own.
        accumulators = self._accumulators
        counts = [tf.cast(a.count, a.dtype) for a in accumulators]
        totals = add_up(counts)
        shares = [tf.math.divide_no_nan(n, t) for n, t in zip(counts, totals, strict=True)]
        centers = add_up([w * a.mean[0] for w, a in zip(shares, accumulators, strict=True)])
        offsets = [(a.mean[0] - c) + a.mean[1] for a, c in zip(accumulators, centers, strict=True)]
        means = add_up([w * o for w, o in zip(shares, offsets, strict=True)])
        squares = add_up(
            [
                a.squares + n * tf.square(o - mean)
                for a, n, o, mean in zip(accumulators, counts, offsets, means, strict=True)
            ]
        )
        for a, total, c, mean, square in zip(
            accumulators, totals, centers, means, squares, strict=True
        ):
            a.assign(total, c + mean, tf.math.divide_no_nan(square, total))


class _Accumulator:
    """One layer's rows on one replica: n, and mean and M2 as unevaluated sums high + low."""

    def __init__(self, layer: BatchNormLayer) -> None:
        self.layer = layer
        self.dtype = tf.float64 if layer.mean.dtype == tf.float64 else tf.float32
        channels = layer.mean.shape.num_elements()
        self.count = local_variable(tf.zeros([channels], tf.int64))
        self.reached = local_variable(tf.zeros([], tf.int64))
        self._high = local_variable(tf.zeros([2, channels], self.dtype))
        self._low = local_variable(tf.zeros([2, channels], self.dtype))
        self._before = [local_variable(tf.zeros(v.shape, v.dtype)) for v in layer.variables]

    def begin(self) -> None:
        for variable in (self.count, self._high, self._low):
            variable.assign(tf.zeros_like(variable))
        for before, variable in zip(self._before, self.layer.variables, strict=True):
            before.assign(variable)

    def restore(self) -> None:
        for before, variable in zip(self._before, self.layer.variables, strict=True):
            variable.assign(before)

    @tf.autograph.experimental.do_not_convert
    def add(self, inputs: tf.Tensor, mask: tf.Tensor | None, training: Any) -> None:
        """Take the rows of one call of the layer into account (Chan et al., eq. 2.1)."""
        # The layer knows the channels where the tensor does not: a generator's batches have no
        # static shape, and a convolution of no rows can have a wrong one (oneDNN, TensorFlow 2.21).
        reduced = [axis for axis, size in enumerate(self.layer.input_shape) if size is None]
        shape: list[Any] = list(self.layer.input_shape)
        for axis in reduced:
            shape[axis] = tf.shape(inputs)[axis]
        inputs = tf.reshape(inputs, shape)
        batch_count, batch_mean, rest, batch_squares = _moments(
            tf.cast(tf.stop_gradient(inputs), self.dtype), reduced, mask
        )
        if tf.is_tensor(training):
            trains = tf.cast(training, tf.bool)
            batch_count = tf.where(trains, batch_count, 0)
            batch_squares = tf.where(trains, batch_squares, 0)

        count = self.count + batch_count
        share = tf.cast(batch_count, self.dtype) / tf.cast(tf.maximum(count, 1), self.dtype)
        # What rounding took goes into the low parts only: added to a large mean it would be lost.
        delta, small = batch_mean - self._high[0], rest - self._low[0]
        between = tf.square(delta + small) * tf.cast(self.count, self.dtype) * share
        increment = tf.stack([delta * share, batch_squares + between])
        high, error = _two_sum(self._high, increment)
        low = self._low + (error + tf.stack([small * share, tf.zeros_like(small)]))
        # All or nothing: at the end of the data the step is run once more and fails for want of a
        # batch, and where shapes are static the count does not need one.
        with tf.control_dependencies([high, low]):
            self.count.assign(count)
            self._high.assign(high)
            self._low.assign(low)

    @property
    def mean(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean, as high and low part."""
        return self._high[0], self._low[0]

    @property
    def squares(self) -> tf.Tensor:
        """The sum of squared deviations."""
        return self._high[1] + self._low[1]

    def assign(self, count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> None:
        self.reached.assign(tf.cast(tf.reduce_any(count > 0), tf.int64))
        values = self.layer.values(mean, variance)
        for before, variable, value in zip(self._before, self.layer.variables, values, strict=True):
            seen = tf.reshape(count > 0, variable.shape)
            value = tf.cast(tf.reshape(value, variable.shape), variable.dtype)
            variable.assign(tf.where(seen, value, before))


def _observed(base: type, accumulators: dict[int, _Accumulator]) -> Callable:
    original: Callable = base.call  # type: ignore[attr-defined]

    # The signature stays visible: both Kerases look for `training` and `mask` in it.
    @functools.wraps(original)
    @tf.autograph.experimental.do_not_convert
    def call(self, inputs, training=None, mask=None):  # type: ignore[no-untyped-def]
        accumulator = accumulators.get(id(self))
        if accumulator and (tf.is_tensor(training) or training):
            accumulator.add(inputs, mask if accumulator.layer.uses_mask else None, training)
        return original(self, inputs, training=training, mask=mask)

    return call


def _moments(
    inputs: tf.Tensor, reduced: list[int], mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return each channel's count (int64), mean, what rounding took from it, and squares, flat.

    The deviations from a mean that rounding has moved by r have mean r and squares that are n r^2
    too many. Where the mean is large beside the spread, that is more than float32 may lose.
    """
    if mask is None:
        channels = math.prod(n for axis, n in enumerate(inputs.shape) if axis not in reduced)
        rows = tf.reduce_prod(tf.gather(tf.shape(inputs, tf.int64), reduced))
        count = tf.fill([channels], rows)
    else:
        mask = tf.broadcast_to(tf.expand_dims(tf.cast(mask, tf.bool), -1), tf.shape(inputs))
        count = tf.reshape(tf.reduce_sum(tf.cast(mask, tf.int64), reduced), [-1])

    def total(values: tf.Tensor) -> tf.Tensor:
        if mask is not None:
            values = tf.where(mask, values, tf.zeros([], values.dtype))
        for axis in reversed(reduced):  # the batch last: by then little is left of it
            values = _sum(values, axis)
        return values

    n = tf.cast(tf.maximum(count, 1), inputs.dtype)
    sums = total(inputs)
    n = tf.reshape(n, tf.shape(sums))
    mean = sums / n
    deviations = inputs - mean
    rest = total(deviations) / n
    squares = total(tf.square(deviations)) - n * tf.square(rest)
    mean, rest, squares = (tf.reshape(values, [-1]) for values in (mean, rest, squares))
    return count, mean, rest, squares


def _sum(values: tf.Tensor, axis: int) -> tf.Tensor:
    """Sum one axis, keeping it, as sums of at most `_LONGEST_SUM` numbers."""
    length = values.shape[axis]
    while length is None or length > _LONGEST_SUM:
        shape = tf.unstack(tf.shape(values), values.shape.rank)
        padding = [[0, 0]] * values.shape.rank
        padding[axis] = [0, -shape[axis] % _LONGEST_SUM]
        values = tf.pad(values, padding)
        blocks = (shape[axis] + _LONGEST_SUM - 1) // _LONGEST_SUM
        values = tf.reshape(values, [*shape[:axis], blocks, _LONGEST_SUM, *shape[axis + 1 :]])
        values = tf.reduce_sum(values, axis + 1)
        if length is None:  # two levels do for any batch that fits into memory
            break
        length = -(-length // _LONGEST_SUM)
    return tf.reduce_sum(values, axis, keepdims=True)


def _two_sum(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the rounded sum and its rounding error: exactly a + b together (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)
