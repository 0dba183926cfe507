"""A model that has the average for a while: what comes back, and what stays of others' writes."""

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.averaging import model_average
from swa_dist.averaging.model_average import ModelAverage
from tests.helpers.assertions import assert_bitwise, assert_weights
from tests.helpers.devices import on
from tests.helpers.models import build


def averaged(kit, replicas=0):
    """A model, its average over two snapshots, and those: all its weights at either."""
    model, snapshots = build(kit, on(replicas)), []
    average = ModelAverage(model, kit.SWA.keras_api.trainable_batch_norm(model))
    for shift in (1.5, 3.25):
        for variable in model.weights:
            variable.assign(variable + shift)
        snapshots.append([w.copy() for w in model.get_weights()])
        assert average.update()
    return model, average, snapshots


def carrying(kit, replicas=0):
    model, average, snapshots = averaged(kit, replicas)
    average.carry()
    return model, average, snapshots[-1]


def replica_values(kit, model):
    return [value for v in model.weights for value in kit.replicas(v)]


@pytest.mark.parametrize("replicas", [0, 2])
def test_it_carries_the_mean_and_gets_its_own_weights_back(kit, replicas):
    model, average, snapshots = averaged(kit, replicas)
    own = replica_values(kit, model)
    average.carry()
    mean = [np.mean(np.array(ws, np.float64), 0) for ws in zip(*snapshots, strict=True)]
    assert_weights(model.get_weights(), mean)
    kit.assert_replicas_agree(model)
    average.end_carrying()
    assert_bitwise(replica_values(kit, model), own)
    with average.averaged(), average.averaged():
        assert_weights(model.get_weights(), mean)
    assert_bitwise(replica_values(kit, model), own)
    assert not average.is_lost


def test_training_begins_with_its_own_weights_even_if_the_run_is_gone(kit):
    model, average, own = carrying(kit)
    del average
    model.make_train_function()  # what comes before any training
    assert_bitwise(model.get_weights(), own)
    assert "make_train_function" not in vars(model)


def set_weights(kit, model, weights, folder):
    model.set_weights(weights)


def load_weights(kit, model, weights, folder):
    other = build(kit)
    other.set_weights(weights)
    # tf_keras cannot load metrics under a strategy, which its new format has, too.
    path = f"{folder}/other.weights.h5" if kit.name == "keras3" else f"{folder}/other.h5"
    other.save_weights(path)
    model.load_weights(path)


def set_layers(kit, model, weights, folder):
    weights = [*weights]
    for layer in model.layers:
        layer.set_weights([weights.pop(0) for _ in layer.get_weights()])


def assign(kit, model, weights, folder):
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)


def restore_checkpoint(kit, model, weights, folder):
    other = build(kit)
    other.set_weights(weights)
    written = tf.train.Checkpoint(layers=list(map(kit.tensor, other.weights)))
    variables = list(map(kit.tensor, model.weights))
    tf.train.Checkpoint(layers=variables).read(written.write(f"{folder}/other"))


@pytest.mark.parametrize("replicas", [0, 2])
@pytest.mark.parametrize(
    "write", [set_weights, load_weights, set_layers, assign, restore_checkpoint]
)
def test_what_is_written_is_what_training_begins_with(kit, write, replicas, tmp_path):
    written = [w.copy() for w in build(kit).get_weights()]
    model, average, _ = carrying(kit, replicas)
    write(kit, model, written, tmp_path)
    assert_bitwise(model.get_weights(), written)
    model.make_train_function()
    assert_bitwise(model.get_weights(), written)
    average.end_carrying()
    assert_bitwise(model.get_weights(), written)
    assert average.is_lost == (write is restore_checkpoint)


@pytest.mark.parametrize("write", [set_weights, restore_checkpoint])
def test_even_if_it_is_bit_by_bit_the_average(kit, write, tmp_path):
    model, *_ = carrying(kit)
    average = [w.copy() for w in model.get_weights()]
    write(kit, model, average, tmp_path)
    model.make_train_function()
    assert_bitwise(model.get_weights(), average)


def test_what_is_written_of_one_weight_leaves_the_others_their_own(kit):
    model, average, own = carrying(kit)
    kernel = model.layers[-1].kernel
    kernel.assign(tf.zeros_like(kernel))
    model.make_train_function()
    expected = [np.zeros_like(w) if w.shape == (3, 1) else w for w in own]
    assert_bitwise(model.get_weights(), expected)
    assert not average.is_lost


def test_what_escapes_every_hook_stays_and_the_average_is_lost(kit):
    model, average, _ = carrying(kit)
    variable = kit.tensor(model.layers[-1].kernel)
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=tf.zeros((3, 1)))
    written = [w.copy() for w in model.get_weights()]
    model.make_train_function()
    assert average.is_lost
    assert_bitwise(model.get_weights(), written)


@pytest.mark.parametrize("when", ["before_training", "before_writing", "fingerprint"])
def test_ctrl_c_while_it_is_put_into_the_model_leaves_its_own_weights(kit, when, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model, average, snapshots = averaged(kit)
    monkeypatch.setattr(model_average, when, interrupt)
    with pytest.raises(KeyboardInterrupt):
        average.carry()
    monkeypatch.undo()
    assert_bitwise(model.get_weights(), snapshots[-1])
    model.make_train_function()
    assert_bitwise(model.get_weights(), snapshots[-1])
