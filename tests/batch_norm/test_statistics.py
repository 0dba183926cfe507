"""Statistics of positions, from the definition, however these are distributed."""

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.batch_norm.statistics import BatchNormStatistics
from tests.helpers.assertions import assert_mean, assert_variance
from tests.helpers.batch_norm import assert_pooled, deal, feed, layer, skewed
from tests.helpers.data import positions
from tests.helpers.devices import NO_STRATEGY, mirrored

pytestmark = pytest.mark.optimized_graphs


@pytest.mark.exactness
@pytest.mark.parametrize("size", [1, 2, 7, 32, 128])
def test_one_answer_however_positions_are_distributed(strategy, size):
    x = skewed(128, 5)
    with strategy.scope():
        norm = layer([5])
    n = strategy.num_replicas_in_sync
    assert_pooled(feed(strategy, norm, deal(x, n, size)), positions(x))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((12, 3), (1,)),
        ((12, 5, 3), (-1,)),
        ((12, 3, 5), (1,)),
        ((6, 4, 5, 3), (-1,)),
        ((6, 3, 4, 5), (1,)),
        ((6, 2, 4, 5, 3), (-1,)),
        ((6, 4, 2, 3), (1, 3)),
        ((2, 300, 3), (-1,)),
        ((2, 256, 3), (-1,)),
        ((1000, 3), (-1,)),
    ],
)
def test_any_rank_and_axes(shape, axes):
    strategy = mirrored(2)
    x = (np.random.default_rng(1).normal(size=shape) * 3 + 5).astype("float32")
    axes = tuple(axis % len(shape) for axis in axes)
    channels = [shape[a] if a in axes else 1 for a in range(len(shape))]
    known = tuple(n if a in axes else None for a, n in enumerate(shape))
    with strategy.scope():
        norm = layer(channels if len(axes) > 1 else [shape[axes[0]]], known)
    seen = np.moveaxis(x.astype("float64"), axes, range(-len(axes), 0))
    seen = seen.reshape(-1, np.prod([shape[a] for a in axes]))
    assert_pooled(feed(strategy, norm, deal(x, 2, max(2, len(x) // 3))), seen)


@pytest.mark.parametrize(("mean", "spread"), [(2000, 5), (101_325, 500), (1e5, 1)])
def test_a_mean_far_beyond_the_spread_costs_no_digits(two_replicas, mean, spread):
    x = (np.random.default_rng(2).normal(size=(4096, 2)) * spread + mean).astype("float32")
    with two_replicas.scope():
        norm = layer([2])
    result = feed(two_replicas, norm, deal(x, 2, 64))
    assert_pooled(result, positions(x))


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_float32_sums_stay_exact_over_a_long_epoch_far_from_zero(jit_compile):
    # 3,000 batches with mean 1000 spreads away from 0: a plain float32 sum of squares has no
    # correct digit of this variance, plain float32 sums of batches five.
    strategy = NO_STRATEGY
    x = (np.random.default_rng(2).normal(size=(3000, 4, 2)) + 1000).astype("float32")
    result = feed(strategy, layer([2]), ([batch] for batch in x), jit_compile)
    assert_pooled(result, positions(x))


@pytest.mark.parametrize("shape", [(64, 56, 56, 4), (20_000, 4)])
def test_large_batches_are_summed_exactly(shape):
    # TensorFlow's own reduction over these is off by 1e-5 and more.
    strategy = NO_STRATEGY
    x = np.maximum(np.random.default_rng(3).normal(size=shape) * 2 + 1, -1).astype("float32")
    assert_pooled(feed(strategy, layer([4], (*[None] * (len(shape) - 1), 4)), [[x]]), positions(x))


def test_replicas_and_steps_without_samples(strategy):
    x = skewed(5, 3)
    with strategy.scope():
        norm = layer([3])
    n = strategy.num_replicas_in_sync
    empty = np.zeros((0, 3), "float32")
    batches = [[empty] * n, [empty] * (n - 1) + [x], [empty] * n]
    assert_pooled(feed(strategy, norm, batches), positions(x))


def test_without_positions_the_statistics_stay(two_replicas):
    with two_replicas.scope():
        norm = layer([3])
    result = feed(two_replicas, norm, [[np.zeros((0, 3), "float32")] * 2])
    np.testing.assert_array_equal(result.mean, np.full((2, 3), 7))
    np.testing.assert_array_equal(result.variance, np.full((2, 3), 8))


@pytest.mark.parametrize("training", [None, False, 0, tf.constant(False)], ids=str)
def test_calls_outside_training_do_not_count(training):
    strategy = NO_STRATEGY
    result = feed(strategy, layer([3]), [[skewed(5, 3)]], training=training)
    np.testing.assert_array_equal(result.mean, [[7] * 3])


def test_a_symbolic_training_flag_counts_when_it_is_true():
    x = skewed(5, 3)
    result = feed(NO_STRATEGY, layer([3]), [[x]], training=tf.constant(True))
    assert_pooled(result, positions(x))


def test_inputs_of_unknown_shape():
    x = skewed(30, 3)
    norm = layer([3])
    statistics = BatchNormStatistics([norm], NO_STRATEGY)
    step = tf.function(
        lambda batch: norm.keras_layer.call(batch, training=True),
        input_signature=[tf.TensorSpec(None, tf.float32)],
    )
    statistics.begin()
    with statistics.observe():
        for batch in np.split(x, [7, 20]):
            step(batch)
    statistics.pool()
    assert_mean(norm.mean.numpy(), positions(x).mean(0), positions(x).std(0))
    assert_variance(norm.variance.numpy(), positions(x).var(0))


def test_masked_positions_are_not_counted():
    x = skewed(12, 3).reshape(4, 3, 3)
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
    poisoned = np.where(mask[..., None], x, np.nan).astype("float32")
    strategy = NO_STRATEGY
    result = feed(strategy, layer([3], (None, None, 3)), [[poisoned]], mask=mask)
    assert_pooled(result, positions(x[mask]))
    unmasked = feed(
        strategy, layer([3], (None, None, 3), uses_mask=False), [[x]], training=True, mask=mask
    )
    assert_pooled(unmasked, positions(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x = tf.cast(skewed(500, 3), dtype).numpy()
    result = feed(NO_STRATEGY, layer([3]), [[x]])
    assert_pooled(result, positions(x))


def test_float64_layers_get_float64_statistics():
    x = skewed(500, 3).astype("float64") + 1e6
    result = feed(NO_STRATEGY, layer([3], dtype="float64"), [[x]])
    np.testing.assert_allclose(result.variance[0], x.var(0), rtol=1e-9)
    np.testing.assert_allclose(result.mean[0], x.mean(0), rtol=1e-15)


def test_renorm_statistics_agree_with_the_moving_ones():
    names = [tf.Variable(tf.zeros([3]), trainable=False) for _ in range(3)]
    x = skewed(50, 3)
    norm = layer([3], renorm=tuple(names))
    assert_pooled(feed(NO_STRATEGY, norm, [[x]]), positions(x))
    renorm_mean, renorm_stddev, moving_stddev = names
    np.testing.assert_array_equal(renorm_mean, norm.mean)
    expected = np.sqrt(positions(x).var(0) + 1e-3)
    np.testing.assert_allclose(renorm_stddev, expected, rtol=1e-6)
    np.testing.assert_allclose(moving_stddev, expected, rtol=1e-6)


def test_each_replica_gets_its_own_statistics_back(two_replicas):
    with two_replicas.scope():
        norm = layer([2])

    @tf.function
    def differ():
        def assign():
            context = tf.distribute.get_replica_context()
            norm.mean.assign(tf.fill([2], tf.cast(context.replica_id_in_sync_group, tf.float32)))

        two_replicas.run(assign)

    differ()
    result = feed(two_replicas, norm, [[skewed(4, 2)] * 2])
    assert result.mean[0][0] not in (0, 1)
    result.statistics.restore()
    copies = two_replicas.experimental_local_results(norm.mean)
    np.testing.assert_array_equal([v.numpy() for v in copies], [[0, 0], [1, 1]])


def test_several_layers_and_several_calls_are_kept_apart(two_replicas):
    with two_replicas.scope():
        first, second = layer([2]), layer([3])
    statistics = BatchNormStatistics([first, second], two_replicas)
    a, b, c = skewed(4, 2), skewed(6, 2, seed=1), skewed(5, 3)

    @tf.function
    def step():
        def calls():
            first.keras_layer.call(a, training=True)
            first.keras_layer.call(inputs=b, training=True)
            second.keras_layer.call(c, True)

        two_replicas.run(calls)

    statistics.begin()
    with statistics.observe():
        step()
    statistics.pool()
    for norm, seen in ((first, np.concatenate([a, b])), (second, c)):
        seen = positions(seen)
        assert_mean(norm.mean.numpy(), seen.mean(0), seen.std(0))
        assert_variance(norm.variance.numpy(), seen.var(0))


def test_a_second_pass_starts_anew():
    norm = layer([3])
    strategy = NO_STRATEGY
    feed(strategy, norm, [[skewed(9, 3, seed=4)]])
    x = skewed(8, 3)
    assert_pooled(feed(strategy, norm, [[x]]), positions(x))
