"""Exact statistics of what batch normalization layers are fed, pooled over batches and replicas."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from swa_dist.moments import moments, two_sum
from swa_dist.replicas import (
    ReplicaFunction,
    Untracked,
    local_variable,
    read,
    sum_over_replicas,
)


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

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.mean.shape.num_elements()

    @property
    def dtype(self) -> tf.DType:
        """The dtype in which to reckon with its statistics."""
        return tf.float64 if self.mean.dtype == tf.float64 else tf.float32

    def statistics(self) -> tf.Tensor:
        """Return this replica's moving mean and variance, of shape (2, channels)."""
        return tf.stack(
            [tf.cast(tf.reshape(v, [-1]), self.dtype) for v in (self.mean, self.variance)]
        )

    def assign(
        self,
        mean: tf.Tensor,
        variance: tf.Tensor,
        where: tf.Tensor,
        otherwise: Sequence[tf.Tensor] | None = None,
    ) -> None:
        """Give the layer a mean and a variance, on this replica.

        Args:
            mean: Mean of each channel.
            variance: Variance of each channel.
            where: Booleans, one for each channel or one for all: whether to give it.
            otherwise: What its `variables` are to be elsewhere; None: what they are.
        """
        values = [mean, variance]
        if self.renorm is not None:
            stddev = tf.sqrt(variance + self.epsilon)
            values += [mean, stddev, stddev]
        for variable, value, old in zip(
            self.variables, values, otherwise or self.variables, strict=True
        ):
            chosen = tf.where(where, tf.cast(value, variable.dtype), tf.reshape(old, [-1]))
            variable.assign(tf.reshape(chosen, variable.shape))


class BatchNormStatistics:
    """Count, mean and squared deviations of the rows that reach each layer.

    A row is one vector over the channel axes: an image of 28 x 28 pixels is 784 rows. While its
    `observing` is open, each replica accumulates the rows that it sees; `pool` then gives the
    layers the mean and the population variance (divisor n) of all rows on all replicas.

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

    @property
    def unobserved(self) -> list[Any]:
        """Layers that ran in training mode until the last `pool` without being observed."""
        return [a.layer.layer for a in self._accumulators if read(a.unobserved, self._strategy)]

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Observe the layers while open.

        It is their classes that are taken over: a subclass may hand its ancestor other inputs than
        its own. A layer itself only where it has its class's `call` as an attribute, which hides
        it: tf_keras leaves one behind when it saves a SavedModel.
        """
        accumulators = {id(a.layer.layer): a for a in self._accumulators}
        with contextlib.ExitStack() as stack:
            for base in {a.layer.base for a in self._accumulators}:
                stack.enter_context(_observers(base, accumulators))
            for layer in (a.layer for a in self._accumulators):
                attributes = vars(layer.layer)
                hiding = getattr(attributes.get("call"), "__func__", None)
                if hiding is not None and hiding is _ORIGINALS.get(layer.base):
                    stack.callback(attributes.__setitem__, "call", attributes.pop("call"))
            yield

    def _begin_replica(self) -> None:
        for accumulator in self._accumulators:
            accumulator.begin()

    def _restore_replica(self) -> None:
        for accumulator in self._accumulators:
            accumulator.restore()

    def _pool_replica(self) -> None:
        # n = sum(n_r), mean = sum(n_r mean_r) / n, M2 = sum(M2_r + n_r (mean_r - mean)^2)
        accumulators = self._accumulators
        counts = [tf.cast(a.count, a.dtype) for a in accumulators]
        totals = sum_over_replicas(counts)
        shares = [tf.math.divide_no_nan(n, t) for n, t in zip(counts, totals, strict=True)]
        means, deviations = _mean_over_replicas([a.mean for a in accumulators], shares)
        squares = sum_over_replicas(
            [
                a.squares + n * tf.square(deviation)
                for a, n, deviation in zip(accumulators, counts, deviations, strict=True)
            ]
        )
        for a, total, mean, square in zip(accumulators, totals, means, squares, strict=True):
            a.assign(total, mean, tf.math.divide_no_nan(square, total))


