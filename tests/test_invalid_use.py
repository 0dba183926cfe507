"""What other code does to a model while SWA averages it is followed, or refused in time."""

import subprocess
import sys

import numpy as np
import pytest

from tests import FOREVER
from tests.fits import (
    NO_STRATEGY,
    RATE,
    assert_exact,
    assert_undisturbed,
    at,
    build,
    data,
    fit,
    norm_of,
)
from tests.kits import positions
from tests.tolerances import assert_bitwise, assert_mean, assert_weights

pytestmark = pytest.mark.usefixtures("unoptimized_graphs")


def test_two_in_one_fit_are_refused(kit):
    model = build(kit)
    before = model.get_weights()
    twice = kit.SWA(2)
    for pair in ([kit.SWA(2), kit.SWA(3)], [twice, twice]):
        with pytest.raises(ValueError, match="`callbacks` must have one SWA"):
            model.fit(*data(), epochs=4, verbose=0, callbacks=pair)
        assert_bitwise(model.get_weights(), before)
    fit(kit, model, epochs=4)  # what was refused is forgotten


def test_a_run_that_another_callback_ended_at_its_beginning_can_be_begun_again(kit):
    def fail(logs):
        raise KeyboardInterrupt

    model = build(kit)
    failing = kit.keras.callbacks.LambdaCallback(on_train_begin=fail)
    with pytest.raises(KeyboardInterrupt):
        fit(kit, model, after=[failing], epochs=4)
    recorder, *_ = fit(kit, model, epochs=4)
    assert_exact(kit, model, recorder, [2, 3])


def test_an_instance_in_a_fit_within_its_own_fit_is_refused(kit):
    swa, inner, outer = kit.SWA(2), build(kit), build(kit)
    nested = at(kit, 2, lambda _: inner.fit(*data(), epochs=4, verbose=0, callbacks=[swa]))
    message = "has been used in another `fit` while this one was running"
    with pytest.raises(RuntimeError, match=message):
        outer.fit(*data(), epochs=4, verbose=0, callbacks=[nested, swa])


def test_another_instance_in_a_fit_within_a_fit_is_right(kit):
    inner, outer, recorders = build(kit), build(kit), []
    nested = at(kit, 3, lambda _: recorders.append(fit(kit, inner, epochs=4)[0]))
    recorder, *_ = fit(kit, outer, before=[nested], epochs=5)
    assert_exact(kit, inner, recorders[0], [2, 3])
    assert_exact(kit, outer, recorder, [2, 3, 4])


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


def test_a_model_from_outside_the_scope_is_refused(kit, two_replicas):
    model = build(kit, NO_STRATEGY)
    with two_replicas.scope(), pytest.raises((ValueError, RuntimeError)) as error:
        fit(kit, model, epochs=4)
    assert "scope" in str(error.value)


PARAMETER_SERVER = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
import tensorflow as tf
from tests.kits import KITS
from tests.ports import kept_ports

with kept_ports(2) as (worker, ps):
    cluster = {"worker": [worker], "ps": [ps]}
    servers = [
        tf.distribute.Server(cluster, job_name=job, task_index=0, protocol="grpc", start=True)
        for job in cluster
    ]
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec(cluster), rpc_layer="grpc"
)
strategy = tf.distribute.ParameterServerStrategy(resolver)
for kit in KITS:
    with strategy.scope():
        model = kit.keras.Sequential([kit.keras.layers.Input((3,)), kit.keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    swa = kit.SWA(2)
    swa.set_model(model)
    swa.set_params({"epochs": 3, "steps": 1, "verbose": 0})
    try:
        swa.on_train_begin()
    except ValueError as error:
        assert "replicas step together" in str(error), error
        assert "ParameterServerStrategyV2" in str(error), error
        print(kit.name)
os._exit(0)
"""


def test_a_parameter_server_strategy_is_refused(pytestconfig):
    result = subprocess.run(
        [sys.executable, "-u", "-c", PARAMETER_SERVER],
        cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=FOREVER, check=False,
    )  # fmt: skip
    assert result.stdout.split() == ["keras3", "tf_keras"], result.stderr[-4000:]


def test_a_callback_list_that_does_not_know_the_epochs_is_refused(kit):
    model = build(kit)
    callbacks = kit.keras.callbacks.CallbackList([kit.SWA(2)], add_history=True, model=model)
    for _ in range(2):  # the second time, too, it is not taken for two in one
        with pytest.raises(ValueError, match=r"how many epochs.*CallbackList\(\.\.\., epochs="):
            model.fit(*data(), epochs=4, verbose=0, callbacks=callbacks)
    knowing = kit.keras.callbacks.CallbackList(
        [kit.SWA(2)], add_history=True, model=model, epochs=4
    )
    model.fit(*data(), epochs=4, verbose=0, callbacks=knowing)
    assert_undisturbed(kit, model)
