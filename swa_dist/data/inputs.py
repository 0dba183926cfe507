"""A model's inputs from data: batch by batch, each split over the replicas."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
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
from swa_dist.data.infer_batch_size import infer_batch_size
from swa_dist.keras_api import is_sequence
from swa_dist.protocols import Model


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
        batch_size: Samples in a batch of arrays.
        steps: The largest number of batches to take, an integer >= 1; None: all there are.

    Returns:
        An iterator of tensors or `tf.distribute.DistributedValues`, in the structure of the inputs,
        and their expected number, at most `steps`; None if it is unknown.

    Raises:
        ValueError: See `infer_batch_size`; or the data is infinite and `steps` is None.
        TypeError: The data is nothing that could be batched.

    Distribution:
        In cross-replica context, on every worker.
    """
    check_count("steps", steps)
    batches: Iterable[Any]
    if are_arrays(data):
        size = infer_batch_size(data, batch_size) or 1  # without samples there are no batches
        inputs = _inputs_of_arrays(data)
        # `tf.data` takes a list for one tensor: the structure goes round it.
        leaves = map(_array, tf.nest.flatten(inputs))
        dataset = tf.data.Dataset.from_tensor_slices(tuple(leaves))
        distributed, length = _distribute(dataset.batch(size), strategy, steps)
        return (tf.nest.pack_sequence_as(inputs, list(batch)) for batch in distributed), length
    check_has_batches(data, batch_size)
    if isinstance(data, tf.data.Dataset):
        batches, length = _distribute(data, strategy, steps)
    elif isinstance(data, tf.distribute.DistributedDataset):
        unknown = tf.data.UNKNOWN_CARDINALITY
        batches, length = data, _length_within(steps, getattr(data, "cardinality", unknown))
    elif is_sequence(data):
        length = _length_within(steps, sequence_length(data))
        batches = (data[i] for i in range(length or 0))
    else:
        batches, length = data, steps
    limited = itertools.islice(batches, steps)
    return (_split(inputs_of(batch), strategy) for batch in limited), length


def check_reusable(data: Any, steps: int | None) -> None:
    """Refuse what cannot be SWA's `bn_data`, as far as that can be known without reading it.

    Args:
        data: The data.
        steps: The largest number of batches to take; None: all there are.

    Raises:
        TypeError: It is nothing that could be batched.
        ValueError: It can be read only once, is empty, or has no end while `steps` is None.
    """
    kind = f"{type(data).__module__}.{type(data).__qualname__}"
    if not are_arrays(data):
        check_has_batches(data, None, "bn_data")
    if isinstance(data, Iterator):
        raise ValueError(
            "`bn_data` must be data that can be read from its beginning again: SWA reads it at the "
            "end, and again when a run is resumed or `validate_average` asks for it. Received: "
            f"{kind}, which can be read once. Make a tf.data.Dataset of it, with "
            "`tf.data.Dataset.from_generator`, or a PyDataset."
        )
    length = tf.data.UNKNOWN_CARDINALITY
    if are_arrays(data):
        length = samples_of_arrays(_inputs_of_arrays(data))
    elif isinstance(data, tf.data.Dataset):
        length = int(data.cardinality())
    elif isinstance(data, tf.distribute.DistributedDataset):
        length = int(getattr(data, "cardinality", length))
    elif is_sequence(data):
        length = sequence_length(data)
    if length == 0:
        raise ValueError(f"`bn_data` must have samples. Received: {kind} without any.")
    if length == tf.data.INFINITE_CARDINALITY and steps is None:
        raise ValueError(
            "`bn_steps` must be an integer >= 1 where `bn_data` has no end. Received: bn_steps="
            "None."
        )


def check_inputs(data: Any, model: Model) -> None:
    """Refuse `bn_data` whose inputs do not have the shapes that a model takes, where both show.

    Raises:
        ValueError: With both.
    """
    expected = getattr(model, "inputs", None)
    if are_arrays(data):
        inputs = _inputs_of_arrays(data)
    elif isinstance(data, tf.data.Dataset):
        inputs = inputs_of(data.element_spec)
    else:
        return
    if isinstance(inputs, Mapping) or not expected:
        return
    given = [leaf for leaf in tf.nest.flatten(inputs) if leaf is not None]
    shapes = [tf.TensorShape([None, *tf.TensorShape(leaf.shape)[1:]]) for leaf in given]
    wanted = [tf.TensorShape(tensor.shape) for tensor in tf.nest.flatten(expected)]
    if len(shapes) != len(wanted) or not all(map(_suits, shapes, wanted)):
        raise ValueError(
            "`bn_data` must have inputs of the shapes that the model takes. Received: "
            f"{', '.join(map(str, shapes))}, but the model takes {', '.join(map(str, wanted))}."
        )


def _suits(shape: tf.TensorShape, wanted: tf.TensorShape) -> bool:
    """Return whether Keras takes inputs of a shape; it adds or drops a last axis of size 1."""
    if shape.rank is None or wanted.rank is None or shape.rank == wanted.rank:
        return bool(shape.is_compatible_with(wanted))
    short, long = sorted((shape, wanted), key=lambda s: s.rank)
    return bool(
        long.rank == short.rank + 1 and long[-1] == 1 and long[:-1].is_compatible_with(short)
    )


def inputs_of(batch: Any) -> Any:
    """Return a model's inputs from a batch, as Keras does in a model's `train_step`.

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


def _inputs_of_arrays(data: Any) -> Any:
    # Here a list is what it is as `x` of `fit`: several inputs.
    return data if isinstance(data, list) else inputs_of(data)


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


def _split(inputs: Any, strategy: tf.distribute.Strategy) -> Any:
    leaves = tf.nest.flatten(inputs)
    if any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in leaves):
        return inputs
    if not any(len(getattr(leaf, "shape", ())) for leaf in leaves):
        raise ValueError(
            "The inputs in a batch of `data` must be an array, or a list or dict of arrays, with "
            f"samples. Received: {inputs!r}."
        )
    inputs = tf.nest.map_structure(_tensor, inputs)
    if strategy.num_replicas_in_sync == 1:
        return inputs
    replicas = len(strategy.extended.worker_devices)
    size = -(-int(count_samples(inputs)) // replicas)

    def part(start: int) -> Any:
        return tf.nest.map_structure(
            lambda leaf: None if leaf is None else leaf[start : start + size], inputs
        )

    parts = iter([part(replica * size) for replica in range(replicas)])
    return strategy.experimental_distribute_values_from_function(lambda context: next(parts))


def _array(leaf: Any) -> Any:
    # Keras makes a column of a pandas Series.
    return leaf.to_frame() if hasattr(leaf, "to_frame") else leaf


def _tensor(leaf: Any) -> Any:
    if leaf is None or tf.is_tensor(leaf):  # None: an optional input that is not there
        return leaf
    # PyTorch's tensors may be on a GPU, from which NumPy and TensorFlow do not fetch them.
    return tf.convert_to_tensor(leaf.cpu() if hasattr(leaf, "cpu") else leaf)
