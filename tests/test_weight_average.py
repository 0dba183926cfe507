"""The mean of what variables held, on every replica."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import WeightAverage
from swa_dist.averaging import packing
from swa_dist.replica_function import EAGER_CALLS
from tests.tolerances import RELATIVE, RELATIVE_OF_HUNDREDS, assert_bitwise, assert_weights

SHAPES = [(7, 5), (5,), (), (3, 2, 4)]


def stand_in(variables, strategy):
    """What an average asks of a model."""
    return SimpleNamespace(trainable_variables=variables, distribute_strategy=strategy)


def average_of(variables, strategy):
    return WeightAverage(stand_in(variables, strategy))


def mirrored_variables(strategy, dtypes):
    with strategy.scope():
        return [
            tf.Variable(tf.zeros(shape, dtype)) for shape, dtype in zip(SHAPES, dtypes, strict=True)
        ]


def copies(strategy, variables):
    """[replica][variable]"""
    local = [strategy.experimental_local_results(v) for v in variables]
    return [[v.numpy() for v in replica] for replica in zip(*local, strict=True)]


def graphs_of(function):
    """The graph of a function that has run, and those of its conditions' branches."""
    graph = function.graph.graph
    return [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]


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
        def _update_replica(self):
            runs.append("update")
            super()._update_replica()

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


@pytest.mark.parametrize("name", ["update", "copy_to_model"])
def test_where_assertions_are_ignored_the_average_in_the_model_comes_to_no_harm(
    two_replicas, monkeypatch, name
):
    """As on TPUs, in a graph that was traced before the swap."""
    monkeypatch.setattr(tf.debugging, "Assert", lambda *arguments: tf.no_op())
    variables = mirrored_variables(two_replicas, ["float32", "bfloat16", "float64", "float32"])
    average = average_of(variables, two_replicas)
    traced = tf.function(lambda: getattr(average, name)())
    for value in (1, 2):
        for v in variables:
            v.assign(tf.fill(v.shape, tf.cast(value, v.dtype)))
        average.update()
    traced()
    for v in variables:
        v.assign(tf.fill(v.shape, tf.cast(5, v.dtype)))
    average.swap()
    held = [*variables, *average.buffers, average.count]
    before = copies(two_replicas, held)
    traced()
    for ours, theirs in zip(copies(two_replicas, held), before, strict=True):
        assert_bitwise(ours, theirs)


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


def random_weights(strategy, variables, generator):
    values = [generator.normal(size=v.shape) * 3 for v in variables]
    for v, value in zip(variables, values, strict=True):
        v.assign(tf.cast(value, v.dtype))
    return copies(strategy, variables)[0]


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


@pytest.mark.parametrize("updates", [3, 40])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_swap_rounds_nothing(strategy, dtype, updates):
    variables = mirrored_variables(strategy, [dtype] * 4)
    average, generator = average_of(variables, strategy), np.random.default_rng(1)
    for _ in range(updates):
        random_weights(strategy, variables, generator)
        average.update()
    weights, mean = random_weights(strategy, variables, generator), average.get_weights()
    for _ in range(2):
        with average.averaged_weights():
            assert average.swapped
            for replica in copies(strategy, variables):
                assert_bitwise(replica, mean)
            assert_bitwise(average.get_weights(), mean)
            with average.averaged_weights():  # does nothing more
                assert_bitwise(copies(strategy, variables)[0], mean)
            assert average.swapped
            for refused in (average.update, average.copy_to_model):
                with pytest.raises(RuntimeError, match=f"`{refused.__name__}` must be called"):
                    refused()
        for replica in copies(strategy, variables):
            assert_bitwise(replica, weights)
        assert_bitwise(average.get_weights(), mean)


def test_an_exception_swaps_back(two_replicas):
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average, generator = average_of(variables, two_replicas), np.random.default_rng(1)
    average.update()
    weights = random_weights(two_replicas, variables, generator)
    with pytest.raises(KeyError), average.averaged_weights():
        raise KeyError
    assert_bitwise(copies(two_replicas, variables)[1], weights)


def test_without_an_average_there_is_nothing_to_swap(two_replicas):
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average = average_of(variables, two_replicas)
    variables[0].assign(tf.fill(SHAPES[0], np.nan))
    average.update()
    with pytest.raises(RuntimeError, match="no `update` has taken finite weights"):
        average.swap()
    with pytest.raises(RuntimeError, match="There is no average yet"), average.averaged_weights():
        pass
    with pytest.raises(RuntimeError, match="There is no average yet"):
        average.get_weights()


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


def test_a_checkpoint_of_a_swapped_average_is_refused(two_replicas, tmp_path):
    """Its buffers have the weights: they would come back as an average."""
    variables = mirrored_variables(two_replicas, ["float32", "bfloat16", "float64", "float32"])
    average, generator = average_of(variables, two_replicas), np.random.default_rng(2)
    checkpoint = tf.train.Checkpoint(average=average)
    random_weights(two_replicas, variables, generator)
    average.update()
    before = checkpoint.save(str(tmp_path / "c"))
    weights = random_weights(two_replicas, variables, generator)
    average.update()
    mean = average.get_weights()
    with average.averaged_weights():
        with pytest.raises(RuntimeError, match="A `WeightAverage` must be saved while the model"):
            checkpoint.save(str(tmp_path / "d"))
        with pytest.raises(RuntimeError, match="A `WeightAverage` must be restored while the mo"):
            checkpoint.restore(before).expect_partial()
    assert_bitwise(average.get_weights(), mean)
    assert_bitwise(copies(two_replicas, variables)[1], weights)
    assert tf.train.latest_checkpoint(str(tmp_path)) == before