class BatchNormAverage(tf.Module):
    """Average of the statistics that BN layers had at each `update`.

    It stands in where nothing better is at hand: the statistics of data seen through averaged
    weights are not the average of statistics seen through each. At an update the moving statistics
    of the replicas, each of its own share of the data, are pooled with equal weight, as a mean and
    a population variance; a replica whose statistics of a layer are not finite has no weight. The
    pooled means and variances then enter a running mean, which leaves statistics that never change
    as they are, bit by bit.

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
        self._keep = ReplicaFunction(self._keep_replica, strategy)
        self._put_back = ReplicaFunction(self._put_back_replica, strategy)

    @property
    def layout(self) -> dict[str, str]:
        """What each layer is, in words: averages of other layers cannot be taken up."""
        return {
            f"BN layer {i}": f"{layer.channels} channels, {layer.dtype.name}"
            for i, layer in enumerate(self._layers, 1)
        }

    def update(self) -> None:
        """Take the layers' present statistics into the average."""
        self._update()

    def copy_to_model(self) -> None:
        """Give the layers their average, on every replica. A layer without one keeps its own."""
        self._copy()

    @contextlib.contextmanager
    def averaged_statistics(self) -> Iterator[None]:
        """Have the average in the layers while open; afterwards each replica has its own again."""
        self._keep()
        self._copy()
        try:
            yield
        finally:
            self._put_back()

    def _update_replica(self) -> None:
        own = [layer.statistics() for layer in self._layers]
        finite = [tf.reduce_all(tf.math.is_finite(mean_variance)) for mean_variance in own]
        votes = [tf.cast(f, s.dtype) for f, s in zip(finite, own, strict=True)]
        voters = sum_over_replicas(votes)
        shares = [tf.math.divide_no_nan(v, n) for v, n in zip(votes, voters, strict=True)]
        own = [tf.where(f, s, tf.zeros_like(s)) for f, s in zip(finite, own, strict=True)]

        def mean_of(values: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            return _mean_over_replicas([(v, tf.zeros_like(v)) for v in values], shares)

        means, deviations = mean_of([s[0] for s in own])
        # One addition after the last reduction: of more, TensorFlow's graph optimizer may change
        # the order, and that on one replica only.
        variances, _ = mean_of([s[1] + tf.square(d) for s, d in zip(own, deviations, strict=True)])
        for count, average, n, mean, variance in zip(
            self.counts, self.averages, voters, means, variances, strict=True
        ):
            count.assign_add(tf.cast(n > 0, tf.int64))
            step = tf.stack([mean, variance]) - average
            step /= tf.cast(tf.maximum(count, 1), step.dtype)
            average.assign_add(tf.where(n > 0, step, tf.zeros_like(step)))

    def _copy_replica(self) -> None:
        for layer, count, average in zip(self._layers, self.counts, self.averages, strict=True):
            if not layer.layer.trainable:  # frozen since
                continue
            layer.assign(average[0], average[1], where=count > 0)

    def _keep_replica(self) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            for variable, kept in zip(layer.variables, own, strict=True):
                kept.assign(variable)

    def _put_back_replica(self) -> None:
        for layer, own in zip(self._layers, self._own, strict=True):
            for variable, kept in zip(layer.variables, own, strict=True):
                variable.assign(kept)


def _mean_over_replicas(
    values: list[tuple[tf.Tensor, tf.Tensor]], shares: list[tf.Tensor]
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Return each value's mean, weighted with shares, and its deviation from it on this replica.

    The values are unevaluated sums high + low. They are taken relative to one rounded mean, c:
    their differences need digits of their own.
    """
    centers = sum_over_replicas(
        [share * high for share, (high, _) in zip(shares, values, strict=True)]
    )
    offsets = [(high - c) + low for (high, low), c in zip(values, centers, strict=True)]
    means = sum_over_replicas(
        [share * offset for share, offset in zip(shares, offsets, strict=True)]
    )
    return (
        [c + mean for c, mean in zip(centers, means, strict=True)],
        [offset - mean for offset, mean in zip(offsets, means, strict=True)],
    )


class _Accumulator:
    """One layer's rows on one replica: n, and mean and M2 as unevaluated sums high + low."""

    def __init__(self, layer: BatchNormLayer) -> None:
        self.layer = layer
        self.dtype, channels = layer.dtype, layer.channels
        self.count = local_variable(tf.zeros([channels], tf.int64))
        self.reached = local_variable(tf.zeros([], tf.int64))
        self.unobserved = local_variable(tf.zeros([], tf.int64))
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
        batch_count, batch_mean, rest, batch_squares = moments(
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
        high, error = two_sum(self._high, increment)
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
        # In training mode a layer moves its statistics, observed or not.
        moved = tf.reduce_any(
            [
                tf.reduce_any(v != before)
                for v, before in zip(self.layer.variables, self._before, strict=True)
            ]
        )
        unobserved = tf.logical_and(moved, tf.reduce_all(count == 0))
        self.unobserved.assign(tf.cast(unobserved, tf.int64))
        self.layer.assign(mean, variance, where=count > 0, otherwise=self._before)


# What observes the layers of a class, for as long as anything does, and the class's own `call`.
# Several models may be in their BN pass at once, in threads of the user's.
_OBSERVERS: dict[type, list[dict[int, _Accumulator]]] = {}
_ORIGINALS: dict[type, Callable] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def _observers(base: type, accumulators: dict[int, _Accumulator]) -> Iterator[None]:
    with _LOCK:
        if base not in _OBSERVERS:
            _OBSERVERS[base] = []
            _ORIGINALS[base] = vars(base)["call"]
            base.call = _observed(base)  # type: ignore[attr-defined]
        _OBSERVERS[base].append(accumulators)
    try:
        yield
    finally:
        with _LOCK:
            _OBSERVERS[base] = [o for o in _OBSERVERS[base] if o is not accumulators]
            if not _OBSERVERS[base]:
                base.call = _ORIGINALS.pop(base)  # type: ignore[attr-defined]
                del _OBSERVERS[base]


def _observed(base: type) -> Callable:
    original = _ORIGINALS[base]

    # The signature stays visible: both Kerases look for `training` and `mask` in it.
    @functools.wraps(original)
    @tf.autograph.experimental.do_not_convert
    def call(self, inputs, training=None, mask=None):  # type: ignore[no-untyped-def]
        if tf.is_tensor(training) or training:
            for accumulators in _OBSERVERS.get(base, ()):
                accumulator = accumulators.get(id(self))
                if accumulator:
                    used = mask if accumulator.layer.uses_mask else None
                    accumulator.add(inputs, used, training)
        return original(self, inputs, training=training, mask=mask)

    return call
