"""How large a batch is, for each kind of data, and that looking takes nothing away."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import infer_batch_size, peekable
from swa_dist.data.data_kinds import count_samples
from tests.helpers.devices import mirrored

X = np.arange(66, dtype="float32").reshape(22, 3)
Y = X[:, :1]
SAMPLES = tf.data.Dataset.from_tensor_slices((X, Y))
BATCHES = SAMPLES.batch(8)


def generator(*sizes):
    return ((np.ones([n, 3], "float32"), np.ones(n)) for n in sizes)


def dataset_of_generator(shape):
    return tf.data.Dataset.from_generator(
        lambda: generator(8, 8, 6),
        output_signature=(tf.TensorSpec([*shape, 3]), tf.TensorSpec(shape)),
    )


ARRAYS = {
    "array": X,
    "tensor": tf.constant(X),
    "x and y": (X, Y),
    "x, no y, weights": (X, None, Y[:, 0]),
    "two inputs": ([X, Y], Y),
    "named inputs": {"b": X, "a": Y[:, 0]},
    "ragged": tf.RaggedTensor.from_row_lengths(X[:, 0], [1, 0] * 10 + [12, 0]),
    "sparse": tf.sparse.from_dense(X),
}


@pytest.mark.parametrize("data", ARRAYS.values(), ids=ARRAYS)
def test_arrays_have_the_batch_size_of_fit(data):
    assert infer_batch_size(data, 8) == 8
    assert infer_batch_size(data, np.int64(8)) == 8
    assert infer_batch_size(data, 100) == 22
    assert infer_batch_size(data) == 22


def test_the_default_is_kerass():
    assert infer_batch_size(np.zeros([33, 1])) == 32
    assert infer_batch_size(np.zeros([0, 1])) == 0


def preserve(x, y):
    return {"image": tf.reshape(x, [-1, 3, 1]) / 255}, tf.one_hot(tf.cast(y[:, 0], tf.int32), 3)


TABLE = tf.lookup.StaticHashTable(
    tf.lookup.KeyValueTensorInitializer(tf.range(70), tf.range(70)), -1
)

PIPELINES = {
    "batch": (BATCHES, 8),
    "drop_remainder": (SAMPLES.batch(8, drop_remainder=True), 8),
    "parallel batch": (SAMPLES.batch(8, num_parallel_calls=2), 8),
    "batch of batches": (SAMPLES.batch(2).batch(4), 4),
    "unbatch": (BATCHES.unbatch().batch(3), 3),
    "map before": (SAMPLES.map(lambda x, y: (2 * x, y)).batch(8), 8),
    "map": (BATCHES.map(lambda x, y: (2 * x, y)), 8),
    "maps": (BATCHES.map(preserve).prefetch(1).map(lambda x, y: (x["image"], y)), 8),
    "parallel map": (BATCHES.map(preserve, num_parallel_calls=2).prefetch(tf.data.AUTOTUNE), 8),
    "map with a table": (BATCHES.map(lambda x, y: (x, TABLE.lookup(tf.cast(y, tf.int32)))), 8),
    "map to half": (BATCHES.map(lambda x, y: (x[:4], y[:4])), 4),
    "map to twice": (BATCHES.map(lambda x, y: (tf.tile(x, [2, 1]), tf.tile(y, [2, 1]))), 16),
    "map that selects": (BATCHES.map(lambda x, y: (x[x[:, 0] > 9], y[x[:, 0] > 9])), None),
    "map of targets": (BATCHES.map(lambda x, y: (x, y[y[:, 0] > 9])), 8),
    "map to a scalar": (BATCHES.map(lambda x, y: (tf.reduce_sum(y), x[:4])), 4),
    "map to unlike parts": (BATCHES.map(lambda x, y: (x[:4], y)), None),
    "map to NumPy": (
        BATCHES.map(lambda x, y: tf.numpy_function(lambda z: z, [x], tf.float32)),
        None,
    ),
    "prefetch": (BATCHES.prefetch(2), 8),
    "repeat": (BATCHES.repeat(), 8),
    "shuffle": (BATCHES.take(2).shuffle(3), 8),
    "take": (BATCHES.take(1), 8),
    "skip": (BATCHES.skip(1), 8),
    "cache": (BATCHES.cache(), 8),
    "filter": (BATCHES.filter(lambda x, y: True), 8),
    "options": (BATCHES.with_options(tf.data.Options()), 8),
    "zip": (tf.data.Dataset.zip((BATCHES, BATCHES)), 8),
    "zip of maps": (tf.data.Dataset.zip((BATCHES.map(preserve), BATCHES)).take(2).shuffle(2), 8),
    "zip of unlike batches": (tf.data.Dataset.zip((SAMPLES.batch(4).map(preserve), BATCHES)), None),
    "padded_batch": (tf.data.Dataset.range(9).map(lambda n: tf.fill([n], n)).padded_batch(4), 4),
    "ragged_batch": (tf.data.Dataset.range(9).map(lambda n: tf.fill([n], n)).ragged_batch(4), 4),
    "map of ragged_batch": (
        tf.data.Dataset.range(9).map(lambda n: tf.fill([n], n)).ragged_batch(4).map(tf.abs),
        None,
    ),
    "rebatch": (BATCHES.map(preserve).rebatch(4), None),
    "whole arrays": (tf.data.Dataset.from_tensors((X, Y)), 22),
    "no batch": (SAMPLES, None),
    "scalars": (tf.data.Dataset.range(9), None),
    "enumerate": (BATCHES.enumerate(), 8),
    "flat_map": (BATCHES.flat_map(lambda x, y: tf.data.Dataset.from_tensors((x, y))), None),
    "concatenate": (BATCHES.concatenate(SAMPLES.batch(4)), None),
    "bucketing": (
        SAMPLES.bucket_by_sequence_length(lambda x, y: tf.shape(x)[0], [5], [4, 4]).map(preserve),
        None,
    ),
    "generator": (dataset_of_generator([None]), None),
    "generator of one shape": (dataset_of_generator([8]), 8),
}


@pytest.mark.parametrize(("data", "size"), PIPELINES.values(), ids=PIPELINES)
def test_a_dataset_has_the_size_of_its_batches(data, size):
    if size is not None:  # the oracle: the pipeline's first element
        assert int(count_samples(next(iter(data)))) == size
    assert infer_batch_size(data) == size


STAGES = {
    "map": lambda data: data.map(preserve),
    "prefetch": lambda data: data.prefetch(2),
    "repeat": lambda data: data.repeat(2),
    "shuffle": lambda data: data.shuffle(3),
    "zip": lambda data: tf.data.Dataset.zip(data, tf.data.Dataset.range(9)).map(lambda b, i: b),
}


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_datasets_after_a_batch(drop_remainder):
    for stages in itertools.permutations(STAGES.values(), 2):
        data = SAMPLES.batch(8, drop_remainder=drop_remainder)
        padded = SAMPLES.padded_batch(7, drop_remainder=drop_remainder)
        for stage in stages:
            data, padded = stage(data), stage(padded)
        assert (infer_batch_size(data), infer_batch_size(padded)) == (8, 7)
        sizes = {int(count_samples(batch)) for batch in data}
        assert sizes == ({8} if drop_remainder else {8, 6})


def test_a_dataset_is_not_read():
    def batches():
        raise AssertionError("it was")
        yield X

    data = tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec([None, 3]))
    assert infer_batch_size(data) is None
    assert infer_batch_size(data.unbatch().batch(4).map(tf.abs)) == 4
    assert infer_batch_size(mirrored(2).experimental_distribute_dataset(data)) is None


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(
    ("data", "size"),
    [
        (BATCHES, 8),
        (BATCHES.map(lambda x, y: (2 * x, y)).repeat(), 8),
        (SAMPLES.batch(7, drop_remainder=True), 7),
        (SAMPLES.batch(8, drop_remainder=True).map(preserve).prefetch(1), 8),
        (tf.data.Dataset.zip(BATCHES, BATCHES).shuffle(2), 8),
        (SAMPLES.padded_batch(4), 4),
        (SAMPLES.batch(2), 2),
        (dataset_of_generator([None]), None),
    ],
    ids=["batch", "map", "odd", "drop_remainder", "zip", "padded_batch", "small", "generator"],
)
def test_a_distributed_dataset_has_the_size_over_all_replicas(n, data, size):
    strategy = mirrored(n)
    assert infer_batch_size(strategy.experimental_distribute_dataset(data)) == size
    of_function = strategy.distribute_datasets_from_function(lambda context: data)
    assert infer_batch_size(of_function) == (size and size * n)


def sequence(kit, *sizes):
    class Batches(kit.keras.utils.Sequence):
        def __len__(self):
            return len(sizes)

        def __getitem__(self, i):
            return np.ones([sizes[i], 3]), np.ones(sizes[i])

    return Batches()


def test_a_sequence_has_the_size_of_its_first_item(kit):
    assert infer_batch_size(sequence(kit, 8, 6)) == 8
    assert infer_batch_size(sequence(kit)) is None


def test_an_endless_sequence_has_it_too(kit):
    class Endless(kit.keras.utils.Sequence):
        num_batches = None

        def __len__(self):
            raise NotImplementedError

        def __getitem__(self, i):
            return np.ones([5, 3])

    assert infer_batch_size(Endless()) == 5


@pytest.mark.parametrize(
    "make",
    [
        generator,
        lambda *sizes: map(np.ones, sizes),
        lambda *sizes: iter(BATCHES),
        lambda *sizes: iter(mirrored(2).experimental_distribute_dataset(BATCHES)),
    ],
    ids=["generator", "iterator", "iterator of a dataset", "distributed iterator"],
)
def test_an_iterator_is_not_touched(make):
    data = make(8, 8, 6)
    assert infer_batch_size(data) is None
    assert len(list(data)) == 3


@pytest.mark.parametrize("base", [Iterable, Sequence])
def test_another_iterable_is_not_begun(base):
    class Batches(base):
        def __iter__(self):
            raise AssertionError("it was")

        def __len__(self):
            return 2

        def __getitem__(self, i):
            raise AssertionError("it was")

    assert infer_batch_size(Batches()) is None


def test_a_peekable_tells_and_gives_back():
    data = peekable(generator(8, 7, 6))
    assert infer_batch_size(data) == infer_batch_size(data) == 8
    assert [len(x) for x, _ in data] == [8, 7, 6]
    assert infer_batch_size(data) is None
    assert list(data) == []
    assert infer_batch_size(peekable([[X[:8], Y[:8]]])) == 8


def test_a_peekable_takes_one_element_at_most_and_only_when_asked():
    source = iter(range(9))
    data = peekable(source)
    assert next(source) == 0
    assert data.peek() == data.peek() == 1
    assert next(source) == 2
    assert list(itertools.islice(data, 3)) == [1, 3, 4]
    assert data.peek() == 5
    assert list(data) == [5, 6, 7, 8]
    with pytest.raises(StopIteration):
        data.peek()


@pytest.mark.parametrize("batch_size", [0, -1, 8.0, True, "8"])
def test_a_batch_size_is_a_positive_integer(batch_size):
    with pytest.raises(ValueError, match=r"`batch_size` must be an integer >= 1.* Received: batc"):
        infer_batch_size(X, batch_size)


@pytest.mark.parametrize(
    "data", [BATCHES, generator(8), peekable(generator(8))], ids=lambda data: type(data).__name__
)
def test_a_batch_size_is_for_arrays(data):
    with pytest.raises(ValueError, match=r"`batch_size` is for arrays.* Received: batch_size=8"):
        infer_batch_size(data, 8)


@pytest.mark.parametrize("data", [None, 3, "x", [1, 2], [], {}, tf.constant(1)], ids=str)
def test_what_cannot_be_batched_is_refused(data):
    with pytest.raises(TypeError, match=r"`data` must be an array.* Received: "):
        infer_batch_size(data)


def test_arrays_of_unlike_length_are_refused():
    with pytest.raises(ValueError, match=r"equally many samples. Received: \[22, 21\]"):
        infer_batch_size((X, Y[1:]))
