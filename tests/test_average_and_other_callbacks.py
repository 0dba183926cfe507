"""The average in the model, with other callbacks, and optimizers that have their own."""

import functools

import numpy as np
import pytest

from tests.conftest import mirrored
from tests.fits import at, build, data, norm_of
from tests.kits import batched
from tests.test_backup import KilledError, kill, spoil
from tests.tolerances import assert_bitwise, assert_weights

pytestmark = pytest.mark.usefixtures("unoptimized_graphs")

START, EPOCHS = 2, 4
X, Y = data(24, seed=3)
HELD_OUT = batched(X, Y)
HOOKS = (
    "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_test_begin",
    "on_test_batch_begin", "on_test_batch_end", "on_test_end", "on_epoch_end", "on_predict_begin",
    "on_predict_batch_end", "on_predict_end",
)  # fmt: skip


def run(kit, after=lambda swa: [], validation_freq=1, **arguments):
    """A run with validation on two replicas: model, recorder, callback, history."""
    kit.keras.utils.set_random_seed(7)
    model, recorder = build(kit, mirrored(2)), kit.Recorder()
    swa = kit.SWA(START, **arguments)
    history = model.fit(
        *data(20), batch_size=8, epochs=EPOCHS, verbose=0, shuffle=False, validation_data=HELD_OUT,
        validation_freq=validation_freq, callbacks=[recorder, swa, *after(swa)],
    ).history  # fmt: skip
    return model, recorder, swa, history


@functools.cache
def plain(kit):
    """What a run leaves that does not look at the average before its end."""
    model, recorder, *_ = run(kit)
    return recorder, kit.statistics(norm_of(model))


def assert_undisturbed(kit, model):
    recorder, statistics = plain(kit)
    assert_weights(kit.trainable(model), recorder.mean(*range(START, EPOCHS)))
    assert_bitwise(kit.statistics(norm_of(model)), statistics)
    kit.assert_replicas_agree(model)


@pytest.mark.parametrize("validate_average", [False, True])
def test_from_any_hook(kit, validate_average):
    recorder, _ = plain(kit)
    looked = dict.fromkeys(HOOKS, 0)

    def copies(model):
        return [replica for v in model.weights for replica in kit.replicas(v)]

    def look(swa):
        def act(callback, hook):
            if not swa.n_averaged:
                return
            before = copies(callback.model)
            with swa.averaged_weights():
                weights = kit.trainable(callback.model)
            assert_bitwise(copies(callback.model), before)
            assert_weights(weights, recorder.mean(*range(START, START + swa.n_averaged)))
            looked[hook] += 1

        class Look(kit.keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                act(self, "on_epoch_end")
                if epoch >= START:
                    self.model.predict(HELD_OUT, verbose=0, callbacks=[self])

        for hook in {*HOOKS} - {"on_epoch_end"}:
            setattr(Look, hook, lambda self, *_, hook=hook, **__: act(self, hook))
        return [Look()]

    model, *_ = run(kit, look, validate_average=validate_average)
    assert min(looked.values()) >= EPOCHS - START, looked
    assert_undisturbed(kit, model)


def test_epochs_without_validation_count_too(kit):
    """With `validation_freq=2`, the others have a snapshot at their end, and keep the weights."""
    seen = []

    def look(swa):
        return [at(kit, 3, lambda model: seen.append(kit.trainable(model)))]

    model, _, _, history = run(kit, look, validate_average=True, validation_freq=2)
    assert len(history["val_loss"]) == EPOCHS // 2
    assert_bitwise(seen[0], plain(kit)[0].weights[2])
    assert_undisturbed(kit, model)


@pytest.mark.parametrize("who", ["a callback", "the optimizer"])
def test_what_others_put_into_the_model_at_the_end_is_not_the_average(kit, two_replicas, who):
    """Without a BN pass the average of the last validation is still in the model then."""
    model = build(kit, two_replicas, norm=False)
    trained, stopping = [], []
    if who == "a callback":
        stopping += [
            kit.keras.callbacks.EarlyStopping(
                "val_loss", patience=2, min_delta=1e3, restore_best_weights=True
            )
        ]
    else:
        with two_replicas.scope():
            optimizer = kit.keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)
            model.compile(optimizer, "mse", jit_compile=False)

    class Keep(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            trained.append(None)

        def on_train_batch_end(self, batch, logs=None):
            trained[-1] = kit.trainable(self.model)

    x, y = data(20)
    swa = kit.SWA(1, validate_average=True)
    model.fit(
        x / 30, y, batch_size=8, epochs=3, verbose=0, validation_data=batched(X / 30, Y),
        callbacks=[Keep(), *stopping, swa],
    )  # fmt: skip
    assert swa.n_averaged == len(trained) == 3
    mean = [np.mean(np.float64(ws), 0) for ws in zip(*trained, strict=True)]
    assert_weights(kit.trainable(model), mean)
    kit.assert_replicas_agree(model)


def test_a_model_saved_with_the_average_does_not_replace_a_damaged_checkpoint(kit, tmp_path):
    """Only the damaged state had the trained weights: there is no snapshot to take from them."""

    def train(*after):
        swa = kit.SWA(2, backup_dir=tmp_path / "swa", validate_average=True)
        restore = kit.keras.callbacks.BackupAndRestore(str(tmp_path / "model"))
        build(kit).fit(
            *data(20), batch_size=8, epochs=6, verbose=0, validation_data=HELD_OUT,
            callbacks=[restore, swa, *after],
        )  # fmt: skip

    with pytest.raises(KilledError):
        train(at(kit, 4, kill))
    spoil(tmp_path / "swa", 4)
    with (
        pytest.warns(UserWarning, match="swa-epoch-00004' is damaged"),
        pytest.raises(ValueError, match=r"snapshots were due at the end of epoch 4\. Go on with"),
    ):
        train()
