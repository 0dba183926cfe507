"""The average of moving statistics."""

import numpy as np
import pytest

from swa_dist.averaging.bn_average import BatchNormAverage
from tests.helpers.assertions import assert_mean, assert_variance
from tests.helpers.batch_norm import layer
from tests.helpers.devices import mirrored

pytestmark = pytest.mark.optimized_graphs


def assign_copies(strategy, variable, values):
    for copy, value in zip(strategy.experimental_local_results(variable), values, strict=True):
        copy.assign(value)


def copies_of(strategy, variable):
    return [np.array(v.numpy()) for v in strategy.experimental_local_results(variable)]


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
            assign_copies(strategy, norm.mean, means.astype(dtype))
            assign_copies(strategy, norm.variance, variances.astype(dtype))
        own = [[np.float64(copies_of(strategy, v)) for v in norm.variables] for norm in norms]
        snapshots.append([(m.mean(0), v.mean(0) + m.var(0)) for m, v in own])
        average.update()
    average.copy_to_model()
    for i, norm in enumerate(norms):
        mean, variance = (np.mean(s, 0) for s in zip(*(s[i] for s in snapshots), strict=True))
        for actual_mean, actual_variance in zip(
            *(copies_of(strategy, v) for v in norm.variables), strict=True
        ):
            assert_mean(actual_mean, mean, 0)
            assert_variance(actual_variance, variance)
        for variable in norm.variables:
            first, *others = copies_of(strategy, variable)
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
        for copy in copies_of(strategy, variable):
            np.testing.assert_array_equal(copy, value)


def test_only_finite_statistics_enter_an_average():
    strategy = mirrored(2)
    with strategy.scope():
        norm = layer([2])
        average = BatchNormAverage([norm], strategy)
    average.copy_to_model()  # of nothing: the layer keeps what it has
    assert copies_of(strategy, norm.mean)[0].tolist() == [7, 7]
    for means in ([[1, np.nan], [5, 6]], [[np.inf, 0], [0, np.nan]], [[3, 4], [3, 4]]):
        assign_copies(strategy, norm.mean, np.float32(means))
        assign_copies(strategy, norm.variance, np.float32([[1, 1], [2, 2]]))
        average.update()
    average.copy_to_model()
    for mean, variance in zip(*(copies_of(strategy, v) for v in norm.variables), strict=True):
        assert mean.tolist() == [4, 5]  # of replica 1 of the first, and both of the third
        assert variance.tolist() == [1.75, 1.75]
