"""The mean of what variables held, on every replica."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import WeightAverage
from swa_dist.replica_function import EAGER_CALLS
from tests.helpers.assertions import RELATIVE, RELATIVE_OF_HUNDREDS, assert_bitwise, assert_weights
from tests.helpers.variables import (
    SHAPES,
    average_of,
    copies,
    graphs_of,
    mirrored_variables,
    random_weights,
    stand_in,
)

pytestmark = pytest.mark.optimized_graphs


@pytest.mark.exactness
@pytest.mark.parametrize("n_snapshots", [1, 3, 100])
def test_the_model_gets_the_mean_on_every_replica(strategy, n_snapshots):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average = average_of(variables, strategy)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(n_snapshots):
        for v in variables:
            v.assign(rng.normal(size=v.shape) + 100)
        seen.append(copies(strategy, variables)[0])
        average.update()
    assert average.n_averaged == n_snapshots
    average.copy_to_model()
    mean = [np.mean(np.array(s, np.float64), 0) for s in zip(*seen, strict=True)]
    first, *others = copies(strategy, variables)
    assert_weights(first, mean)
    for other in others:
        assert_bitwise(other, first)
    average.copy_to_model()
    assert_bitwise(copies(strategy, variables)[0], first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_sums_are_at_least_float32(two_replicas, dtype):
    variables = mirrored_variables(two_replicas, [dtype] * 4)
    average = average_of(variables, two_replicas)
    # 200 additions of 60000: beyond float16's range, and beyond bfloat16's digits after the third
    for _ in range(200):
        average.update()
        for v in variables:
            v.assign(tf.fill(v.shape, tf.constant(60000, dtype)))
    average.copy_to_model()
    expected = tf.cast(tf.cast(tf.constant(60000, dtype), tf.float64) * 0.995, dtype).numpy()
    for value in copies(two_replicas, variables)[1]:
        assert value.dtype == tf.as_dtype(dtype)
        rounding = {"float32": RELATIVE, "float64": 1e-15}.get(dtype, 0)
        np.testing.assert_allclose(value.astype("float64"), np.float64(expected), rtol=rounding)


def test_float64_keeps_its_digits(two_replicas):
    variables = mirrored_variables(two_replicas, ["float64"] * 4)
    average = average_of(variables, two_replicas)
    for value in (1.0, 1.0 + 2**-40):
        for v in variables:
            v.assign(tf.fill(v.shape, tf.constant(value, tf.float64)))
        average.update()
    average.copy_to_model()
    assert variables[1].numpy()[0] == 1 + 2**-41


def test_buffers_are_mirrored_one_copy_for_each_replica(strategy, monkeypatch):
    variables = mirrored_variables(strategy, ["float32", "float16", "float64", "float32"])
    created = []
    make = tf.Variable

    def spy(*args, **kwargs):
        created.append(make(*args, **kwargs))
        return created[-1]

    monkeypatch.setattr(tf, "Variable", spy)
    average = average_of(variables, strategy)
    average.update()
    average.copy_to_model()
    average.swap()
    average.swap()
    own, *buffers, count, divisor, narrow = created
    assert (tuple(own.shape), own.dtype) == ((), tf.bool)
    assert [tuple(v.shape) for v in buffers] == [(7 * 5 + 3 * 2 * 4,), *SHAPES[1:3]]
    assert [v.dtype for v in buffers] == [tf.float32, tf.float32, tf.float64]
    for v in (count, divisor):
        assert (tuple(v.shape), v.dtype) == ((), tf.int64)
    assert (tuple(narrow.shape), narrow.dtype) == (SHAPES[1], tf.float16)
    for v in created:
        local = strategy.experimental_local_results(v)
        assert len(local) == strategy.num_replicas_in_sync
        assert len({copy.device for copy in local}) == strategy.num_replicas_in_sync
        assert v.aggregation == tf.VariableAggregation.NONE


def test_each_replica_averages_what_it_has_and_none_sends_anything(two_replicas):
    with two_replicas.scope():
        v = tf.Variable([0.0], aggregation=tf.VariableAggregation.NONE)
    average = average_of([v], two_replicas)

    @tf.function
    def differ(scale):
        def assign():
            context = tf.distribute.get_replica_context()
            v.assign([scale * tf.cast(context.replica_id_in_sync_group + 1, tf.float32)])

        two_replicas.run(assign)

    for scale in (1.0, 3.0):
        differ(tf.constant(scale))
        average.update()
    average.copy_to_model()
    assert [c.numpy().item() for c in two_replicas.experimental_local_results(v)] == [2.0, 4.0]
    for function in (average._update, average._copy):
        kinds = {op.type for graph in graphs_of(function) for op in graph.get_operations()}
        assert not any("Collective" in kind or "Nccl" in kind for kind in kinds)


def test_each_operation_is_traced_once(two_replicas):
    runs = []

    class Counted(WeightAverage):
        def update_replica(self):
            runs.append("update")
            super().update_replica()

        def _copy_replica(self):
            runs.append("copy")
            super()._copy_replica()

    average = Counted(stand_in(mirrored_variables(two_replicas, ["float32"] * 4), two_replicas))
    for _ in range(20):
        average.update()
        average.copy_to_model()
    once_a_replica = 2 * (EAGER_CALLS + 1)
    assert sorted(runs) == ["copy"] * once_a_replica + ["update"] * once_a_replica


def test_many_instances_cause_no_retracing_warning(caplog):
    strategy = tf.distribute.get_strategy()
    for _ in range(8):
        average = average_of(mirrored_variables(strategy, ["float32"] * 4), strategy)
        for _ in range(EAGER_CALLS + 1):
            average.update()
            average.copy_to_model()
    assert "retracing" not in caplog.text


def test_buffers_are_freed_with_the_average():
    strategy = tf.distribute.get_strategy()
    average = average_of(mirrored_variables(strategy, ["float32"] * 4), strategy)
    average.update()
    buffer = weakref.ref(average.buffers[0])
    del average
    gc.collect()
    assert buffer() is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("position", [0, 3])
def test_what_is_not_finite_leaves_the_average_as_it_was(strategy, value, dtype, position):
    variables = mirrored_variables(strategy, [dtype] * 4)
    average = average_of(variables, strategy)
    for v in variables:
        v.assign(tf.ones_like(v))
    average.update()
    assert average.first_non_finite() is None
    spoiled = np.full(SHAPES[position], 2.0)
    spoiled.flat[-1] = value
    variables[position].assign(tf.cast(spoiled, dtype))
    average.update()
    assert average.n_averaged == 1
    assert average.first_non_finite() == position
    for v in variables:
        v.assign(tf.fill(v.shape, tf.constant(3, dtype)))
    average.update()
    average.copy_to_model()
    assert average.n_averaged == 2
    for replica in copies(strategy, variables):
        for array in replica:
            np.testing.assert_array_equal(array.astype("float64"), 2.0)


def test_a_large_float16_variable_is_not_taken_for_infinite(two_replicas):
    with two_replicas.scope():
        v = tf.Variable(tf.fill([100], tf.constant(60000, tf.float16)))
    average = average_of([v], two_replicas)
    average.update()
    assert average.n_averaged == 1


@pytest.mark.parametrize("swaps", [False, True])
def test_hundreds_of_updates_in_each_form_of_the_buffers(two_replicas, swaps):
    """Sums at first, means later; and means at any time, once the average was in the model."""
    variables = mirrored_variables(two_replicas, ["float32", "bfloat16", "float64", "float32"])
    average = average_of(variables, two_replicas)
    generator, totals = np.random.default_rng(0), [0] * len(SHAPES)
    for n in range(1, 301):
        weights = random_weights(two_replicas, variables, generator)
        totals = [t + w.astype("float64") for t, w in zip(totals, weights, strict=True)]
        average.update()
        if swaps and n % 7 == 2:
            average.swap()
            average.swap()
        if n in (1, 2, 3, 31, 32, 33, 34, 300):
            actual = average.get_weights()
            assert [a.dtype for a in actual] == [w.dtype for w in weights]
            wide = [i for i, w in enumerate(weights) if w.dtype.itemsize > 2]
            assert_weights([actual[i] for i in wide], [totals[i] / n for i in wide])
            np.testing.assert_allclose(
                actual[1].astype("float64"), totals[1] / n, rtol=2**-8, atol=1e-3
            )
    average.copy_to_model()
    assert_bitwise(copies(two_replicas, variables)[0], average.get_weights())


def test_weights_that_do_not_move_are_their_own_average(two_replicas):
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average = average_of(variables, two_replicas)
    weights = random_weights(two_replicas, variables, np.random.default_rng(0))
    for _ in range(1000):
        average.update()
    assert_weights(average.get_weights(), weights)


@pytest.mark.parametrize("rate", [2e-5, 1e-3])
def test_weights_that_drift_do_not_take_the_average_along(two_replicas, rate):
    """What is rounded in one direction, each time, adds up."""
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average, generator = average_of(variables, two_replicas), np.random.default_rng(0)
    start = random_weights(two_replicas, variables, generator)
    drift = [rate * generator.normal(size=w.shape) for w in start]
    totals = [0] * len(start)
    for n in range(1, 501):
        for v, w, d in zip(variables, start, drift, strict=True):
            v.assign(tf.cast(w + n * d, tf.float32))
        weights = copies(two_replicas, variables)[0]
        totals = [t + w.astype("float64") for t, w in zip(totals, weights, strict=True)]
        average.update()
        if n == 100:
            assert_weights(average.get_weights(), [t / n for t in totals])
    assert_weights(average.get_weights(), [t / n for t in totals], RELATIVE_OF_HUNDREDS)


@pytest.mark.parametrize("first", ["within", "outside"])
def test_updates_within_a_tf_function_and_outside_are_the_same(strategy, first):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average = average_of(variables, strategy)

    @tf.function
    def step(scale):
        for v in variables:
            v.assign(tf.fill(v.shape, scale))
        average.update()

    for n, scale in enumerate([1.0, 4.0, 7.0]):
        if (n % 2 == 0) == (first == "within"):
            step(tf.constant(scale))
        else:
            for v in variables:
                v.assign(tf.fill(v.shape, scale))
            average.update()
    assert average.n_averaged == 3
    for array in average.get_weights():
        np.testing.assert_array_equal(array, 4)


def test_a_checkpoint_holds_the_average_and_no_weights(strategy, tmp_path):
    variables = mirrored_variables(strategy, ["float32", "bfloat16", "float64", "float32"])
    average, generator = average_of(variables, strategy), np.random.default_rng(2)
    for _ in range(3):
        random_weights(strategy, variables, generator)
        average.update()
    path = tf.train.Checkpoint(average=average).save(str(tmp_path / "c"))
    names = [name for name, _ in tf.train.list_variables(path) if "average/" in name]
    assert len(names) == len(SHAPES) + 3  # the count, the divisor, and a mark without a value
    weights = random_weights(strategy, variables, generator)
    restored = average_of(variables, strategy)
    tf.train.Checkpoint(average=restored).restore(path).assert_consumed()
    assert restored.n_averaged == 3
    assert_bitwise(restored.get_weights(), average.get_weights())
    assert_bitwise(copies(strategy, variables)[0], weights)


def test_in_a_graph_there_is_no_number_of_updates(two_replicas):
    average = average_of(mirrored_variables(two_replicas, ["float32"] * 4), two_replicas)
    average.update()
    for ask in (lambda: average.n_averaged, average.swap, average.get_weights):
        with pytest.raises(RuntimeError, match=r"`WeightAverage` has `update` and `copy_to_model`"):
            tf.function(ask)()


def test_of_a_model_of_either_keras(kit, two_replicas):
    with two_replicas.scope():
        layers = kit.keras.layers
        model = kit.keras.Sequential(
            [layers.Input((3,)), layers.BatchNormalization(), layers.Dense(2)]
        )
    average = WeightAverage(model)
    trained = kit.trainable(model)
    average.update()
    for v in model.trainable_variables:
        v.assign(v + 2)
    average.update()
    for array, weight in zip(average.get_weights(), trained, strict=True):
        np.testing.assert_allclose(array, weight + 1, rtol=1e-6)
    average.copy_to_model()
    assert_bitwise(kit.trainable(model), average.get_weights())
    kit.assert_replicas_agree(model)


def test_a_model_without_weights_is_refused(kit):
    model = kit.keras.Sequential([kit.keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`model` must be built and have trainable weights"):
        WeightAverage(model)


def test_an_update_compiles_under_xla():
    strategy = tf.distribute.get_strategy()
    variables = mirrored_variables(strategy, ["float32", "bfloat16", "float32", "float64"])
    average = average_of(variables, strategy)
    compiled = tf.function(average.update_replica, jit_compile=True)
    compiled()
    variables[0].assign(tf.fill(SHAPES[0], np.inf))
    compiled()
    assert average.n_averaged == 1


def test_without_an_average_a_copy_leaves_the_weights_alone(strategy):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    for v in variables:
        v.assign(tf.ones(v.shape))
    average = average_of(variables, strategy)
    tf.function(average.copy_to_model)()
    with pytest.raises(RuntimeError, match="There is no average yet"):
        average.copy_to_model()
    for replica in copies(strategy, variables):
        assert_bitwise(replica, [np.ones(v.shape) for v in variables])
