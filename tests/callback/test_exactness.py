"""What `fit` leaves behind, on every replica."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import (
    assert_bitwise,
    assert_statistics,
    assert_weights,
)
from tests.helpers.models import build_optimizer

pytestmark = pytest.mark.optimized_graphs

EPOCHS = 5
NO_STRATEGY = tf.distribute.get_strategy()


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 6, 6, 2)) * [1, 3] + [2, -5]).astype("float32")
    return x, rng.integers(0, 3, n)


def build(kit, strategy=NO_STRATEGY, optimizer="SGD", rate=0.1, convolve=True, **compile_arguments):
    """A small network with BN of 4-D and 2-D inputs, a tap before each."""
    keras = kit.keras
    with strategy.scope():
        taps = [kit.Tap(name=f"tap{i}") for i in range(3)]
        norms = [keras.layers.BatchNormalization(name=f"bn{i}") for i in range(3)]
        inputs = keras.layers.Input((6, 6, 2))
        x = norms[0](taps[0](inputs))
        middle = keras.layers.Conv2D(4, 3, use_bias=False) if convolve else keras.layers.Dense(4)
        x = middle(x)
        x = keras.layers.ReLU()(norms[1](taps[1](x)))
        x = keras.layers.GlobalAveragePooling2D()(x)
        x = norms[2](taps[2](x))
        model = keras.Model(inputs, keras.layers.Dense(3)(x))
        model.compile(
            optimizer=getattr(keras.optimizers, optimizer)(rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **{"jit_compile": False, **compile_arguments},
        )
        build_optimizer(model)
    return model, taps, norms


def tap_last_epoch(kit, taps, epochs=EPOCHS):
    def on_epoch_begin(epoch, logs):
        for tap in taps:
            tap.on = epoch == epochs - 1

    return kit.keras.callbacks.LambdaCallback(on_epoch_begin=on_epoch_begin)


def assert_pooled(kit, taps, norms):
    for tap, norm in zip(taps, norms, strict=True):
        seen = tap.positions()
        assert_statistics(kit, norm, seen)


@pytest.mark.exactness
def test_exact_average_and_statistics_with_a_ragged_last_batch(kit, strategy):
    model, taps, norms = build(kit, strategy)
    x, y = images(60)  # batches of 16, 16, 16, 12: 12 over 4 replicas leaves none without samples
    recorder, swa = kit.Recorder(), kit.SWA(start_epoch=2)
    model.fit(
        x, y, batch_size=16, epochs=EPOCHS, verbose=0,
        callbacks=[tap_last_epoch(kit, taps), recorder, swa],
    )  # fmt: skip
    assert swa.n_averaged == 3
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert sum(len(batch) for batch in taps[0].seen) == 60
    np.testing.assert_allclose(taps[0].positions().sum(0), x.sum((0, 1, 2), np.float64), rtol=1e-9)
    assert_pooled(kit, taps, norms)
    kit.assert_replicas_agree(model)


@pytest.mark.exactness
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3.6, at its end
def test_replicas_without_samples(kit, two_replicas):
    # Only the last epoch has the batch of 1: Keras 3 itself trains to NaN on an empty shard. No
    # convolution: of no samples, TensorFlow 2.21 with oneDNN gives a wrong shape.
    model, taps, norms = build(kit, two_replicas, convolve=False)
    even = tf.data.Dataset.from_tensor_slices(images(16)).batch(8).repeat(EPOCHS - 1)
    ragged = tf.data.Dataset.from_tensor_slices(images(9, seed=1)).batch(8)
    recorder = kit.Recorder()
    model.fit(
        even.concatenate(ragged), steps_per_epoch=2, epochs=EPOCHS, verbose=0, shuffle=False,
        callbacks=[tap_last_epoch(kit, taps), recorder, kit.SWA(start_epoch=2)],
    )  # fmt: skip
    assert sorted(len(batch) for batch in taps[0].seen) == [0, 1, 4, 4]
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    assert_pooled(kit, taps, norms)
    kit.assert_replicas_agree(model)


@pytest.mark.either_keras
def test_without_replicas(kit):
    model, taps, norms = build(kit)
    recorder = kit.Recorder()
    x, y = images(30)
    model.fit(
        x, y, batch_size=8, epochs=EPOCHS, verbose=0,
        callbacks=[tap_last_epoch(kit, taps), recorder, kit.SWA(start_epoch=4)],
    )  # fmt: skip
    assert_weights(kit.trainable(model), recorder.mean(4))
    assert_pooled(kit, taps, norms)


def dense(kit, strategy=NO_STRATEGY, rate=0.1):
    with strategy.scope():
        model = kit.keras.Sequential(
            [
                kit.keras.layers.Input((3,)),
                kit.keras.layers.Dense(4, activation="tanh"),
                kit.keras.layers.Dense(1),
            ]
        )
        model.compile(kit.keras.optimizers.SGD(rate, momentum=0.9), "mse")
    return model


def samples(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)).astype("float32"), rng.normal(size=(n, 1)).astype("float32")


@pytest.mark.either_keras
def test_without_bn_the_last_epoch_trains_and_is_averaged(kit, two_replicas):
    model = dense(kit, two_replicas)
    recorder, swa = kit.Recorder(), kit.SWA(start_epoch=2, swa_freq=2)
    model.fit(*samples(24), batch_size=8, epochs=5, verbose=0, callbacks=[recorder, swa])
    assert swa.n_averaged == 2
    assert_weights(kit.trainable(model), recorder.mean(3, 5))
    assert any(
        (a != b).any() for a, b in zip(recorder.weights[3], recorder.weights[4], strict=True)
    )
    kit.assert_replicas_agree(model)


@pytest.mark.parametrize("schedule", ["constant", "cyclic"])
def test_each_batch_has_the_rate_of_the_papers_schedule(kit, schedule):
    model = dense(kit, rate=0.4)
    recorder = kit.Recorder()
    freq = 2 if schedule == "cyclic" else 1
    swa = kit.SWA(start_epoch=6, lr_schedule=schedule, swa_lr=0.1, swa_freq=freq)
    history = model.fit(
        *samples(24), batch_size=8, epochs=9, verbose=0, callbacks=[recorder, swa]
    ).history
    # t = 0, .2, .4 | .6, .8: a quarter and three quarters of the way from 0.4 to 0.1
    expected = [[0.4] * 3] * 3 + [[0.325] * 3, [0.175] * 3]
    if schedule == "constant":
        expected += [[0.1] * 3] * 4
    else:  # swa_lr2 = 0.1 + 0.25 * 0.3, c = 2 epochs of 3 batches
        cycle = [(1 - i / 6) * 0.175 + i / 6 * 0.1 for i in range(1, 7)]
        expected += [cycle[:3], cycle[3:]] * 2
    np.testing.assert_allclose(recorder.batch_rates, expected, rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate"], [e[-1] for e in expected], rtol=1e-6)


@pytest.mark.either_keras
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3, after epoch 1
def test_cyclic_learns_its_steps_where_fit_does_not_know_them(kit):
    model = dense(kit, rate=0.4)

    def batches():
        x, y = samples(24)
        for i in range(0, 24, 8):
            yield x[i : i + 8].copy(), y[i : i + 8].copy()

    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1))),
    )
    recorder = kit.Recorder()
    swa = kit.SWA(2, "cyclic", swa_lr=0.1, swa_lr2=0.3, swa_freq=2)
    model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[recorder, swa])
    cycle = [(1 - i / 6) * 0.3 + i / 6 * 0.1 for i in range(1, 7)]
    np.testing.assert_allclose(recorder.batch_rates[1] + recorder.batch_rates[2], cycle, rtol=1e-6)
    assert swa.inferred_batch_size == 8


@pytest.mark.either_keras
def test_history_has_zero_for_the_bn_pass_and_the_rate_is_restored(kit):
    model, *_ = build(kit)
    recorder = kit.Recorder()
    swa = kit.SWA(3, "constant", swa_lr=0.02)
    history = model.fit(
        *images(32), batch_size=16, epochs=4, verbose=0, callbacks=[recorder, swa]
    ).history
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.1, 0.02, 0.0], rtol=1e-6)
    # The pass ends itself, before any callback is told of its last batch.
    assert recorder.batch_rates[-1] == [0.0, pytest.approx(0.02)]
    assert kit.rate(model) == pytest.approx(0.02)


def test_the_lines_of_keras_swa_are_printed_verbatim(kit, capsys):
    model, *_ = build(kit)
    model.fit(*images(16), epochs=3, verbose=0, callbacks=[kit.SWA(2, verbose=1)])
    assert capsys.readouterr().out.split("\n\n") == [
        "\nModel uses batch normalization. SWA will require last epoch to be a forward pass and "
        "will run with no learning rate",
        "Epoch 00002: starting stochastic weight averaging",
        "Epoch 00003: final model weights set to stochastic weight average",
        "Epoch 00003: reinitializing batch normalization layers",
        "Epoch 00003: running forward pass to adjust batch normalization",
        "Epoch 00003: tracing the forward pass, which takes up to half as long as the first step "
        "did\n",
    ]
    model = dense(kit)
    model.fit(*samples(16), epochs=3, verbose=0, callbacks=[kit.SWA(2, verbose=1)])
    assert capsys.readouterr().out.split("\n\n") == [
        "\nEpoch 00002: starting stochastic weight averaging",
        "Epoch 00004: final model weights set to stochastic weight average\n",
    ]
    model.fit(*samples(16), epochs=3, verbose=0, callbacks=[kit.SWA(2)])
    assert capsys.readouterr().out == ""


@pytest.mark.either_keras
def test_weights_are_bitwise_what_training_without_the_callback_visits(kit, two_replicas):
    visited = []
    for callbacks in ([], [kit.SWA(start_epoch=2)]):
        kit.keras.utils.set_random_seed(3)
        model = dense(kit, two_replicas)
        recorder = kit.Recorder()
        model.fit(*samples(24), batch_size=8, epochs=3, verbose=0, callbacks=[recorder, *callbacks])
        visited.append([array for epoch in recorder.weights for array in epoch])
    assert_bitwise(*visited)
