"""What other code does to a model while SWA averages it is followed, or refused in time."""

import numpy as np
import pytest

from tests.helpers.assertions import assert_bitwise, assert_mean, assert_weights
from tests.helpers.callbacks import at
from tests.helpers.data import data, positions
from tests.helpers.fits import fit
from tests.helpers.models import RATE, build, norm_of

pytestmark = pytest.mark.either_keras


def compile_anew(kit):
    def act(model):
        optimizer = kit.keras.optimizers.SGD(2 * RATE, momentum=0.5)
        model.compile(optimizer, "mse", jit_compile=False)
        model.make_train_function()

    return act


def test_a_model_compiled_anew_between_epochs(kit, two_replicas):
    def act(model):
        with two_replicas.scope():
            compile_anew(kit)(model)

    model = build(kit, two_replicas)
    recorder, *_ = fit(kit, model, before=[at(kit, 3, act, "on_epoch_begin")], epochs=5)
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert_mean(kit.statistics(norm_of(model))[0], positions(data()[0]).mean(0), 1)
    # The pass ends itself, before any callback is told of its last batch.
    assert recorder.batch_rates[-1] == [0.0, 0.0, pytest.approx(2 * RATE)]
    assert kit.rate(model) == pytest.approx(2 * RATE)


def test_weights_that_others_put_in_place_at_the_beginning_of_the_pass_give_way(kit, two_replicas):
    layers = kit.keras.layers
    with two_replicas.scope():
        stack = [layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)]
        model = kit.keras.Sequential([layers.Input((3,)), *stack])
        model.compile(kit.keras.optimizers.SGD(1e-3), "mse", jit_compile=False)

    def double(model):
        for variable in model.trainable_variables:
            variable.assign(2 * variable)

    recorder, *_ = fit(kit, model, after=[at(kit, 5, double, "on_epoch_begin")], epochs=5)
    kernel, bias, *_ = average = recorder.mean(2, 3, 4)
    assert_weights(kit.trainable(model), average)
    seen = data()[0].astype(np.float64) @ kernel + bias
    mean, variance = kit.statistics(norm_of(model))
    np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, seen.var(0), rtol=1e-5)


def freezing(kit, trainable, at_first):
    def act(model):
        model.layers[-1].trainable = trainable
        compile_anew(kit)(model)

    model = build(kit)
    model.layers[-1].trainable = at_first
    compile_anew(kit)(model)
    return model, act


def test_a_layer_frozen_between_epochs_is_averaged_like_the_others(kit):
    model, act = freezing(kit, trainable=False, at_first=True)
    last = model.layers[-1].kernel
    kept = []
    keep = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.append(kit.array(last))
    )
    fit(kit, model, before=[at(kit, 3, act, "on_epoch_begin"), keep], epochs=5)
    assert_bitwise([kept[2]], [kept[3]])
    assert_weights([kit.array(last)], [np.mean([w.astype(np.float64) for w in kept[1:4]], 0)])


def test_a_layer_that_begins_to_train_before_the_first_snapshot_is_averaged(kit):
    model, act = freezing(kit, trainable=True, at_first=False)
    recorder, *_ = fit(
        kit, model, before=[at(kit, 2, act, "on_epoch_begin")], start_epoch=3, epochs=5
    )
    assert_weights(kit.trainable(model), recorder.mean(3, 4))


def test_a_layer_that_begins_to_train_after_the_first_snapshot_is_refused(kit):
    model, act = freezing(kit, trainable=True, at_first=False)
    with pytest.raises(ValueError, match="`trainable` must not change from False to True") as error:
        fit(kit, model, before=[at(kit, 3, act, "on_epoch_begin")], epochs=5)
    assert "kernel" in str(error.value)
    assert "the 1 snapshots" in str(error.value)


def test_weights_added_after_the_first_snapshot_are_refused(kit):
    def grow(model):
        if kit.name == "keras3":
            model.layers[-1].enable_lora(2)
        else:
            model.layers[-1].add_weight(name="lora", shape=())

    with pytest.raises(ValueError, match=r"no weights may be added.*lora"):
        fit(kit, build(kit), before=[at(kit, 3, grow, "on_epoch_begin")], epochs=5)


def test_a_layer_frozen_between_epochs_keeps_its_statistics(kit):
    layers = kit.keras.layers
    norms = [layers.BatchNormalization() for _ in range(2)]
    model = kit.keras.Sequential([layers.Input((3,)), *norms, layers.Dense(1)])
    model.compile(kit.keras.optimizers.SGD(RATE), "mse", jit_compile=False)
    kept = []

    def freeze(model):
        norms[0].trainable = False
        model.compile(kit.keras.optimizers.SGD(RATE), "mse", jit_compile=False)
        model.make_train_function()
        kept.extend(kit.statistics(norms[0]))

    fit(kit, model, before=[at(kit, 4, freeze, "on_epoch_begin")], epochs=6)
    assert_bitwise(kit.statistics(norms[0]), kept)
