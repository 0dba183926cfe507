"""The exponential moving average, and a mean of many updates, against their definitions."""

import math

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import WeightAverage
from swa_dist.averaging.weight_average import LongWeightAverage
from swa_dist.replica_function import EAGER_CALLS
from tests.helpers.assertions import assert_bitwise, assert_weights
from tests.helpers.variables import (
    average_of,
    copies,
    mirrored_variables,
    random_weights,
    stand_in,
)

pytestmark = pytest.mark.optimized_graphs


def moving_average(weights, momentum):
    """The definition: update k of n has the weight (1 - b) b^(n - k) / (1 - b^n)."""
    n = len(weights)
    shares = [(1 - momentum) * momentum ** (n - k) / (1 - momentum**n) for k in range(1, n + 1)]
    assert math.fsum(shares) == pytest.approx(1)
    return [
        sum(s * np.asarray(w, np.float64) for s, w in zip(shares, arrays, strict=True))
        for arrays in zip(*weights, strict=True)
    ]


@pytest.mark.exactness
@pytest.mark.parametrize("momentum", [1e-300, 0.3, 0.95, 0.999])
def test_it_is_the_one_of_the_definition_after_every_update(strategy, momentum):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average, generator = average_of(variables, strategy, momentum), np.random.default_rng(0)
    seen = []
    for n in range(1, 2 * EAGER_CALLS + 20):
        seen.append(random_weights(strategy, variables, generator, mean=10))
        average.update()
        assert average.n_averaged == n
        assert_weights(average.get_weights(), moving_average(seen, momentum))
    average.copy_to_model()
    first, *others = copies(strategy, variables)
    assert_bitwise(first, average.get_weights())
    for other in others:
        assert_bitwise(other, first)


@pytest.mark.parametrize("momentum", [None, 0.9, 0.9999])
@pytest.mark.parametrize("moves", [0, 2e-5, 1.0], ids=["not at all", "drifting", "at random"])
def test_it_is_as_exact_after_many_updates_however_the_weights_move(momentum, moves):
    strategy, n = tf.distribute.get_strategy(), 20_001
    generator = np.random.default_rng(1)
    start, step = generator.normal(size=(2, 1000))
    offsets = generator.normal(size=(64, 1000)) if moves == 1 else np.zeros((64, 1000))
    slope = np.float32(moves if moves < 1 else 0)
    start, step, offsets = (a.astype("float32") for a in (start, step, offsets))
    variable = tf.Variable(start)
    if momentum is None:
        average = LongWeightAverage(stand_in([variable], strategy))
    else:
        average = average_of([variable], strategy, momentum)

    @tf.function(autograph=False)
    def update_often():
        def update(k):
            drift = slope * tf.cast(k, tf.float32) * step
            variable.assign(start + drift + tf.gather(offsets, k % 64))
            average.update()
            return [k + 1]

        tf.while_loop(lambda k: k < n, update, [0])

    update_often()
    expected, total = 0.0, 0.0
    for k in range(n):
        drift = slope * np.float32(k) * step
        weight = 1 if momentum is None else momentum ** (n - 1 - k)
        expected += weight * ((start + drift) + offsets[k % 64]).astype("float64")
        total += weight
    assert average.n_averaged == n
    assert_weights(average.get_weights(), [expected / total])


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_a_swap_rounds_nothing(two_replicas, momentum):
    """Weights of every width; with swaps in between, the average is the same."""
    dtypes = ["float32", "bfloat16", "float64", "float32"]
    variables = mirrored_variables(two_replicas, dtypes)
    model = stand_in(variables, two_replicas)
    make = LongWeightAverage if momentum is None else WeightAverage
    average = make(model, ema_momentum=momentum)
    generator, seen = np.random.default_rng(0), []
    for n in range(40):
        seen.append(random_weights(two_replicas, variables, generator, mean=10))
        average.update()
        if n % 4 == 1:
            average.swap()
            assert_bitwise(copies(two_replicas, variables)[1], average.get_weights())
            average.swap()
            assert_bitwise(copies(two_replicas, variables)[1], seen[-1])
    if momentum:
        expected = moving_average(seen, momentum)
    else:
        expected = [np.mean(np.array(a, "float64"), 0) for a in zip(*seen, strict=True)]
    actual = average.get_weights()
    assert [a.dtype.name for a in actual] == dtypes
    wide = [0, 2, 3]
    assert_weights([actual[i] for i in wide], [expected[i] for i in wide])
    np.testing.assert_allclose(actual[1].astype("float64"), expected[1], rtol=2**-8, atol=1e-3)


