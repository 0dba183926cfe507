"""Replicas: variables and functions of which each has its own, and sums over all of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Return whether this worker writes the files; a single worker does."""
    return bool(strategy.extended.should_checkpoint)


def local_variable(initial_value: tf.Tensor) -> tf.Variable:
    """Create a variable whose copy on each replica is written by that replica alone.

    Args:
        initial_value: Value on every replica, of any shape and dtype.

    Returns:
        A variable with aggregation NONE: assigning it inside `strategy.run` sends nothing.

    Distribution:
        Within the strategy's scope.
    """
    return tf.Variable(initial_value, trainable=False, aggregation=tf.VariableAggregation.NONE)


def read_local(variable: tf.Variable, strategy: tf.distribute.Strategy) -> int:
    """Return the value of a local scalar variable on this worker's first replica."""
    return int(strategy.experimental_local_results(variable)[0])


def fingerprint(variables: Iterable[tf.Variable], strategy: tf.distribute.Strategy) -> str:
    """Return a text that tells the values of variables, on the first replica, from others."""
    local = strategy.experimental_local_results
    values = (tf.reshape(local(v)[0], [1, -1]) for v in variables)
    hashes = (int(tf.bitcast(tf.fingerprint(value), tf.uint64)[0]) for value in values)
    return "".join(f"{value:016x}" for value in hashes)


class LocalCopy:
    """A replica's own copy of a variable, in a graph.

    It has TensorFlow's bare operations. The methods of a distributed variable do the same, but take
    several times as long to trace.

    Args:
        variable: A local variable, or one whose copies are equal.

    Distribution:
        In replica context.
    """

    def __init__(self, variable: tf.Variable) -> None:
        self._handle = variable.handle
        self.dtype = variable.dtype
        self._shape = variable.shape

    def read(self) -> tf.Tensor:
        """Return the value."""
        value = tf.raw_ops.ReadVariableOp(resource=self._handle, dtype=self.dtype)
        value.set_shape(self._shape)
        return value

    def assign(self, value: tf.Tensor) -> tf.Operation:
        """Assign a value."""
        return tf.raw_ops.AssignVariableOp(resource=self._handle, value=value)

    def add(self, value: tf.Tensor) -> tf.Operation:
        """Add a value, in place."""
        return tf.raw_ops.AssignAddVariableOp(resource=self._handle, value=value)

    def subtract(self, value: tf.Tensor) -> tf.Operation:
        """Subtract a value, in place."""
        return tf.raw_ops.AssignSubVariableOp(resource=self._handle, value=value)

    def subtract_multiple(self, factor: tf.Tensor, value: tf.Tensor) -> tf.Operation:
        """Subtract a multiple of a value, in place, without the product in memory."""
        return tf.raw_ops.ResourceApplyGradientDescent(var=self._handle, alpha=factor, delta=value)


def sum_over_replicas(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """Sum each value over all replicas.

    Distribution:
        In replica context; every replica must call it with as many values of the same shapes.
    """
    if not values:
        return []
    # Not `ReplicaContext.all_reduce`: for its gradient it keeps every graph it is in alive.
    return tf.distribute.get_replica_context().merge_call(_reduce, args=values)


def mean_over_replicas(
    values: list[tuple[tf.Tensor, tf.Tensor]], fractions: list[tf.Tensor]
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Return each value's mean over all replicas, and this replica's deviation from it.

    Means are taken relative to one rounded mean, c, so that small differences keep their digits.

    Args:
        values: Each an unevaluated sum high + low.
        fractions: This replica's weight in each mean. Over all replicas they add up to 1.

    Distribution:
        As `sum_over_replicas`.
    """
    centers = sum_over_replicas(
        [fraction * high for fraction, (high, _) in zip(fractions, values, strict=True)]
    )
    offsets = [(high - c) + low for (high, low), c in zip(values, centers, strict=True)]
    means = sum_over_replicas(
        [fraction * offset for fraction, offset in zip(fractions, offsets, strict=True)]
    )
    return (
        [c + mean for c, mean in zip(centers, means, strict=True)],
        [offset - mean for offset, mean in zip(offsets, means, strict=True)],
    )


def _reduce(strategy: tf.distribute.Strategy, *values: Any) -> list[Any]:
    pairs = [(value, value) for value in values]
    return strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, pairs)


class Untracked:
    """Items of the model, which are kept out of a `tf.train.Checkpoint` of the average."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = list(items)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items."""
        return iter(self._items)


class ReplicaFunction:
    """A function without arguments that runs on every replica, traced when it is first called.

    A `tf.function` alone would take the fifth instance of a class for the fifth retracing, and warn
    of it: in five-fold cross-validation, say.

    Args:
        function: What each replica runs.
        strategy: The `tf.distribute.Strategy` of the replicas.

    Distribution:
        In cross-replica context, on every worker.
    """

    def __init__(self, function: Callable[[], None], strategy: tf.distribute.Strategy) -> None:
        self._function = tf.function(lambda: strategy.run(function), autograph=False)
        self._graph: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Run the function on every replica."""
        if self._graph is None:
            self._graph = self._function.get_concrete_function()
        self._graph()
