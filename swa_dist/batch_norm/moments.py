"""Counts, means and squared deviations of positions, to the precision of float32.

Moments are a tensor of shape (2, 3, channels): count n, mean, and sum of squared deviations M2,
each an unevaluated sum of a high part, `moments[0]`, and a low part, `moments[1]`. So a float32
count is exact up to 2^48.
"""

import math

import tensorflow as tf


def moments_of(
    inputs: tf.Tensor, input_shape: tuple[int | None, ...], mask: tf.Tensor | None
) -> tf.Tensor:
    """Return the moments of each channel of a batch.

    Args:
        inputs: The batch, of floating dtype.
        input_shape: Sizes of its axes: a number for each channel axis, None for the others.
        mask: Booleans of the shape of `inputs` without its last axis: which positions count. None:
            all.
    """
    # Sizes and rank are the layer's, as the tensor may lack them: a generator's batches have no
    # static shape, and a convolution of no samples can have a wrong one (oneDNN, TensorFlow 2.21).
    rank, channels = len(input_shape), math.prod(size for size in input_shape if size is not None)
    order = sorted(range(rank), key=lambda axis: (input_shape[axis] is None, axis))

    def by_channel(values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.transpose(values, order), [channels, -1])

    # TensorFlow sums an inner axis in a tree, with errors below 5e-7 of a variance. Outer axes are
    # summed number by number, by its CPU kernel and by XLA: 1e-5 to 4e-4 of that of an image batch.
    values = by_channel(inputs)
    if mask is None:
        count = tf.fill([channels], tf.shape(values, tf.int64)[1])
        counted = None
    else:
        mask = tf.expand_dims(tf.cast(mask, tf.bool), -1)
        counted = by_channel(tf.broadcast_to(mask, tf.shape(inputs)))
        count = tf.reduce_sum(tf.cast(counted, tf.int64), 1)

    def total(values: tf.Tensor) -> tf.Tensor:
        if counted is not None:
            values = tf.where(counted, values, tf.zeros([], values.dtype))
        return tf.reduce_sum(values, 1)

    # Deviations from a mean that rounding has moved by r have the mean r, and their squares sum to
    # n r^2 too much. If the mean is large beside the spread, that is more than float32 may lose.
    n = tf.cast(tf.maximum(count, 1), inputs.dtype)
    mean = total(values) / n
    deviations = values - mean[:, tf.newaxis]
    error = total(deviations) / n
    squares = total(tf.square(deviations)) - n * tf.square(error)
    high = tf.cast(count, inputs.dtype)
    low = tf.cast(count - tf.cast(high, tf.int64), inputs.dtype)
    return tf.stack([[high, mean, squares], [low, error, tf.zeros_like(squares)]])


def combine(before: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """Return the moments of all positions of two sets (Chan et al., eq. 2.1).

    With d = mean_b - mean_a and n = n_a + n_b:

        mean = mean_a + d n_b / n,    M2 = M2_a + M2_b + d^2 n_a n_b / n

    Rounding errors go into the low parts only: added to a large mean they would be lost.

    Args:
        before: The moments of what was counted before.
        batch: The moments of a batch.
    """
    high, low = tf.unstack(before)
    (count, mean, _), (count_low, mean_low, _) = tf.unstack(high), tf.unstack(low)
    (n, batch_mean, squares), (n_low, error, squares_low) = map(tf.unstack, tf.unstack(batch))

    count += count_low
    fraction = (n + n_low) / tf.maximum(count + (n + n_low), 1)
    delta, small = batch_mean - mean, error - mean_low
    between = tf.square(delta + small) * count * fraction
    high, rounded = _two_sum(high, tf.stack([n, delta * fraction, squares + between]))
    low += rounded + tf.stack([n_low, small * fraction, squares_low])
    return tf.stack([high, low])


def _two_sum(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the rounded sum and its rounding error: exactly a + b together (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)
