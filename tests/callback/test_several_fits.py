"""One instance, one model or one process, and several fits."""

import threading

import pytest

from tests.helpers.assertions import (
    assert_bitwise,
    assert_exact,
    assert_statistics,
    assert_undisturbed,
    assert_weights,
)
from tests.helpers.callbacks import at
from tests.helpers.data import data, positions
from tests.helpers.devices import NO_STRATEGY
from tests.helpers.fits import fit
from tests.helpers.models import RATE, build, norm_of

pytestmark = pytest.mark.either_keras


def test_initial_epoch(kit):
    model = build(kit)
    recorder, swa, history = fit(kit, model, start_epoch=5, epochs=8, initial_epoch=3)
    assert len(history["loss"]) == 5
    assert swa.n_averaged == 3
    assert_exact(kit, model, recorder, [2, 3, 4])  # the recorder's count: epochs 5, 6, 7


def test_one_epoch(kit):
    model = build(kit, norm=False)
    recorder, swa, _ = fit(kit, model, start_epoch=1, epochs=1)
    assert swa.n_averaged == 1
    assert_bitwise(kit.trainable(model), recorder.weights[0])
    model = build(kit)
    before = model.get_weights()
    with pytest.raises(ValueError, match="at least one snapshot"):
        fit(kit, model, start_epoch=1, epochs=1)
    assert_bitwise(model.get_weights(), before)


def test_one_callback_in_a_k_fold_loop(kit, two_replicas):
    swa = kit.SWA(2)
    template = build(kit, two_replicas)
    for fold in range(3):
        with two_replicas.scope():
            model = kit.keras.models.clone_model(template)
            model.compile(kit.keras.optimizers.SGD(RATE, momentum=0.9), "mse", jit_compile=False)
        x, y = data(seed=fold)
        recorder = kit.Recorder()
        model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[recorder, swa])
        assert_weights(kit.trainable(model), recorder.mean(2, 3))
        assert_statistics(kit, norm_of(model), positions(x))


def test_two_models_in_turn_and_fit_after_fit(kit, two_replicas):
    swa = kit.SWA(2)
    models = [build(kit, two_replicas), build(kit, NO_STRATEGY)]
    for model in [*models, *models]:
        recorder = kit.Recorder()
        model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=[recorder, swa])
        assert_weights(kit.trainable(model), recorder.mean(2, 3))
        assert int(kit.array(model.optimizer.iterations)) % 9 == 0


def test_fits_in_several_threads_do_not_meet(kit):
    base = next(c for c in kit.keras.layers.BatchNormalization.__mro__ if "call" in vars(c))
    before = vars(base)["call"]
    models = [build(kit) for _ in range(3)]
    recorders = [kit.Recorder() for _ in models]

    def run(model, recorder):
        model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=[recorder, kit.SWA(2)])

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(models, recorders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert vars(base)["call"] is before
    for model, recorder in zip(models, recorders, strict=True):
        assert_exact(kit, model, recorder, [2, 3])


@pytest.mark.parametrize("value", ["", "no JSON", "null", '{"cluster": null}'])
def test_a_tf_config_of_another_kind_is_none_of_its_business(kit, monkeypatch, value):
    monkeypatch.setenv("TF_CONFIG", value)
    kit.SWA(2)


def test_a_list_of_callbacks_serves_several_fits(kit):
    model = build(kit)
    callbacks = kit.keras.callbacks.CallbackList(
        [kit.SWA(2)], add_history=True, model=model, epochs=4, steps=3, verbose=0
    )
    for _ in range(2):
        model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
    assert_undisturbed(kit, model)


def test_a_list_of_callbacks_that_was_interrupted_takes_the_rate_that_is_set_afterwards(kit):
    model = build(kit)

    def fail_once(epoch, logs):
        if epoch == 3 and not failed:
            failed.append(epoch)
            raise KeyboardInterrupt

    failed = []
    callbacks = kit.keras.callbacks.CallbackList(
        [kit.SWA(5, "constant"), kit.keras.callbacks.LambdaCallback(on_epoch_begin=fail_once)],
        add_history=True, model=model, epochs=6, steps=3, verbose=0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=callbacks)
    model.optimizer.learning_rate = 0.02
    model.fit(*data(), batch_size=8, epochs=6, verbose=0, callbacks=callbacks)
    _, _, _, first, *_ = callbacks._history.history["learning_rate"]  # after those of three epochs
    assert first == pytest.approx(0.02)


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
