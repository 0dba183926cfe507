"""Short fits of a small model: what tests of `fit` share."""

import numpy as np
import pytest
import tensorflow as tf

from tests.kits import batched, positions
from tests.tolerances import assert_mean, assert_variance, assert_weights

NO_STRATEGY = tf.distribute.get_strategy()
RATE = 0.05
SHIFT, SCALE = np.array([2, -5, 30]), np.array([1, 3, 5])

ran_out = pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3's own


def data(n=24, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 3)) * SCALE + SHIFT).astype("float32")
    return x, rng.normal(size=(n, 1)).astype("float32")


def build(kit, strategy=NO_STRATEGY, norm=True):
    layers = kit.keras.layers
    with strategy.scope():
        # Without BN, inputs of that size would saturate the units, and train nothing.
        scale = layers.Normalization(mean=SHIFT, variance=SCALE**2)
        first = layers.BatchNormalization() if norm else scale
        model = kit.keras.Sequential(
            [layers.Input((3,)), first, layers.Dense(1, activation="tanh")]
        )
        optimizer = kit.keras.optimizers.SGD(RATE, momentum=0.9)
        model.compile(optimizer, "mse", jit_compile=False)
    return model


def fit(kit, model, before=(), after=(), start_epoch=2, epochs=9, fed=None, **arguments):
    recorder, swa = kit.Recorder(), kit.SWA(start_epoch)
    if fed is None:
        arguments = {"batch_size": 8, **arguments}
    x, y = (fed, None) if isinstance(fed, tf.data.Dataset) else fed or data()
    history = model.fit(
        x, y, epochs=epochs, verbose=0, shuffle=False,
        callbacks=[*before, recorder, swa, *after], **arguments,
    )  # fmt: skip
    return recorder, swa, history.history


def at(kit, epoch, action, hook="on_epoch_end"):
    """A callback that acts on the model in one hook of one epoch, counted from 1."""

    class At(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            self.epoch = number + 1
            if hook == "on_epoch_begin":
                self.act()

        def act(self, *args, **kwargs):
            if self.epoch == epoch:
                action(self.model)

    if hook != "on_epoch_begin":
        setattr(At, hook, At.act)
    return At()


def stop(model):
    model.stop_training = True


def norm_of(model):
    return next(layer for layer in model.layers if hasattr(layer, "moving_mean"))


def assert_exact(kit, model, recorder, snapshots, seen=None):
    assert_weights(kit.trainable(model), recorder.mean(*snapshots))
    seen = positions(data()[0]) if seen is None else seen
    mean, variance = kit.statistics(norm_of(model))
    assert_mean(mean, seen.mean(0), seen.std(0))
    assert_variance(variance, seen.var(0))
    assert_undisturbed(kit, model)


def assert_undisturbed(kit, model):
    kit.assert_replicas_agree(model)
    assert kit.rate(model) == pytest.approx(RATE)
    assert "make_train_function" not in vars(model)
    state = kit.optimizer_state(model.optimizer)
    model.fit(batched(*data()), shuffle=False, verbose=0)
    moved = zip(state, kit.optimizer_state(model.optimizer), strict=True)
    assert any((a != b).any() for a, b in moved)


class Statistics:
    """The definition of the statistics that an average without a BN pass has: of each snapshot
    those of the replicas, pooled with equal weight; of the snapshots their mean."""

    def __init__(self, kit, *epochs):
        self.snapshots = []

        class Keep(kit.keras.callbacks.Callback):
            def on_epoch_end(_, epoch, logs=None):  # noqa: N805
                if epoch + 1 in epochs:
                    norm = norm_of(_.model)
                    means = np.array(kit.replicas(norm.moving_mean), np.float64)
                    variances = np.array(kit.replicas(norm.moving_variance), np.float64)
                    self.snapshots.append((means.mean(0), variances.mean(0) + means.var(0)))

        self.callback = Keep()

    def assert_averaged(self, kit, model):
        mean, variance = (np.mean(s, 0) for s in zip(*self.snapshots, strict=True))
        actual_mean, actual_variance = kit.statistics(norm_of(model))
        assert_mean(actual_mean, mean, 0)
        assert_variance(actual_variance, variance)


def poison(model):
    weight = model.trainable_variables[-1]
    weight.assign(np.full(weight.shape, np.nan))