def test_what_is_written_while_the_average_is_in_the_model_becomes_the_average(two_replicas):
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average, generator = average_of(variables, two_replicas, 0.9), np.random.default_rng(0)
    for _ in range(3):
        random_weights(two_replicas, variables, generator)
        average.update()
    with average.averaged_weights():
        kept = average.get_weights()
        variables[0].assign(tf.zeros_like(variables[0]))
    np.testing.assert_array_equal(average.get_weights()[0], 0)
    assert_bitwise(average.get_weights()[1:], kept[1:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_leaves_it_as_it_was(two_replicas, value):
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average, generator = average_of(variables, two_replicas, 0.9), np.random.default_rng(0)
    random_weights(two_replicas, variables, generator)
    average.update()
    before = average.get_weights()
    variables[0].assign(tf.fill(variables[0].shape, value))
    average.update()
    assert average.n_averaged == 1
    assert_bitwise(average.get_weights(), before)


@pytest.mark.parametrize("n_before", [0, 3, 16, 21])
def test_a_checkpoint_continues_bitwise(two_replicas, tmp_path, n_before):
    variables = mirrored_variables(two_replicas, ["float32", "bfloat16", "float64", "float32"])
    average, generator = average_of(variables, two_replicas, 0.9), np.random.default_rng(0)
    for _ in range(n_before):
        random_weights(two_replicas, variables, generator)
        average.update()
    path = tf.train.Checkpoint(average=average).save(str(tmp_path / "c"))
    restored = average_of(variables, two_replicas, 0.9)
    tf.train.Checkpoint(average=restored).restore(path).assert_consumed()
    for _ in range(10):
        random_weights(two_replicas, variables, generator)
        average.update()
        restored.update()
        assert_bitwise(restored.get_weights(), average.get_weights())
    other = average_of(variables, two_replicas, 0.8)
    with pytest.raises(ValueError, match=r"momentum='0.8', but momentum='0.9' in the checkpoint"):
        tf.train.Checkpoint(average=other).restore(path)
    with pytest.raises(ValueError, match=r"momentum='nothing', but momentum='0.9'"):
        tf.train.Checkpoint(average=average_of(variables, two_replicas)).restore(path)


def test_it_has_two_buffers_for_each_weight_on_each_replica(two_replicas):
    variables = mirrored_variables(two_replicas, ["float32", "float16", "float64", "float32"])
    average = average_of(variables, two_replicas, 0.9)
    for buffers in (average.buffers, average.remainders):
        assert [v.dtype for v in buffers] == [tf.float32, tf.float32, tf.float64]
        assert all(v.aggregation == tf.VariableAggregation.NONE for v in buffers)
    assert not average_of(variables, two_replicas).remainders


def test_it_compiles_under_xla():
    strategy = tf.distribute.get_strategy()
    variables = mirrored_variables(strategy, ["float32"] * 4)
    compiled, plain = (average_of(variables, strategy, 0.9) for _ in range(2))
    update = tf.function(compiled.update_replica, jit_compile=True, autograph=False)
    generator = np.random.default_rng(0)
    seen = []
    for _ in range(20):
        seen.append(random_weights(strategy, variables, generator, mean=10))
        update()
        plain.update()
    assert_weights(compiled.get_weights(), moving_average(seen, 0.9))


@pytest.mark.parametrize("momentum", [0, 1, 1.5, -0.1, float("nan"), True, "0.9", [0.9]])
def test_a_momentum_that_is_none_is_refused(momentum):
    strategy = tf.distribute.get_strategy()
    model = stand_in(mirrored_variables(strategy, ["float32"] * 4), strategy)
    with pytest.raises(ValueError, match=r"`ema_momentum` must be None or a number in \(0, 1\)"):
        WeightAverage(model, ema_momentum=momentum)
