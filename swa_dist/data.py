"""What data is made of: how large its batches are, and how replicas get their shares of them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from swa_dist.batch_size import rows
from swa_dist.flavour import is_sequence

# What `fit` takes where nobody says.
_DEFAULT = 32


def infer_batch_size(data: Any, batch_size: int | None = None) -> int | None:
    """Return the number of rows in a batch of data, over all replicas, without consuming any.

    | data | batch size |
    |---|---|
    | array, tensor; tuple, list, dict of them | `batch_size`, or 32 as in `fit`; at most its rows |
    | `tf.data.Dataset` | of its `batch`, through maps that keep rows, and all that keeps batches |
    | the same, unbatched, bucketed, or of a generator of unknown shape | None |
    | distributed dataset | over all replicas, where it is known of the dataset |
    | `PyDataset`, `Sequence` | rows of its item 0; None if it has no items |
    | `peekable` | rows of its first element; None if it is at its end |
    | generator, iterator, other iterable | None: to look is to consume |

    Rows are those of the first component that is no scalar. The last batch may be smaller; a
    dataset with fewer rows than one batch does not tell.

    Args:
        data: What `fit` takes as `x`, targets and weights included. See `update_bn`.
        batch_size: Rows in a batch, an integer >= 1, for arrays only: other data has batches.

    Returns:
        The global batch size, or None where it cannot be known.

    Raises:
        ValueError: `batch_size` is out of range, or was given with data that has batches of its
            own; or the arrays differ in their number of rows.
        TypeError: The data is nothing that could be batched.

    Distribution:
        In cross-replica context. It does not communicate: of several workers, each is taken to
        have the same data.

    Example:
        >>> infer_batch_size(tf.data.Dataset.range(100).batch(8).map(lambda x: 2 * x).prefetch(2))
        8
    """
    _check_count("batch_size", batch_size)
    if _are_arrays(data):
        return min(batch_size or _DEFAULT, _rows_of_arrays(data))
    _check_has_batches(data, batch_size)
    if isinstance(data, tf.data.Dataset):
        return _rows_of_dataset(data)
    if isinstance(data, tf.distribute.DistributedDataset):
        return _rows_of_distributed(data)
    if is_sequence(data):
        return int(rows(data[0])) if _length(data) != 0 else None
    if isinstance(data, peekable):
        try:
            return int(rows(data.peek()))
        except StopIteration:
            return None
    return None


class peekable(Iterator):  # noqa: N801  (named like the functions of itertools)
    """An iterator whose first element can be looked at, and is given back.

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


def distributed_inputs(
    data: Any, strategy: tf.distribute.Strategy, batch_size: int | None, steps: int | None
) -> tuple[Iterator[Any], int | None]:
    """Return the inputs of each batch, as `strategy.run` takes them, and the number of batches.

    A `tf.data.Dataset`, and arrays, are distributed like the data of `fit`: sharded over workers,
    and each batch over replicas. A batch of anything else is split over this worker's replicas, in
    order and as evenly as may be, without a generator's detour through `tf.data`, in which it loses
    its exception, its static shapes and the elements that were prefetched.

    Args:
        data: See `infer_batch_size`.
        strategy: The strategy of the model.
        batch_size: Rows in a batch of arrays.
        steps: The largest number of batches to take, an integer >= 1; None: all there are.

    Returns:
        An iterator of tensors or `tf.distribute.DistributedValues`, in the structure of the inputs,
        and how many of those there are, or None if that is not known.

    Raises:
        ValueError: See `infer_batch_size`; or the data is infinite and `steps` is None.
        TypeError: The data is nothing that could be batched.

    Distribution:
        In cross-replica context, on every worker.
    """
    _check_count("steps", steps)
    batches: Iterable[Any]
    if _are_arrays(data):
        size = infer_batch_size(data, batch_size) or 1  # without rows there are no batches
        # Here a list is what it is as `x` of `fit`: several inputs.
        inputs = data if isinstance(data, list) else inputs_of(data)
        # `tf.data` takes a list for one tensor: the structure goes round it.
        dataset = tf.data.Dataset.from_tensor_slices(tuple(tf.nest.flatten(inputs)))
        shares, length = _distribute(dataset.batch(size), strategy, steps)
        return (tf.nest.pack_sequence_as(inputs, list(share)) for share in shares), length
    _check_has_batches(data, batch_size)
    if isinstance(data, tf.data.Dataset):
        batches, length = _distribute(data, strategy, steps)
    elif isinstance(data, tf.distribute.DistributedDataset):
        unknown = tf.data.UNKNOWN_CARDINALITY
        batches, length = data, _length_within(steps, getattr(data, "cardinality", unknown))
    elif is_sequence(data):
        length = _length_within(steps, _length(data))
        batches = (data[i] for i in range(length or 0))
    else:
        batches, length = data, steps
    limited = itertools.islice(batches, steps)
    return (_shares(inputs_of(batch), strategy) for batch in limited), length


def inputs_of(batch: Any) -> Any:
    """Return a model's inputs from a batch, as both Kerases do in a model's `train_step`.

    A list is the same as a tuple there: a `DataLoader` of PyTorch gives `[x, y]`.

    Raises:
        ValueError: It is a tuple or list, but not `(x,)`, `(x, y)` or `(x, y, sample_weight)`.
    """
    if not isinstance(batch, (tuple, list)):
        return batch
    if 1 <= len(batch) <= 3:
        return batch[0]
    kind = "list" if isinstance(batch, list) else "tuple"
    raise ValueError(
        f"A {kind} of data must be (x,), (x, y) or (x, y, sample_weight). Received: a {kind} of "
        f"{len(batch)}. Put several inputs into a list or dict, in place of x."
    )


