"""What runs on the device compiles under XLA, in static shapes, and waits for nothing."""

import traceback
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import swa_dist
from swa_dist.averaging.bn_average import BatchNormAverage
from swa_dist.batch_norm.statistics import BatchNormStatistics
from swa_dist.training.sample_counter import SampleCounter
from tests.helpers.assertions import RELATIVE_OF_TRAINING, assert_exact, assert_weights
from tests.helpers.batch_norm import layer
from tests.helpers.data import data
from tests.helpers.devices import NO_STRATEGY
from tests.helpers.fits import fit
from tests.helpers.models import build
from tests.helpers.variables import average_of, mirrored_variables

pytestmark = [pytest.mark.optimized_graphs, pytest.mark.either_keras]


def device_functions(kit):
    """All that a replica does, by name, with its inputs."""
    average = average_of(mirrored_variables(NO_STRATEGY, ["float32"] * 4), NO_STRATEGY)
    yield "average: update", average._update._run_in_graph, ()
    yield "average: copy", average._copy._run_in_graph, ()
    norm = layer([3])
    statistics = BatchNormStatistics([norm], NO_STRATEGY)
    yield "positions: begin", statistics._begin._run_in_graph, ()
    yield "positions: pool", statistics._pool._run_in_graph, ()
    yield "positions: restore", statistics._restore._run_in_graph, ()

    def observe(x):
        with statistics.observe():
            norm.keras_layer.call(x, training=True)

    yield "positions: observe", observe, (tf.ones([300, 3]),)
    of_snapshots = BatchNormAverage([norm], NO_STRATEGY)
    yield "statistics: update", of_snapshots._update._run_in_graph, ()
    yield "statistics: copy", of_snapshots._copy._run_in_graph, ()
    counts = SampleCounter(build(kit))
    yield "counts: sum", counts._sum._run_in_graph, ()
    yield "counts: count", lambda x: counts.count((x,)), (tf.ones([8, 3]),)


def operations(graph):
    yield from graph.get_operations()
    for function in graph._functions.values():
        if hasattr(function, "graph"):
            yield from operations(function.graph)


def test_every_function_of_the_device_compiles_with_static_shapes_and_no_callback(kit):
    for name, function, inputs in device_functions(kit):
        compiled = tf.function(function, jit_compile=True, autograph=False)
        compiled(*inputs)
        assert compiled.experimental_get_compiler_ir(*inputs)(stage="hlo"), name
        for operation in operations(compiled.get_concrete_function(*inputs).graph):
            assert "Py" not in operation.type, (name, operation.type)
            for output in operation.outputs:
                if output.dtype not in (tf.resource, tf.variant):
                    assert output.shape.is_fully_defined(), (name, operation.name)


def test_a_compiled_fit_equals_one_that_is_not(kit):
    ends = []
    for jit_compile in (False, True):
        kit.keras.utils.set_random_seed(3)
        model = build(kit)
        model.compile(kit.keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=jit_compile)
        recorder, *_ = fit(kit, model, epochs=5)
        ends.append(model.get_weights())
        assert_exact(kit, model, recorder, [2, 3, 4])
    assert_weights(ends[1], [w.astype(np.float64) for w in ends[0]], RELATIVE_OF_TRAINING)


@pytest.mark.parametrize("schedule", ["manual", "cyclic"])
def test_nothing_is_read_from_the_device_between_two_steps(
    kit, two_replicas, monkeypatch, schedule
):
    eager = next(c for c in type(tf.constant(0)).__mro__ if "_numpy" in vars(c))
    original, ours = eager._numpy, Path(swa_dist.__file__).parent
    at, reads = ["nowhere"], set()

    def spy(self):
        frames = [f for f in traceback.extract_stack() if ours in Path(f.filename).parents]
        # Keras's own train function reads whether it got a batch.
        if frames and Path(frames[-1].filename).stem != "train_function":
            reads.add(at[0])
        return original(self)

    monkeypatch.setattr(eager, "_numpy", spy)
    model = build(kit, two_replicas)
    clock = kit.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: at.__setitem__(0, "begin"),
        on_train_batch_end=lambda batch, logs: at.__setitem__(0, "steps" if batch < 1 else "end"),
    )
    swa = kit.SWA(2) if schedule == "manual" else kit.SWA(2, "cyclic", swa_freq=2)
    model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=[clock, swa])
    assert reads == {"nowhere", "begin", "end"}
