"""However a run ends, what it has earned is delivered, and nothing else is left changed."""

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import mirrored
from tests.fits import (
    NO_STRATEGY,
    RATE,
    Statistics,
    assert_exact,
    assert_undisturbed,
    at,
    build,
    data,
    fit,
    norm_of,
    poison,
    ran_out,
    stop,
)
from tests.kits import positions
from tests.tolerances import assert_bitwise, assert_mean, assert_variance, assert_weights

pytestmark = pytest.mark.usefixtures("unoptimized_graphs")


@pytest.mark.exactness
@pytest.mark.parametrize(("n", "stopped"), [(1, 3), (2, 5), (4, 3)])
def test_early_stopping_is_followed_by_one_epoch_of_bn_pass(kit, n, stopped):
    model = build(kit, mirrored(n))
    recorder, swa, history = fit(kit, model, before=[at(kit, stopped, stop)], epochs=6)
    assert len(history["loss"]) == stopped + 1
    assert history["learning_rate"][-1] == 0.0
    assert model.stop_training
    assert swa.n_averaged == stopped - 1
    assert int(kit.array(model.optimizer.iterations)) == 3 * stopped
    assert_exact(kit, model, recorder, range(2, stopped + 1))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_end"])
def test_any_early_stop_is_noticed_in_time(kit, hook):
    model = build(kit)
    recorder, _, history = fit(kit, model, after=[at(kit, 4, stop, hook)], validation_data=data())
    assert len(history["loss"]) == 5
    assert_exact(kit, model, recorder, range(2, 5))


def early_stopping(kit):
    """A loss that does not improve by 1000 stops after `patience` epochs: at the end of epoch 4."""
    return kit.keras.callbacks.EarlyStopping(
        "loss", patience=3, min_delta=1e3, restore_best_weights=True
    )


def test_keras_early_stopping_stops_and_its_best_weights_give_way(kit, two_replicas):
    model = build(kit, two_replicas)
    recorder, _, history = fit(kit, model, before=[early_stopping(kit)])
    assert len(history["loss"]) == 5
    assert_exact(kit, model, recorder, range(2, 5))


def test_best_weights_restored_after_swa_win(kit):
    model = build(kit)
    with pytest.warns(UserWarning, match="put such a callback before SWA"):
        recorder, *_ = fit(kit, model, after=[early_stopping(kit)])
    assert_bitwise(kit.trainable(model), recorder.weights[0])


def test_fractions_of_the_epochs_are_those_of_the_run_that_was_planned(kit):
    model = build(kit)
    recorder, swa, _ = fit(kit, model, before=[at(kit, 6, stop)], start_epoch=0.5, epochs=10)
    assert swa.n_averaged == 1
    assert_exact(kit, model, recorder, [6])


def test_without_bn_early_stopping_needs_no_further_epoch(kit):
    model = build(kit, norm=False)
    recorder, _, history = fit(kit, model, before=[at(kit, 4, stop)])
    assert len(history["loss"]) == 4
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert_undisturbed(kit, model)


@pytest.mark.parametrize("n", [1, 2])
def test_stopped_by_a_later_callback_the_model_has_averaged_statistics(kit, n):
    model = build(kit, mirrored(n))
    kept = Statistics(kit, 2, 3, 4)
    # 20 samples: the parts of the last batch differ from replica to replica.
    with pytest.warns(UserWarning, match="were not recomputed") as warned:
        recorder, _, history = fit(
            kit, model, before=[kept.callback], after=[at(kit, 4, stop)], fed=data(20), batch_size=8
        )
    assert len(history["loss"]) == 4
    message = str(warned.pop(UserWarning).message)
    for words in (
        "training ended with epoch 4", "stands after SWA", "3 snapshots",
        "put such a callback before SWA",
    ):  # fmt: skip
        assert words in message
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    kept.assert_averaged(kit, model)
    assert_undisturbed(kit, model)


def test_statistics_that_are_not_finite_on_a_replica_do_not_enter_the_average(kit, two_replicas):
    def spoil(model):
        variable = kit.tensor(norm_of(model).moving_mean)
        variable.values[0].assign([np.nan, 1, 1])

    def keep(model):
        kept.append([kit.replicas(v)[1] for v in norm_of(model).non_trainable_variables])

    kept = []
    model = build(kit, two_replicas)
    with pytest.warns(UserWarning, match="were not recomputed"):
        fit(kit, model, before=[at(kit, 2, keep), at(kit, 2, spoil)], after=[at(kit, 2, stop)])
    assert_bitwise(kit.statistics(norm_of(model)), kept[0])


@pytest.mark.parametrize("side", ["before", "after"])
def test_stopped_before_the_first_snapshot_the_weights_stay_as_trained(kit, side):
    model = build(kit)
    with pytest.warns(UserWarning, match="ended with epoch 3, .* snapshot at the end of epoch 6"):
        recorder, swa, history = fit(kit, model, start_epoch=6, **{side: [at(kit, 3, stop)]})
    assert len(history["loss"]) == 3
    assert swa.n_averaged == 0
    assert_bitwise(kit.trainable(model), recorder.weights[2])


def test_stopped_within_the_pass_the_statistics_are_of_the_samples_it_saw(kit, two_replicas):
    model = build(kit, two_replicas)
    recorder, *_ = fit(kit, model, after=[at(kit, 5, stop, "on_train_batch_end")], epochs=5)
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(data()[0][:8]))