def _check_count(name: str, value: Any) -> None:
    if value is not None and (type(value) is bool or not hasattr(value, "__index__") or value < 1):
        raise ValueError(f"`{name}` must be an integer >= 1, or None. Received: {name}={value!r}.")


def _check_has_batches(data: Any, batch_size: int | None) -> None:
    kind = f"{type(data).__module__}.{type(data).__qualname__}"
    # A scalar tensor is an Iterable in name.
    whole = isinstance(data, (str, bytes, tuple, list, dict)) or hasattr(data, "shape")
    if whole or not (isinstance(data, Iterable) or is_sequence(data)):
        raise TypeError(
            "`data` must be an array, a tuple, list or dict of arrays, a tf.data.Dataset, a "
            "distributed dataset, a Keras PyDataset or Sequence, or an iterable of batches. "
            f"Received: {kind}."
        )
    if batch_size is not None:
        raise ValueError(
            "`batch_size` is for arrays; other data has batches of its own. Received: "
            f"batch_size={batch_size}, with data of type {kind}."
        )


def _are_arrays(data: Any) -> bool:
    # `tf.nest` would go through a deque, or any other sequence of batches, too.
    if not isinstance(data, (tuple, list, Mapping)) and not hasattr(data, "shape"):
        return False
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]  # (x, None): no targets
    return bool(leaves) and all(len(getattr(leaf, "shape", ())) for leaf in leaves)


def _rows_of_arrays(data: Any) -> int:
    counts = [int(rows(leaf)) for leaf in tf.nest.flatten(data) if leaf is not None]
    if len(set(counts)) > 1:
        raise ValueError(f"The arrays in `data` must have equally many rows. Received: {counts}.")
    return counts[0]


def _rows_of_dataset(dataset: tf.data.Dataset) -> int | None:
    sizes = [shape[0] if shape.rank else None for shape in _shapes(dataset) if shape.rank != 0]
    # Components of unlike size were never batched, or mapped to something else since.
    return sizes[0] if sizes and len({*sizes} - {None}) == 1 else None


def _rows_of_distributed(dataset: Any) -> int | None:
    # Private for want of public names, here and below. They are TensorFlow 2.16's and 2.21's; where
    # they are missing, the size is not known.
    original = getattr(dataset, "_original_dataset", None)
    if original is not None:
        return _rows_of_dataset(original)
    for share in getattr(dataset, "_datasets", ()):
        size = _rows_of_dataset(share)
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
    # TensorFlow tells of which shape the results are if the arguments are so. A map may drop rows
    # or stack them: nothing else shows it.
    before = _components(dataset)
    if not all(isinstance(spec, tf.TensorSpec) for spec in before):
        return None
    pairs = zip(_shapes(dataset), before, strict=True)
    specs = [tf.TensorSpec(shape, spec.dtype) for shape, spec in pairs]
    mapped = tf.function(lambda *args: function(*args), autograph=False)
    return [tensor.shape for tensor in mapped.get_concrete_function(*specs).outputs]


def _components(dataset: tf.data.Dataset) -> list[Any]:
    return tf.nest.flatten(dataset.element_spec)


def _length(sequence: Any) -> int:
    # Keras 3's `num_batches` may be None: endless. A `Sequence` of tf_keras has a length.
    if not hasattr(type(sequence), "num_batches"):
        return len(sequence)
    length = sequence.num_batches
    return tf.data.INFINITE_CARDINALITY if length is None else length


def _length_within(steps: int | None, length: int) -> int | None:
    if length >= 0:
        return length if steps is None else min(length, steps)
    if length == tf.data.INFINITE_CARDINALITY and steps is None:
        raise ValueError(
            "`steps` must be an integer >= 1 where the data has no end. Received: steps=None."
        )
    return steps


def _distribute(
    dataset: tf.data.Dataset, strategy: tf.distribute.Strategy, steps: int | None
) -> tuple[Iterable[Any], int | None]:
    length = _length_within(steps, int(dataset.cardinality()))
    if steps is not None:  # here, not later: what is prefetched is taken from the source, too
        dataset = dataset.take(steps)
    return strategy.experimental_distribute_dataset(dataset), length


def _shares(inputs: Any, strategy: tf.distribute.Strategy) -> Any:
    leaves = tf.nest.flatten(inputs)
    if any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in leaves):
        return inputs
    if not any(len(getattr(leaf, "shape", ())) for leaf in leaves):
        raise ValueError(
            "The inputs in a batch of `data` must be an array, or a list or dict of arrays, with "
            f"rows. Received: {inputs!r}."
        )
    inputs = tf.nest.map_structure(_tensor, inputs)
    if strategy.num_replicas_in_sync == 1:
        return inputs
    replicas = len(strategy.extended.worker_devices)
    share = -(-int(rows(inputs)) // replicas)

    def split(start: int) -> Any:
        return tf.nest.map_structure(
            lambda leaf: None if leaf is None else leaf[start : start + share], inputs
        )

    shares = iter([split(replica * share) for replica in range(replicas)])
    return strategy.experimental_distribute_values_from_function(lambda context: next(shares))


def _tensor(leaf: Any) -> Any:
    if leaf is None or tf.is_tensor(leaf):  # None: an optional input that is not there
        return leaf
    # PyTorch's tensors may be on a GPU, from which NumPy and TensorFlow do not fetch them.
    return tf.convert_to_tensor(leaf.cpu() if hasattr(leaf, "cpu") else leaf)
