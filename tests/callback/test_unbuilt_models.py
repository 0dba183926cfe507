"""Models that `fit` builds in its first step are averaged like others."""

import numpy as np
import pytest

from tests.helpers import data as samples
from tests.helpers.assertions import (
    assert_bitwise,
    assert_mean,
    assert_statistics,
    assert_weights,
)
from tests.helpers.data import batched, positions
from tests.helpers.devices import NO_STRATEGY, on

pytestmark = pytest.mark.either_keras


def data():
    x, y = samples.data()
    return (x - x.mean(0)) / x.std(0) + 1, y  # without BN, large ones would diverge


def sequential(kit, norm=True):
    layers = kit.keras.layers
    return kit.keras.Sequential(
        [*[layers.BatchNormalization()] * norm, layers.Dense(4, activation="tanh"), layers.Dense(1)]
    )


def subclassed(kit, norm=True):
    layers = kit.keras.layers

    class Model(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization() if norm else None
            self.dense = layers.Dense(1)

        def call(self, inputs, training=None):
            return self.dense(self.norm(inputs, training=training) if norm else inputs)

    return Model()


def built_late(kit, norm=True):
    """A model with weights, of which some layers are built only when it is trained."""
    layers = kit.keras.layers

    class Model(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.head = kit.keras.Sequential([layers.Input((3,)), layers.Dense(1)])
            self.norm = layers.BatchNormalization() if norm else None
            self.scale = layers.Dense(3)

        def call(self, inputs, training=None):
            x = self.norm(inputs, training=training) if norm else inputs
            return self.head(self.scale(x))

    return Model()


def declared_built(kit, norm=True):
    """A model that says it is built, as some must for their summary, before it has weights."""
    model = subclassed(kit, norm)
    model.built = True
    return model


BUILDERS = [sequential, subclassed, built_late, declared_built]


def compiled(kit, build, strategy=NO_STRATEGY, **arguments):
    kit.keras.utils.set_random_seed(7)
    with strategy.scope():
        model = build(kit, **arguments)
        model.compile(kit.keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
    return model


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "no_bn"])
@pytest.mark.parametrize(("build", "replicas"), [*zip(BUILDERS, [2, 0, 0, 0], strict=True)])
def test_it_is_averaged_from_the_first_epoch_on(kit, build, norm, replicas):
    strategy = on(replicas)
    model, recorder = compiled(kit, build, strategy, norm=norm), kit.Recorder()
    swa = kit.SWA(1, "constant", 0.05, verbose=1)
    history = model.fit(
        batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[recorder, swa]
    ).history
    averaged = (1, 2, 3) if norm else (1, 2, 3, 4)
    assert swa.n_averaged == len(averaged)
    assert_weights(kit.trainable(model), recorder.mean(*averaged))
    kit.assert_replicas_agree(model)
    assert history["learning_rate"][-1] == (0 if norm else pytest.approx(0.05))
    if norm:
        seen = positions(data()[0])
        layer = next(layer for layer in model.layers if hasattr(layer, "moving_mean"))
        assert_statistics(kit, layer, seen)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_run_without_room_for_a_snapshot_is_refused_before_the_first_batch(kit, build):
    model, swa = compiled(kit, build), kit.SWA(3)
    with pytest.raises(ValueError, match=r"leave room for at least one snapshot.*recomputes"):
        model.fit(batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[swa])
    assert int(np.array(model.optimizer.iterations)) == 0


def test_layers_that_are_hidden_until_the_first_step_are_found_right_after_it(kit):
    layers = kit.keras.layers

    class Hidden(kit.keras.layers.Layer):
        def build(self, input_shape):
            self.norm = layers.BatchNormalization()
            self.norm.build(input_shape)

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    def build(kit):
        return kit.keras.Sequential([Hidden(), layers.Dense(1)])

    model, ends = compiled(kit, build), []
    count = kit.keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(epoch))
    with pytest.raises(ValueError, match="leave room for at least one snapshot"):
        model.fit(
            batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[count, kit.SWA(3)]
        )
    assert not ends

    model, recorder = compiled(kit, build), kit.Recorder()
    model.fit(
        batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[recorder, kit.SWA(1)]
    )
    assert_weights(kit.trainable(model), recorder.mean(1, 2))
    mean, _ = kit.statistics(model.layers[0].norm)
    assert_mean(mean, positions(data()[0]).mean(0), positions(data()[0]).std(0))


@pytest.mark.filterwarnings(r"ignore:`build\(\)` was called")  # Keras 3's own, of the unused layer
def test_a_batch_norm_layer_that_is_never_called_costs_no_epoch(kit):
    class Model(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.unused = kit.keras.layers.BatchNormalization()
            self.dense = kit.keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    model, recorder = compiled(kit, lambda kit: Model()), kit.Recorder()
    swa = kit.SWA(1)
    model.fit(batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[recorder, swa])
    assert swa.n_averaged == 3
    assert_weights(kit.trainable(model), recorder.mean(1, 2, 3))


def test_batch_norm_that_begins_to_train_too_late_is_averaged_with_a_warning(kit):
    model = compiled(kit, sequential)
    model.build((None, 3))
    norm = model.layers[0]
    norm.trainable = False
    model.compile("sgd", "mse", jit_compile=False)

    class Unfreeze(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                norm.trainable = True

    recorder, swa = kit.Recorder(), kit.SWA(4)
    with pytest.warns(UserWarning, match=r"no epoch was left.*update_bn"):
        model.fit(
            batched(*data()),
            epochs=4,
            verbose=0,
            shuffle=False,
            callbacks=[Unfreeze(), recorder, swa],
        )
    assert swa.n_averaged == 1
    assert_bitwise(kit.trainable(model), recorder.weights[-1])


def test_a_model_without_trainable_weights_is_refused(kit):
    model = compiled(kit, sequential)
    model.build((None, 3))
    model.trainable = False
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match="must be built and have trainable weights"):
        model.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[kit.SWA(2)])


def test_with_a_backup_it_must_be_built_before(kit, tmp_path):
    """To resume takes the weights before the first step, for BackupAndRestore, too."""
    swa = kit.SWA(2, backup_dir=tmp_path / "swa")
    with pytest.raises(ValueError, match="must be built and have trainable weights"):
        compiled(kit, sequential).fit(
            batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[swa]
        )
    assert not (tmp_path / "swa").exists()


def test_what_is_printed_is_what_is_printed_of_a_built_model(kit, capsys):
    printed = []
    for build_first in (True, False):
        model = compiled(kit, sequential)
        if build_first:
            model.build((None, 3))
        model.fit(
            batched(*data()), epochs=3, verbose=0, shuffle=False, callbacks=[kit.SWA(2, verbose=1)]
        )
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
