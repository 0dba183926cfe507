"""Stand-ins for BN layers, and what they are fed on each replica."""

from types import SimpleNamespace

import numpy as np
import tensorflow as tf

from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.statistics import BatchNormStatistics
from tests.helpers.assertions import assert_mean, assert_variance


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


def feed(strategy, norm, batches, jit_compile=False, training=True, mask=None):
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


def assert_pooled(result, seen):
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
