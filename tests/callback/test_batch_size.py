"""What training is fed is counted where it is fed, whatever the data is."""

import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.data.data_kinds import count_samples
from tests.helpers.assertions import assert_statistics
from tests.helpers.data import positions
from tests.helpers.kit import KITS

pytestmark = pytest.mark.either_keras

X = (np.random.default_rng(0).normal(size=(22, 3)) * [1, 3, 5] + [2, -5, 30]).astype("float32")
Y = np.random.default_rng(1).normal(size=(22, 1)).astype("float32")
BATCH = 8  # 8, 8, 6


def batch(start, stop):
    # A copy: where memory happens to be aligned, TensorFlow 2.21 takes what a generator yields
    # without copying it, and then writes into it.
    return X[start:stop].copy(), Y[start:stop].copy()


def batches(endless=False):
    for _ in itertools.count() if endless else range(1):
        for i in range(0, len(X), BATCH):
            yield batch(i, i + BATCH)


def arrays(kit, strategy):
    return {"x": X, "y": Y, "batch_size": BATCH}


def generator(kit, strategy):
    # Keras 3 takes one batch to build the model: an endless cycle does not mind.
    return {"x": batches(endless=True), "steps_per_epoch": 3, "shuffle": False}


def sequence(kit, strategy):
    base = kit.keras.utils.Sequence

    class Batches(base):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return batch(i * BATCH, (i + 1) * BATCH)

    return {"x": Batches(), "shuffle": False}


def dataset(kit, strategy):
    return {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH), "shuffle": False}


def repeated(kit, strategy):
    return {
        **dataset(kit, strategy),
        "x": dataset(kit, strategy)["x"].repeat(),
        "steps_per_epoch": 3,
    }


def unknown_length(kit, strategy):
    spec = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1)))
    return {"x": tf.data.Dataset.from_generator(batches, output_signature=spec), "shuffle": False}


def distributed(kit, strategy):
    x = strategy.experimental_distribute_dataset(repeated(kit, strategy)["x"])
    return {"x": x, "steps_per_epoch": 3, "shuffle": False}


def drop_remainder(kit, strategy):
    fed = tf.data.Dataset.from_tensor_slices((X[:16], Y[:16])).batch(BATCH, drop_remainder=True)
    return {"x": fed, "shuffle": False}


def model_of(kit, strategy, layers, **arguments):
    with strategy.scope():
        model = kit.keras.Sequential(
            [kit.keras.layers.Input((3,)), *(make() for make in layers), kit.keras.layers.Dense(1)]
        )
        model.compile("sgd", "mse", jit_compile=False, **arguments)
    return model


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3, after epoch 1
@pytest.mark.parametrize(
    ("feed", "kit"),
    [
        *itertools.product([arrays, generator], KITS),
        *zip(
            [sequence, dataset, repeated, unknown_length, drop_remainder, distributed],
            itertools.cycle(KITS),
            strict=False,
        ),
    ],
    indirect=["kit"],
)
def test_any_kind_of_data_needs_nothing_from_the_user(kit, two_replicas, feed):
    model = model_of(kit, two_replicas, [kit.keras.layers.BatchNormalization])
    swa = kit.SWA(start_epoch=1)
    sizes = []
    after_epoch = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: sizes.append(swa.inferred_batch_size)
    )
    model.fit(**feed(kit, two_replicas), epochs=2, verbose=0, callbacks=[swa, after_epoch])
    assert sizes == [BATCH] * 2
    seen = positions(X[:16] if feed is drop_remainder else X)
    norm = model.layers[0]
    assert_statistics(kit, norm, seen)


def test_the_largest_batch_counts_and_empty_shards_do_not_mislead(kit, four_replicas):
    # Over 4 replicas, 6 samples are dealt out 2, 2, 2, 0 and 4 samples 1, 1, 1, 1: the sum of each
    # replica's largest part would be 7.
    model = model_of(kit, four_replicas, [])
    sizes = [4, 6, 4]
    fed = tf.data.Dataset.from_generator(
        lambda: (batch(0, n) for n in sizes),
        output_signature=(tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1))),
    )
    swa = kit.SWA(start_epoch=1)
    model.fit(fed.repeat(), steps_per_epoch=3, epochs=2, verbose=0, shuffle=False, callbacks=[swa])
    assert swa.inferred_batch_size == 6


@pytest.mark.parametrize("given", [8, 22])
def test_a_wrong_batch_size_is_named_and_a_right_one_is_not(kit, given):
    model = model_of(kit, tf.distribute.get_strategy(), [])
    swa = kit.SWA(start_epoch=1, batch_size=given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[swa])
    said = [str(w.message) for w in caught if "batch_size" in str(w.message)]
    assert len(said) == (given != 8)
    assert all("`batch_size`=22" in line and " 8." in line for line in said)


@pytest.mark.parametrize("kind", ["ragged", "sparse", "dict"])
def test_samples_of_composite_and_named_inputs(kit, kind):
    fed = {
        "ragged": tf.RaggedTensor.from_row_lengths(tf.zeros([5]), [2, 0, 3]),
        "sparse": tf.sparse.from_dense(tf.eye(3)),
        "dict": {"b": tf.zeros([3, 2]), "a": tf.zeros([3])},
    }[kind]
    assert int(count_samples((fed, tf.zeros([3])))) == 3
