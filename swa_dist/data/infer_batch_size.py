"""`infer_batch_size`: how many samples a global batch has, without consuming any."""

from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from swa_dist.data.data_kinds import (
    are_arrays,
    check_count,
    check_has_batches,
    count_samples,
    samples_of_arrays,
    sequence_length,
)
from swa_dist.keras_api import is_sequence

# That of `fit`, if none is given.
_DEFAULT = 32


def infer_batch_size(data: Any, batch_size: int | None = None) -> int | None:
    """Return the number of samples in a batch, over all replicas, without consuming any.

    | data | batch size |
    |---|---|
    | array, tensor; tuple, list, dict of them | `batch_size`, or 32 as in `fit`; at most all |
    | `tf.data.Dataset` | of its `batch`, through maps that keep it, and all that keeps batches |
    | the same, unbatched, bucketed, or of a generator of unknown shape | None |
    | distributed dataset | over all replicas, where it is known of the dataset |
    | `PyDataset`, `Sequence` | samples of its item 0; None if it has no items |
    | `peekable` | samples of its first element; None if it is at its end |
    | generator, iterator, other iterable | None: to look is to consume |

    Samples are those of the first component that is no scalar. The last batch may be smaller; a
    dataset with fewer samples than one batch gives its batch size all the same.

    Args:
        data: What `fit` takes as `x`, targets and weights included. See `update_bn`.
        batch_size: Samples in a batch, an integer >= 1, for arrays only: other data has batches.

    Returns:
        The global batch size, or None where it cannot be known.

    Raises:
        ValueError: `batch_size` is out of range, or was given with data that has batches of its
            own; or the arrays differ in their number of samples.
        TypeError: The data is nothing that could be batched.

    Distribution:
        In cross-replica context. It does not communicate: of several workers, each is taken to
        have the same data.

    Example:
        >>> infer_batch_size(tf.data.Dataset.range(100).batch(8).map(lambda x: 2 * x).prefetch(2))
        8
    """
    check_count("batch_size", batch_size)
    if are_arrays(data):
        return min(batch_size or _DEFAULT, samples_of_arrays(data))
    check_has_batches(data, batch_size)
    if isinstance(data, tf.data.Dataset):
        return _samples_of_dataset(data)
    if isinstance(data, tf.distribute.DistributedDataset):
        return _samples_of_distributed(data)
    if is_sequence(data):
        return int(count_samples(data[0])) if sequence_length(data) != 0 else None
    if isinstance(data, peekable):
        try:
            return int(count_samples(data.peek()))
        except StopIteration:
            return None
    return None


class peekable(Iterator):  # noqa: N801  (named like the functions of itertools)
    """An iterator with `peek`, which returns the next element without consuming it.

    Args:
        iterable: A generator, or anything to iterate over.

    Example:
        >>> batches = peekable(np.ones([n, 3]) for n in (8, 6))
        >>> infer_batch_size(batches)
        8
        >>> [len(batch) for batch in batches]
        [8, 6]
    """

    def __init__(self, iterable: Iterable) -> None:
        self._rest = iter(iterable)
        self._ahead: list[Any] = []

    def peek(self) -> Any:
        """Return the next element, which stays the next one.

        Raises:
            StopIteration: There is none.
        """
        if not self._ahead:
            self._ahead.append(next(self._rest))
        return self._ahead[0]

    def __next__(self) -> Any:
        return self._ahead.pop() if self._ahead else next(self._rest)


def _samples_of_dataset(dataset: tf.data.Dataset) -> int | None:
    sizes = [shape[0] if shape.rank else None for shape in _shapes(dataset) if shape.rank != 0]
    # Components of unlike size were never batched, or mapped to something else since.
    return sizes[0] if sizes and len({*sizes} - {None}) == 1 else None


def _samples_of_distributed(dataset: Any) -> int | None:
    # Private for want of public names, here and below. They are TensorFlow 2.16's and 2.21's; where
    # they are missing, the size is not known.
    original = getattr(dataset, "_original_dataset", None)
    if original is not None:
        return _samples_of_dataset(original)
    for part in getattr(dataset, "_datasets", ()):
        size = _samples_of_dataset(part)
        return size and size * dataset._strategy.num_replicas_in_sync
    return None


def _shapes(dataset: tf.data.Dataset) -> list[tf.TensorShape]:
    """Return the shapes of an element's components, as far as the pipeline tells."""
    shapes = [getattr(spec, "shape", tf.TensorShape([])) for spec in _components(dataset)]
    if all(shape.rank is not None and None not in shape[:1] for shape in shapes):
        return shapes
    inputs = dataset._inputs()
    bases = {base.__name__ for base in type(dataset).__mro__}
    size = getattr(dataset, "_batch_size", None)
    if size is None:
        variant = tf.data.experimental.to_variant(dataset)
        size = tf.raw_ops.ComputeBatchSize(input_dataset=variant)  # knows a batch, not maps of it
    if size > 0:
        return [tf.TensorShape([int(size)]).concatenate(shape[1:]) for shape in shapes]
    if "_ZipDataset" in bases:
        return [shape for zipped in inputs for shape in _shapes(zipped)]
    if "UnaryUnchangedStructureDataset" in bases:
        return _shapes(inputs[0])
    if hasattr(dataset, "_map_func"):
        return _shapes_of_map(dataset._map_func.function, inputs[0]) or shapes
    return shapes


def _shapes_of_map(function: Any, dataset: tf.data.Dataset) -> list[tf.TensorShape] | None:
    # A map may drop samples or stack them. TensorFlow infers the shapes of its results from those
    # of its arguments.
    before = _components(dataset)
    if not all(isinstance(spec, tf.TensorSpec) for spec in before):
        return None
    pairs = zip(_shapes(dataset), before, strict=True)
    specs = [tf.TensorSpec(shape, spec.dtype) for shape, spec in pairs]
    mapped = tf.function(lambda *args: function(*args), autograph=False)
    return [tensor.shape for tensor in mapped.get_concrete_function(*specs).outputs]


def _components(dataset: tf.data.Dataset) -> list[Any]:
    return tf.nest.flatten(dataset.element_spec)
