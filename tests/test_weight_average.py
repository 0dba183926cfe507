"""The mean of what variables held, on every replica."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.weight_average import WeightAverage
from tests.tolerances import assert_bitwise, assert_weights

SHAPES = [(7, 5), (5,), (), (3, 2, 4)]


def mirrored_variables(strategy, dtypes):
    with strategy.scope():
        return [
            tf.Variable(tf.zeros(shape, dtype)) for shape, dtype in zip(SHAPES, dtypes, strict=True)
        ]


def copies(strategy, variables):
    """[replica][variable]"""
    local = [strategy.experimental_local_results(v) for v in variables]
    return [[v.numpy() for v in replica] for replica in zip(*local, strict=True)]


@pytest.mark.parametrize("n_snapshots", [1, 3, 100])
def test_the_model_gets_the_mean_on_every_replica(strategy, n_snapshots):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average = WeightAverage(variables, strategy)
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
    average = WeightAverage(variables, two_replicas)
    # 200 additions of 60000: beyond float16's range, and beyond bfloat16's digits after the third
    for _ in range(200):
        average.update()
        for v in variables:
            v.assign(tf.fill(v.shape, tf.constant(60000, dtype)))
    average.copy_to_model()
    expected = tf.cast(tf.cast(tf.constant(60000, dtype), tf.float64) * 0.995, dtype).numpy()
    for value in copies(two_replicas, variables)[1]:
        assert value.dtype == tf.as_dtype(dtype)
        np.testing.assert_allclose(
            value.astype("float64"), np.float64(expected), rtol=0 if dtype != "float32" else 1e-7
        )


def test_float64_keeps_its_digits(two_replicas):
    variables = mirrored_variables(two_replicas, ["float64"] * 4)
    average = WeightAverage(variables, two_replicas)
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
    average = WeightAverage(variables, strategy)
    average.update()
    average.copy_to_model()
    *sums, count = created
    assert [tuple(v.shape) for v in sums] == SHAPES
    assert [v.dtype for v in sums] == [tf.float32, tf.float32, tf.float64, tf.float32]
    assert (tuple(count.shape), count.dtype) == ((), tf.int64)
    for v in created:
        local = strategy.experimental_local_results(v)
        assert len(local) == strategy.num_replicas_in_sync
        assert len({copy.device for copy in local}) == strategy.num_replicas_in_sync
        assert v.aggregation == tf.VariableAggregation.NONE


def test_each_replica_averages_what_it_has_and_none_sends_anything(two_replicas):
    with two_replicas.scope():
        v = tf.Variable([0.0], aggregation=tf.VariableAggregation.NONE)
    average = WeightAverage([v], two_replicas)

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
    for operation in (average._update, average._copy):
        graph = operation._graph.graph
        graphs = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
        kinds = {op.type for g in graphs for op in g.get_operations()}
        assert not any("Collective" in kind or "Nccl" in kind for kind in kinds)


def test_each_operation_is_traced_once(two_replicas):
    traces = []

    class Counted(WeightAverage):
        def _update_replica(self):
            traces.append("update")
            super()._update_replica()

        def _copy_replica(self):
            traces.append("copy")
            super()._copy_replica()

    average = Counted(mirrored_variables(two_replicas, ["float32"] * 4), two_replicas)
    for _ in range(3):
        average.update()
        average.copy_to_model()
    assert sorted(traces) == ["copy", "copy", "update", "update"]  # once a replica


def test_many_instances_cause_no_retracing_warning(caplog):
    strategy = tf.distribute.get_strategy()
    for _ in range(8):
        average = WeightAverage(mirrored_variables(strategy, ["float32"] * 4), strategy)
        average.update()
        average.copy_to_model()
    assert "retracing" not in caplog.text


def test_buffers_are_freed_with_the_average():
    strategy = tf.distribute.get_strategy()
    average = WeightAverage(mirrored_variables(strategy, ["float32"] * 4), strategy)
    average.update()
    buffer = weakref.ref(average.sums[0])
    del average
    gc.collect()
    assert buffer() is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("position", [0, 3])
def test_what_is_not_finite_leaves_the_average_as_it_was(strategy, value, dtype, position):
    variables = mirrored_variables(strategy, [dtype] * 4)
    average = WeightAverage(variables, strategy)
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
    average = WeightAverage([v], two_replicas)
    average.update()
    assert average.n_averaged == 1


def test_an_update_compiles_under_xla():
    strategy = tf.distribute.get_strategy()
    variables = mirrored_variables(strategy, ["float32", "bfloat16", "float32", "float64"])
    average = WeightAverage(variables, strategy)
    compiled = tf.function(average._update_replica, jit_compile=True)
    compiled()
    variables[0].assign(tf.fill(SHAPES[0], np.inf))
    compiled()
    assert average.n_averaged == 1
