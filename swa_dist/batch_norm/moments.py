"""Counts, means and squared deviations of batches, to the precision of float32."""

import math

import tensorflow as tf

# Longest run of float32 numbers that is summed at once. TensorFlow's CPU kernel sums an outer axis
# number by number, with a rounding error that grows with the length: 1e-5 to 4e-4 of the variance
# of an image batch, where sums of sums stay below 5e-7.
_LONGEST_SUM = 128


def moments(
    inputs: tf.Tensor, reduced: list[int], mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return each channel's count, mean, rounding error of the mean, and squared deviations.

    Args:
        inputs: A batch, of floating dtype.
        reduced: Its axes that are not channels.
        mask: Booleans of the shape of `inputs` without its last axis: which positions count. None:
            all.

    Returns:
        Four flat tensors, over all channels: the count as int64, the others in the inputs' dtype.
    """
    # Deviations from a mean that rounding has moved by r have the mean r, and their squares sum to
    # n r^2 too much. If the mean is large beside the spread, that is more than float32 may lose.
    if mask is None:
        channels = math.prod(n for axis, n in enumerate(inputs.shape) if axis not in reduced)
        positions = tf.reduce_prod(tf.gather(tf.shape(inputs, tf.int64), reduced))
        count = tf.fill([channels], positions)
    else:
        mask = tf.broadcast_to(tf.expand_dims(tf.cast(mask, tf.bool), -1), tf.shape(inputs))
        count = tf.reshape(tf.reduce_sum(tf.cast(mask, tf.int64), reduced), [-1])

    def total(values: tf.Tensor) -> tf.Tensor:
        if mask is not None:
            values = tf.where(mask, values, tf.zeros([], values.dtype))
        for axis in reversed(reduced):  # the batch axis last, when little is left to sum
            values = _sum(values, axis)
        return values

    n = tf.cast(tf.maximum(count, 1), inputs.dtype)
    sums = total(inputs)
    n = tf.reshape(n, tf.shape(sums))
    mean = sums / n
    deviations = inputs - mean
    mean_error = total(deviations) / n
    squares = total(tf.square(deviations)) - n * tf.square(mean_error)
    mean, mean_error, squares = (tf.reshape(values, [-1]) for values in (mean, mean_error, squares))
    return count, mean, mean_error, squares


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
        if length is None:  # two levels suffice for any batch that fits into memory
            break
        length = -(-length // _LONGEST_SUM)
    return tf.reduce_sum(values, axis, keepdims=True)


def two_sum(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the rounded sum and its rounding error: exactly a + b together (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)
