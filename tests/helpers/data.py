"""Data of three features, of which each has a mean and a spread of its own."""

import numpy as np
import tensorflow as tf

SHIFT, SCALE = np.array([2, -5, 30]), np.array([1, 3, 5])


def data(n=24, seed=0):
    """Samples and targets."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 3)) * SCALE + SHIFT).astype("float32")
    return x, rng.normal(size=(n, 1)).astype("float32")


def batched(*arrays, size=8):
    """Arrays as a dataset of batches.

    For models that are trained or evaluated under a strategy a second time. Keras 3 then drops an
    iterator as soon as it has given a batch, and TensorFlow 2.21 may crash: of a dataset without
    `apply_default_optimizations`, as Keras makes it of arrays, a MultiDeviceIterator that is
    dropped frees what its thread still reads.
    """
    return tf.data.Dataset.from_tensor_slices(arrays).batch(size)


def positions(batch, axis=-1):
    """An array as (positions, channels), in float64."""
    batch = np.moveaxis(np.asarray(batch, np.float64), axis, -1)
    return batch.reshape(-1, batch.shape[-1])


def held_out():
    """Batches for validation."""
    return batched(*data(24, seed=3))