def test_a_step_traced_before_a_swap_leaves_the_average_alone(strategy):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average, generator = average_of(variables, strategy), np.random.default_rng(1)
    update, copy = tf.function(average.update), tf.function(average.copy_to_model)
    mean = random_weights(strategy, variables, generator)
    update()
    copy()
    weights = random_weights(strategy, variables, generator)
    for name, step in {"update": update, "copy_to_model": copy}.items():
        with average.averaged_weights():
            with pytest.raises(tf.errors.InvalidArgumentError, match=f"`{name}` must be called"):
                step()
            assert_bitwise(average.get_weights(), mean)
            assert_bitwise(copies(strategy, variables)[0], mean)
        assert_bitwise(copies(strategy, variables)[0], weights)
        assert average.n_averaged == 1
    update()
    assert average.n_averaged == 2


def test_in_a_graph_there_is_no_number_of_updates(two_replicas):
    average = average_of(mirrored_variables(two_replicas, ["float32"] * 4), two_replicas)
    average.update()
    for ask in (lambda: average.n_averaged, average.swap, average.get_weights):
        with pytest.raises(RuntimeError, match=r"`WeightAverage` has `update` and `copy_to_model`"):
            tf.function(ask)()


def test_an_interruption_at_any_moment_swaps_back(two_replicas, monkeypatch):
    variables = mirrored_variables(two_replicas, ["float32"] * 4)
    average = average_of(variables, two_replicas)
    average.update()
    weights = random_weights(two_replicas, variables, np.random.default_rng(1))

    def interrupted():
        swap()
        monkeypatch.undo()
        raise KeyboardInterrupt

    swap = average._swap
    monkeypatch.setattr(average, "_swap", interrupted)
    with pytest.raises(KeyboardInterrupt), average.averaged_weights():
        pytest.fail("It was opened.")
    assert not average.swapped
    assert_bitwise(copies(two_replicas, variables)[0], weights)


def awaited(operation):
    """All that a graph has done before it begins with an operation."""
    done, ahead = set(), [operation]
    while ahead:
        operation = ahead.pop()
        new = {*(t.op for t in operation.inputs), *operation.control_inputs} - done
        done |= new
        ahead += new
    return done


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["_normalize", "_swap", "_copy"])
def test_weights_and_average_are_exchanged_and_copied_one_group_at_a_time(
    strategy, name, dtype, monkeypatch
):
    """A replica touches none before it has written the one ahead: one at a time is there twice.

    That is in the graph, and the same on every machine. How high memory rises is not: that is for
    the benchmark to measure.
    """
    monkeypatch.setattr(packing, "_SMALL_BYTES", 64)
    average = average_of(mirrored_variables(strategy, [dtype] * 4), strategy)
    groups = list(average._groups)
    assert [group.indices for group in groups] == [(0,), (1, 2), (3,)]
    average.update()
    average.swap()
    average.swap()
    average.copy_to_model()
    turns = {
        copy.handle.ref(): (replica, turn)
        for turn, (group, *own) in enumerate(
            zip(groups, average.buffers, average._narrow, strict=True)
        )
        for variable in (*own, *(average.weights[i] for i in group.indices))
        if variable is not None
        for replica, copy in enumerate(strategy.experimental_local_results(variable))
    }
    touched = {turn: set() for turn in turns.values()}
    for graph in graphs_of(getattr(average, name)):
        for variable, placeholder in graph.captures:
            if variable.ref() in turns:
                touched[turns[variable.ref()]] |= {
                    operation
                    for operation in placeholder.consumers()
                    if operation.type in ("ReadVariableOp", "AssignVariableOp")
                }
    for (replica, turn), operations in touched.items():
        written = {o for o in operations if o.type == "AssignVariableOp"}
        assert written
        assert operations - written
        for operation in touched.get((replica, turn + 1), ()):
            assert written <= awaited(operation)


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
    compiled = tf.function(average._update_replica, jit_compile=True)
    compiled()
    variables[0].assign(tf.fill(SHAPES[0], np.inf))
    compiled()
    assert average.n_averaged == 1


def test_a_normalized_average_continues_like_one_that_was_swapped(two_replicas):
    results = []
    for change in ("normalize", "swap"):
        variables = mirrored_variables(two_replicas, ["float32"] * len(SHAPES))
        average = average_of(variables, two_replicas)
        with pytest.raises(RuntimeError, match="no average yet"):
            average.normalize()
        rng = np.random.default_rng(3)
        for number in range(1, 12):
            for v in variables:
                v.assign(rng.normal(size=v.shape))
            average.update()
            before = average.get_weights()
            getattr(average, change)()
            if change == "swap":
                average.normalize()  # which leaves what is in the model alone
                average.swap()
            assert_bitwise(average.get_weights(), before)
            assert average.n_averaged == number
        replicas = copies(two_replicas, average.buffers)
        results.append([buffer for replica in replicas for buffer in replica])
    assert_bitwise(*results)
