"""Statistics of positions, from the definition, however these are distributed."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.averaging.bn_average import BatchNormAverage
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.statistics import BatchNormStatistics
from tests.conftest import mirrored
from tests.kits import positions
from tests.tolerances import assert_mean, assert_variance


def layer(channels, shape=None, dtype="float32", **arguments):
    """A stand-in for a Keras layer: only what is observed of one."""

    class Layer:
        trainable = True

        def call(self, inputs, training=None, mask=None):
            return inputs

    local = {"trainable": False, "aggregation": tf.VariableAggregation.NONE}
    return BatchNormLayer(
        Layer(),
        base=Layer,
        input_shape=shape or (None, *channels),
        mean=tf.Variable(tf.fill(channels, tf.constant(7, dtype)), **local),
        variance=tf.Variable(tf.fill(channels, tf.constant(8, dtype)), **local),
        **{"epsilon": 1e-3, "uses_mask": True, "renorm": None, **arguments},
    )


def run(strategy, norm, batches, jit_compile=False, training=True, mask=None):
    """Feed each step's batches, one for each replica, to the layer; pool; return all copies."""
    statistics = BatchNormStatistics([norm], strategy)

    @tf.function(jit_compile=jit_compile, reduce_retracing=True)
    def step(batch):
        def call(x):
            norm.keras_layer.call(x, training=training, mask=mask)

        strategy.run(call, args=(batch,))

    statistics.begin()
    with statistics.observe():
        for batch in batches:
            values = strategy.experimental_distribute_values_from_function(
                lambda context, batch=batch: tf.constant(batch[context.replica_id_in_sync_group])
            )
            step(values)
    statistics.pool()
    return SimpleNamespace(
        mean=[v.numpy() for v in strategy.experimental_local_results(norm.mean)],
        variance=[v.numpy() for v in strategy.experimental_local_results(norm.variance)],
        statistics=statistics,
    )


def assert_exact(result, seen):
    for mean, variance in zip(result.mean, result.variance, strict=True):
        assert_mean(mean.ravel(), seen.mean(0), seen.std(0))
        assert_variance(variance.ravel(), seen.var(0))
        np.testing.assert_array_equal(mean, result.mean[0])
        np.testing.assert_array_equal(variance, result.variance[0])


