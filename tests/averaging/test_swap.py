"""Weights and average are exchanged, and come back bitwise."""

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.averaging import packing
from tests.helpers.assertions import assert_bitwise
from tests.helpers.variables import (
    SHAPES,
    average_of,
    copies,
    graphs_of,
    mirrored_variables,
    random_weights,
)

pytestmark = pytest.mark.optimized_graphs


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
