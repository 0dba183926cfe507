"""The kinds of data that `fit` takes: arrays, and what has batches of its own."""

from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from swa_dist.keras_api import is_sequence


def check_count(name: str, value: Any) -> None:
    """Refuse a number of samples or batches that is none."""
    if value is not None and (type(value) is bool or not hasattr(value, "__index__") or value < 1):
        raise ValueError(f"`{name}` must be an integer >= 1, or None. Received: {name}={value!r}.")


def check_has_batches(data: Any, batch_size: int | None, name: str = "data") -> None:
    """Refuse data that has no batches, and a batch size for data that has.

    Args:
        data: The data.
        batch_size: What was given as such.
        name: Name of the argument that it was given as.
    """
    kind = f"{type(data).__module__}.{type(data).__qualname__}"
    # A scalar tensor is an Iterable in name.
    whole = isinstance(data, (str, bytes, tuple, list, dict)) or hasattr(data, "shape")
    if whole or not (isinstance(data, Iterable) or is_sequence(data)):
        raise TypeError(
            f"`{name}` must be an array, a tuple, list or dict of arrays, a tf.data.Dataset, a "
            "distributed dataset, a Keras PyDataset or Sequence, or an iterable of batches. "
            f"Received: {kind}."
        )
    if batch_size is not None:
        raise ValueError(
            "`batch_size` is for arrays; other data has batches of its own. Received: "
            f"batch_size={batch_size}, with data of type {kind}."
        )


def are_arrays(data: Any) -> bool:
    """Return whether data is arrays, in any structure, which `fit` would cut into batches."""
    # `tf.nest` would go through a deque, or any other sequence of batches, too.
    if not isinstance(data, (tuple, list, Mapping)) and not hasattr(data, "shape"):
        return False
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]  # (x, None): no targets
    return bool(leaves) and all(len(getattr(leaf, "shape", ())) for leaf in leaves)


def samples_of_arrays(data: Any) -> int:
    """Return the number of samples in arrays, which must be the same in all."""
    counts = [int(count_samples(leaf)) for leaf in tf.nest.flatten(data) if leaf is not None]
    if len(set(counts)) > 1:
        raise ValueError(
            f"The arrays in `data` must have equally many samples. Received: {counts}."
        )
    return counts[0]


def count_samples(element: Any) -> tf.Tensor:
    """Return the number of samples in a batch, or in one replica's part of it.

    Args:
        element: Tensors, ragged and sparse ones included, or NumPy arrays, in any structure. The
            first that is no scalar counts.

    Returns:
        An int64 scalar; 0 if there is none.
    """
    for leaf in tf.nest.flatten(element):
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(leaf.nrows(), tf.int64)
        if isinstance(leaf, tf.SparseTensor):
            return leaf.dense_shape[0]
        if tf.is_tensor(leaf):
            if leaf.shape.rank != 0:
                return tf.shape(leaf, tf.int64)[0]
        elif getattr(leaf, "shape", ()):
            return tf.constant(leaf.shape[0], tf.int64)
    return tf.zeros([], tf.int64)


def sequence_length(sequence: Any) -> int:
    """Return the number of batches in a `PyDataset` or `Sequence`, perhaps infinite."""
    # Keras 3's `num_batches` may be None: endless. A `Sequence` of tf_keras has a length.
    if not hasattr(type(sequence), "num_batches"):
        return len(sequence)
    length = sequence.num_batches
    return tf.data.INFINITE_CARDINALITY if length is None else length