def deal(x, n, size):
    """Split into global batches, and those over replicas as MirroredStrategy does."""
    for i in range(0, len(x), size):
        batch = x[i : i + size]
        part = -(-len(batch) // n)
        yield [batch[r * part : (r + 1) * part] for r in range(n)]


def skewed(n, channels, seed=0):
    """Data in an unkind order: batches differ in mean and spread."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=(n, channels)) * np.linspace(1, 5, n)[:, None]
    return (x + np.linspace(-3, 40, channels)).astype("float32")


@pytest.mark.exactness
@pytest.mark.parametrize("size", [1, 2, 7, 32, 128])
def test_one_answer_however_positions_are_distributed(strategy, size):
    x = skewed(128, 5)
    with strategy.scope():
        norm = layer([5])
    n = strategy.num_replicas_in_sync
    assert_exact(run(strategy, norm, deal(x, n, size)), positions(x))


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
    assert_exact(run(strategy, norm, deal(x, 2, max(2, len(x) // 3))), seen)


@pytest.mark.parametrize(("mean", "spread"), [(2000, 5), (101_325, 500), (1e5, 1)])
def test_a_mean_far_beyond_the_spread_costs_no_digits(two_replicas, mean, spread):
    x = (np.random.default_rng(2).normal(size=(4096, 2)) * spread + mean).astype("float32")
    with two_replicas.scope():
        norm = layer([2])
    result = run(two_replicas, norm, deal(x, 2, 64))
    assert_exact(result, positions(x))


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_float32_sums_stay_exact_over_a_long_epoch_far_from_zero(jit_compile):
    # 3,000 batches with mean 1000 spreads away from 0: a plain float32 sum of squares has no
    # correct digit of this variance, plain float32 sums of batches five.
    strategy = tf.distribute.get_strategy()
    x = (np.random.default_rng(2).normal(size=(3000, 4, 2)) + 1000).astype("float32")
    result = run(strategy, layer([2]), ([batch] for batch in x), jit_compile)
    assert_exact(result, positions(x))


@pytest.mark.parametrize("shape", [(64, 56, 56, 4), (20_000, 4)])
def test_large_batches_are_summed_exactly(shape):
    # TensorFlow's own reduction over these is off by 1e-5 and more.
    strategy = tf.distribute.get_strategy()
    x = np.maximum(np.random.default_rng(3).normal(size=shape) * 2 + 1, -1).astype("float32")
    assert_exact(run(strategy, layer([4], (*[None] * (len(shape) - 1), 4)), [[x]]), positions(x))


def test_replicas_and_steps_without_samples(strategy):
    x = skewed(5, 3)
    with strategy.scope():
        norm = layer([3])
    n = strategy.num_replicas_in_sync
    empty = np.zeros((0, 3), "float32")
    batches = [[empty] * n, [empty] * (n - 1) + [x], [empty] * n]
    assert_exact(run(strategy, norm, batches), positions(x))


def test_without_positions_the_statistics_stay(two_replicas):
    with two_replicas.scope():
        norm = layer([3])
    result = run(two_replicas, norm, [[np.zeros((0, 3), "float32")] * 2])
    np.testing.assert_array_equal(result.mean, np.full((2, 3), 7))
    np.testing.assert_array_equal(result.variance, np.full((2, 3), 8))


@pytest.mark.parametrize("training", [None, False, 0, tf.constant(False)], ids=str)
def test_calls_outside_training_do_not_count(training):
    strategy = tf.distribute.get_strategy()
    result = run(strategy, layer([3]), [[skewed(5, 3)]], training=training)
    np.testing.assert_array_equal(result.mean, [[7] * 3])


def test_a_symbolic_training_flag_counts_when_it_is_true():
    x = skewed(5, 3)
    result = run(tf.distribute.get_strategy(), layer([3]), [[x]], training=tf.constant(True))
    assert_exact(result, positions(x))


def test_inputs_of_unknown_shape():
    x = skewed(30, 3)
    norm = layer([3])
    statistics = BatchNormStatistics([norm], tf.distribute.get_strategy())
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
    strategy = tf.distribute.get_strategy()
    result = run(strategy, layer([3], (None, None, 3)), [[poisoned]], mask=mask)
    assert_exact(result, positions(x[mask]))
    unmasked = run(
        strategy, layer([3], (None, None, 3), uses_mask=False), [[x]], training=True, mask=mask
    )
    assert_exact(unmasked, positions(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x = tf.cast(skewed(500, 3), dtype).numpy()
    result = run(tf.distribute.get_strategy(), layer([3]), [[x]])
    assert_exact(result, positions(x))


def test_float64_layers_get_float64_statistics():
    x = skewed(500, 3).astype("float64") + 1e6
    result = run(tf.distribute.get_strategy(), layer([3], dtype="float64"), [[x]])
    np.testing.assert_allclose(result.variance[0], x.var(0), rtol=1e-9)
    np.testing.assert_allclose(result.mean[0], x.mean(0), rtol=1e-15)


def test_renorm_statistics_agree_with_the_moving_ones():
    names = [tf.Variable(tf.zeros([3]), trainable=False) for _ in range(3)]
    x = skewed(50, 3)
    norm = layer([3], renorm=tuple(names))
    assert_exact(run(tf.distribute.get_strategy(), norm, [[x]]), positions(x))
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
    result = run(two_replicas, norm, [[skewed(4, 2)] * 2])
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
    strategy = tf.distribute.get_strategy()
    run(strategy, norm, [[skewed(9, 3, seed=4)]])
    x = skewed(8, 3)
    assert_exact(run(strategy, norm, [[x]]), positions(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_averaged_statistics_are_of_the_replicas_pooled_and_of_the_snapshots_the_mean(n, dtype):
    strategy = mirrored(n)
    with strategy.scope():
        norms = [layer([1, 5], (None, None, 5), dtype), layer([3], dtype=dtype)]
        average = BatchNormAverage(norms, strategy)
    rng = np.random.default_rng(0)
    snapshots = []
    for _ in range(4):
        for norm in norms:
            shape = (n, *norm.mean.shape)
            means, variances = rng.normal(size=shape) + 10, rng.gamma(2, size=shape)
            set_copies(strategy, norm.mean, means.astype(dtype))
            set_copies(strategy, norm.variance, variances.astype(dtype))
        own = [[np.float64(copies(strategy, v)) for v in norm.variables] for norm in norms]
        snapshots.append([(m.mean(0), v.mean(0) + m.var(0)) for m, v in own])
        average.update()
    average.copy_to_model()
    for i, norm in enumerate(norms):
        mean, variance = (np.mean(s, 0) for s in zip(*(s[i] for s in snapshots), strict=True))
        for actual_mean, actual_variance in zip(
            *(copies(strategy, v) for v in norm.variables), strict=True
        ):
            assert_mean(actual_mean, mean, 0)
            assert_variance(actual_variance, variance)
        for variable in norm.variables:
            first, *others = copies(strategy, variable)
            for other in others:
                np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_averaged_statistics_that_never_change_stay_as_they_are(n):
    strategy = mirrored(n)
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=50).astype("float32"), rng.gamma(2, size=50).astype("float32")
    with strategy.scope():
        norm = layer([50])
        norm.mean.assign(mean)
        norm.variance.assign(variance)
        average = BatchNormAverage([norm], strategy)
    for _ in range(7):
        average.update()
    average.copy_to_model()
    for variable, value in ((norm.mean, mean), (norm.variance, variance)):
        for copy in copies(strategy, variable):
            np.testing.assert_array_equal(copy, value)


def test_only_finite_statistics_enter_an_average():
    strategy = mirrored(2)
    with strategy.scope():
        norm = layer([2])
        average = BatchNormAverage([norm], strategy)
    average.copy_to_model()  # of nothing: the layer keeps what it has
    assert copies(strategy, norm.mean)[0].tolist() == [7, 7]
    for means in ([[1, np.nan], [5, 6]], [[np.inf, 0], [0, np.nan]], [[3, 4], [3, 4]]):
        set_copies(strategy, norm.mean, np.float32(means))
        set_copies(strategy, norm.variance, np.float32([[1, 1], [2, 2]]))
        average.update()
    average.copy_to_model()
    for mean, variance in zip(*(copies(strategy, v) for v in norm.variables), strict=True):
        assert mean.tolist() == [4, 5]  # of replica 1 of the first, and both of the third
        assert variance.tolist() == [1.75, 1.75]


def set_copies(strategy, variable, values):
    for copy, value in zip(strategy.experimental_local_results(variable), values, strict=True):
        copy.assign(value)


def copies(strategy, variable):
    return [np.array(v.numpy()) for v in strategy.experimental_local_results(variable)]
