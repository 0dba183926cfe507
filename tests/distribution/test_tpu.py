"""On the real TPUStrategy and its variables, with CPUs for cores (see tests/tpu.py)."""

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.averaging.bn_average import BatchNormAverage
from swa_dist.distribution import is_chief
from swa_dist.resume.checkpoints import Checkpoints
from tests.helpers.assertions import (
    assert_bitwise,
    assert_statistics,
    assert_weights,
)
from tests.helpers.batch_norm import assert_pooled, deal, feed, layer, skewed
from tests.helpers.callbacks import at, stop
from tests.helpers.data import data, positions
from tests.helpers.fits import fit
from tests.helpers.models import build, norm_of
from tests.helpers.tpu_on_cpus import tpu_on_cpus
from tests.helpers.variables import average_of, copies, mirrored_variables

pytestmark = [pytest.mark.optimized_graphs, pytest.mark.either_keras]


@pytest.fixture(params=[2, 4])
def strategy(request, monkeypatch):
    return tpu_on_cpus(request.param, monkeypatch)


def test_the_stand_in_is_made_of_tpu_variables_each_on_its_replicas_device(strategy):
    v, *_ = mirrored_variables(strategy, ["float32"] * 4)
    assert type(v).__name__ == "TPUDistributedVariable"
    assert v._packed_variable is not None
    local = strategy.experimental_local_results(v)
    assert len({copy.device for copy in local}) == strategy.num_replicas_in_sync


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_on_every_replica(strategy, dtype):
    variables = mirrored_variables(strategy, [dtype] * 4)
    average = average_of(variables, strategy)
    for value in (1, 2, 6):
        for v in variables:
            v.assign(tf.fill(v.shape, tf.constant(value, dtype)))
        average.update()
    variables[2].assign(tf.constant(np.nan, dtype))
    average.update()
    assert average.n_averaged == 3
    average.copy_to_model()
    for replica in copies(strategy, variables):
        for array in replica:
            np.testing.assert_array_equal(array.astype("float32"), 3)
    assert {type(v).__name__ for v in average.buffers} == {"TPUDistributedVariable"}


def test_each_replica_averages_its_own_copy(strategy):
    v, *_ = mirrored_variables(strategy, ["float32"] * 4)
    average = average_of([v], strategy)

    @tf.function
    def differ(scale):
        def assign():
            i = tf.distribute.get_replica_context().replica_id_in_sync_group
            v.assign(tf.fill(v.shape, scale * tf.cast(i + 1, tf.float32)))

        strategy.run(assign)

    for scale in (1.0, 3.0):
        differ(tf.constant(scale))
        average.update()
    average.copy_to_model()
    for i, copy in enumerate(strategy.experimental_local_results(v)):
        np.testing.assert_array_equal(copy.numpy(), 2.0 * (i + 1))


def test_the_average_is_saved_and_taken_up_again(strategy, tmp_path):
    variables = mirrored_variables(strategy, ["float32"] * 4)
    average, backup = average_of(variables, strategy), Checkpoints(tmp_path, is_chief(strategy))
    for v in variables:
        v.assign(tf.ones_like(v))
    average.update()
    backup.open()
    record = {"configuration": {}, "layout": {}}
    backup.save(1, {"weights": average}, record)
    another = average_of(variables, strategy)
    assert backup.newest(1, {}, {}) == (1, record)
    backup.restore(1, {"weights": another})
    for v in variables:
        v.assign(tf.fill(v.shape, 3.0))
    another.update()
    another.copy_to_model()
    for replica in copies(strategy, variables):
        for array in replica:
            np.testing.assert_array_equal(array, 2)
    backup.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize("size", [4, 32, 128])
def test_statistics_of_positions_are_pooled(strategy, size):
    x = skewed(128, 5)
    with strategy.scope():
        norm = layer([5])
    assert_pooled(feed(strategy, norm, deal(x, strategy.num_replicas_in_sync, size)), positions(x))


def test_statistics_of_snapshots_are_averaged(strategy):
    with strategy.scope():
        norm = layer([3])
    average = BatchNormAverage([norm], strategy)
    for mean in (1.0, 5.0):
        norm.mean.assign([mean] * 3)
        norm.variance.assign([2.0] * 3)
        average.update()
    average.copy_to_model()
    for copy in copies(strategy, norm.variables):
        assert_bitwise(copy, [[3] * 3, [2] * 3])


@pytest.fixture
def unpacked(strategy):
    # Gradients find a packed variable only within the rewriting that the stand-in leaves out.
    strategy._enable_packed_variable_in_eager_mode = False
    return strategy


def fed():
    return tf.data.Dataset.from_tensor_slices(data()).batch(8, drop_remainder=True)


@pytest.mark.parametrize(
    ("strategy", "ending"), [(2, "early"), (4, "as planned")], indirect=["strategy"]
)
def test_a_whole_fit(kit, unpacked, ending):
    model = build(kit, unpacked)
    stopping = [at(kit, 4, stop)] if ending == "early" else []
    epochs = 9 if ending == "early" else 5
    recorder, swa, history = fit(kit, model, before=stopping, epochs=epochs, fed=fed())
    assert len(history["loss"]) == 5
    assert swa.inferred_batch_size == 8
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert_statistics(kit, norm_of(model), positions(data()[0]))
    kit.assert_replicas_agree(model)
