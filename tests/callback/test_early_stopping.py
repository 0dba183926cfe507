"""However a run is stopped, what it has averaged is in the model."""

import pytest
import tensorflow as tf

from tests.helpers.assertions import (
    Statistics,
    assert_bitwise,
    assert_exact,
    assert_trains_on,
    assert_undisturbed,
    assert_weights,
)
from tests.helpers.callbacks import at, stop
from tests.helpers.data import data, positions
from tests.helpers.devices import mirrored
from tests.helpers.fits import fit
from tests.helpers.marks import ran_out
from tests.helpers.models import build

pytestmark = pytest.mark.either_keras


@pytest.mark.exactness
@pytest.mark.parametrize(("n", "stopped"), [(2, 5), (4, 3)])
def test_early_stopping_is_followed_by_one_epoch_of_bn_pass(kit, n, stopped):
    model = build(kit, mirrored(n))
    recorder, swa, history = fit(kit, model, before=[at(kit, stopped, stop)], epochs=6)
    assert len(history["loss"]) == stopped + 1
    assert history["learning_rate"][-1] == 0.0
    assert model.stop_training
    assert swa.n_averaged == stopped - 1
    assert int(kit.array(model.optimizer.iterations)) == 3 * stopped
    assert_exact(kit, model, recorder, range(2, stopped + 1))


def test_a_stop_in_validation_is_noticed_in_time(kit):
    model = build(kit)
    recorder, _, history = fit(
        kit, model, after=[at(kit, 4, stop, "on_test_end")], validation_data=data()
    )
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


def test_stopped_by_a_later_callback_the_model_has_averaged_statistics(kit, two_replicas):
    model = build(kit, two_replicas)
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
    assert_trains_on(kit, model)


def test_stopped_within_the_pass_the_statistics_are_of_the_samples_it_saw(kit, two_replicas):
    model = build(kit, two_replicas)
    recorder, *_ = fit(kit, model, after=[at(kit, 5, stop, "on_train_batch_end")], epochs=5)
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(data()[0][:8]))
    assert_trains_on(kit, model)


@ran_out
def test_a_first_epoch_that_was_cut_short_says_nothing_of_the_pass(kit):
    class StopFirst(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == 0 and batch == 0:
                self.model.stop_training = True

    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8).filter(lambda x, y: True)
    model = build(kit)
    recorder, _, history = fit(kit, model, before=[StopFirst()], start_epoch=1, fed=fed)
    assert len(history["loss"]) == 2
    assert int(kit.array(model.optimizer.iterations)) == int(recorder.states[0][0])
    assert_bitwise(kit.optimizer_state(model.optimizer), recorder.states[0])
    assert_exact(kit, model, recorder, [1])
