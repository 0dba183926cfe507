"""Replicas: the strategy's, and variables of which each has its own."""

from collections.abc import Iterable, Iterator
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
    several times as long to trace. For complex numbers the operations in place have no GPU kernels
    (TensorFlow 2.21), and the CPU's end the process when they get a GPU's memory.

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
        if self.dtype.is_complex:
            return self.assign(self.read() + value)
        return tf.raw_ops.AssignAddVariableOp(resource=self._handle, value=value)

    def subtract(self, value: tf.Tensor) -> tf.Operation:
        """Subtract a value, in place."""
        if self.dtype.is_complex:
            return self.assign(self.read() - value)
        return tf.raw_ops.AssignSubVariableOp(resource=self._handle, value=value)

    def subtract_multiple(self, factor: tf.Tensor, value: tf.Tensor) -> tf.Operation:
        """Subtract a multiple of a value, in place, without the product in memory."""
        if self.dtype.is_complex:
            return self.assign(self.read() - factor * value)
        return tf.raw_ops.ResourceApplyGradientDescent(var=self._handle, alpha=factor, delta=value)


class Untracked:
    """Items of the model, which are kept out of a `tf.train.Checkpoint` of the average."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = list(items)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items."""
        return iter(self._items)