def test_what_is_not_finite_is_not_averaged_and_terminate_on_nan_ends_finite(kit, two_replicas):
    model = build(kit, two_replicas)
    terminate = kit.keras.callbacks.TerminateOnNaN()
    with pytest.warns(UserWarning, match="are not finite") as warned:
        recorder, swa, history = fit(
            kit, model, before=[terminate, at(kit, 4, poison, "on_train_batch_begin")]
        )
    assert len(history["loss"]) == 5
    assert swa.n_averaged == 2
    assert np.isnan(recorder.weights[3][-1]).all()
    message = str(warned.pop(UserWarning).message)
    name = getattr(model.trainable_variables[0], "path", model.trainable_variables[0].name)
    for words in ("end of epoch 4", "has 2 snapshots", repr(name), "lower the learning rate"):
        assert words in message
    assert_exact(kit, model, recorder, [2, 3])


def test_a_run_may_recover_from_what_is_not_finite(kit):
    model = build(kit)
    healthy = []

    def heal(model):
        model.trainable_variables[-1].assign(healthy[-1])

    keep = at(kit, 4, lambda m: healthy.append(kit.array(m.trainable_variables[-1])))
    with pytest.warns(
        UserWarning, match=r"end of epoch 4 are not finite.*dense/bias|dense_\d+/bias"
    ):
        recorder, swa, _ = fit(
            kit, model, before=[keep, at(kit, 4, poison)], after=[at(kit, 4, heal)], epochs=7
        )
    assert swa.n_averaged == 4
    assert_exact(kit, model, recorder, [2, 3, 5, 6])


def test_when_no_snapshot_is_finite_a_warning_says_so(kit):
    model = build(kit)
    with pytest.warns(UserWarning, match="no snapshot was finite|are not finite") as warned:
        fit(kit, model, before=[at(kit, 1, poison)], epochs=4)
    assert len(warned) == 3
    assert "no snapshot was finite" in str(warned[-1].message)
    assert kit.rate(model) == pytest.approx(RATE)


@ran_out
def test_a_replica_without_samples_is_named_as_the_cause(kit, two_replicas):
    model = build(kit, two_replicas)
    if kit.name == "tf_keras":  # which trains on
        fit(kit, model, fed=data(9), batch_size=8, epochs=3)
        return
    message = r"fewer samples than there are replicas|no snapshot"
    with pytest.warns(UserWarning, match=message) as all_:
        fit(kit, model, fed=data(9), batch_size=8, epochs=3)
    assert len(all_) == 2


def batches_of(epochs):
    """A dataset whose iterators give these numbers of batches of 8, one iterator after another."""
    x, y = data()
    left = iter(epochs)

    def generate():
        for i in range(next(left, 0)):
            yield x[8 * i : 8 * i + 8].copy(), y[8 * i : 8 * i + 8].copy()

    signature = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


@ran_out
def test_a_pass_over_less_data_ends_with_it_and_has_its_statistics(kit):
    model, seen = build(kit), []
    look = at(kit, 5, lambda model: seen.extend(model.get_weights()))
    recorder, *_ = fit(kit, model, before=[look], epochs=5, fed=batches_of([3, 3, 3, 3, 2]))
    assert_bitwise(seen, model.get_weights())
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(data()[0][:16]))


@ran_out
def test_a_pass_without_data_leaves_the_average_and_says_so(kit):
    model = build(kit)
    kept = Statistics(kit, 2, 3, 4)
    fed = batches_of([3, 3, 3, 3, 0])
    with pytest.warns(UserWarning, match="there was no data in the BN pass"):
        recorder, *_ = fit(kit, model, before=[kept.callback], epochs=5, fed=fed)
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    kept.assert_averaged(kit, model)
    assert_undisturbed(kit, model)


@ran_out
def test_data_that_runs_out_before_the_pass(kit, two_replicas):
    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8).repeat(4)
    model = build(kit, two_replicas)
    if kit.name == "keras3":  # which begins the data anew
        recorder, *_ = fit(kit, model, fed=fed, steps_per_epoch=3, epochs=6)
        assert_exact(kit, model, recorder, range(2, 6))
        return
    kept = Statistics(kit, 2, 3, 4)
    with pytest.warns(UserWarning, match="the data ran out.* let `fit` have data for every epoch"):
        recorder, *_ = fit(kit, model, before=[kept.callback], fed=fed, steps_per_epoch=3, epochs=6)
    # tf_keras learns in epoch 5 that there is no more: at its end the weights are as before.
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4, 5))
    assert_undisturbed(kit, model)


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
        mean, variance = kit.statistics(norm_of(model))
        assert_mean(mean, positions(x).mean(0), positions(x).std(0))
        assert_variance(variance, positions(x).var(0))


def test_two_models_in_turn_and_fit_after_fit(kit, two_replicas):
    swa = kit.SWA(2)
    models = [build(kit, two_replicas), build(kit, NO_STRATEGY)]
    for model in [*models, *models]:
        recorder = kit.Recorder()
        model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=[recorder, swa])
        assert_weights(kit.trainable(model), recorder.mean(2, 3))
        assert int(kit.array(model.optimizer.iterations)) % 9 == 0
