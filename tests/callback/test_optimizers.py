"""Training steps with several optimizers, or with some of TensorFlow 1."""

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.assertions import assert_bitwise, assert_mean, assert_variance, assert_weights
from tests.helpers.callbacks import at
from tests.helpers.data import batched, data, positions
from tests.helpers.devices import NO_STRATEGY, on
from tests.helpers.kit import KITS
from tests.helpers.marks import tf_keras_only

pytestmark = pytest.mark.either_keras

FIRST, OTHER = 0.08, 0.02


def two_nets(kit, strategy=NO_STRATEGY, place=None, norm=True, use=("first", "other")):
    """A model with a `compile` of its own, whose step trains two networks, each with an optimizer.

    `compile` of its class leaves an optimizer behind that the step does not use.

    Args:
        place: Puts the optimizers where the step gets them from; returns what gives them.
        use: The optimizers that the step uses.
    """
    layers, keras = kit.keras.layers, kit.keras

    class Nets(keras.Model):
        def __init__(self):
            super().__init__()
            norms = [layers.BatchNormalization()] * norm
            self.nets = {
                "first": keras.Sequential([layers.Input((3,)), *norms, layers.Dense(4)]),
                "other": keras.Sequential([layers.Input((4,)), layers.Dense(1)]),
            }
            self.built = True

        def compile(self, first, other):
            super().compile(jit_compile=False)
            self.get = (place or as_attributes)(self, first, other)

        def call(self, inputs, training=None):
            return self.nets["other"](self.nets["first"](inputs, training=training))

        def train_step(self, fed):
            x, y = fed
            weights = {name: self.nets[name].trainable_variables for name in use}
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            for name in use:
                gradients = tape.gradient(loss, weights[name])
                if kit.keras is not KITS[0].keras:
                    gradients = list(gradients)
                self.get(name).apply_gradients(zip(gradients, weights[name], strict=True))
            return {"loss": loss}

        def test_step(self, fed):
            x, y = fed
            return {"loss": tf.reduce_mean(tf.square(self(x) - y))}

    with strategy.scope():
        model = Nets()
        model.compile(keras.optimizers.SGD(FIRST), keras.optimizers.SGD(OTHER, momentum=0.5))
        model(np.zeros((2, 3), "float32"))
    return model


def as_attributes(model, first, other):
    model.first, model.other = first, other
    return lambda name: getattr(model, name)


def in_a_list(model, first, other):
    model.all_of_them = [first, other]
    return lambda name: model.all_of_them[name == "other"]


def in_a_dict(model, first, other):
    model.by_name = {"first": first, "other": other}
    return lambda name: model.by_name[name]


def of_the_networks(model, first, other):
    model.nets["first"].compile(first)
    model.nets["other"].compile(other)
    return lambda name: model.nets[name].optimizer


def hidden(model, first, other):
    return lambda name: {"first": first, "other": other}[name]


def rate(optimizer):
    return float(tf.convert_to_tensor(optimizer.learning_rate).numpy())


def fit(kit, model, swa, epochs=9, **arguments):
    """Fit; return the rates that each optimizer had in each epoch, and the history."""
    used = {"first": [], "other": []}

    class See(kit.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                for name, rates in used.items():
                    rates.append(rate(model.get(name)))

    history = model.fit(
        batched(*data()), epochs=epochs, verbose=0, shuffle=False,
        callbacks=[See(), swa, *arguments.pop("after", ())], **arguments,
    ).history  # fmt: skip
    return used, history


@pytest.mark.parametrize(
    ("place", "schedule"),
    [
        *((place, "constant") for place in (as_attributes, in_a_list, in_a_dict, of_the_networks)),
        (as_attributes, "cyclic"),
    ],
)
def test_each_optimizer_follows_the_plan_from_its_own_rate(kit, place, schedule):
    model = two_nets(kit, place=place)
    default = rate(model.optimizer)
    swa = kit.SWA(6, schedule, swa_freq=1 + (schedule == "cyclic"))
    used, history = fit(kit, model, swa)
    for name, initial in (("first", FIRST), ("other", OTHER)):
        plan = swa.plan(9, 3, learning_rate=initial)
        planned = [plan.learning_rate(epoch) for epoch in range(9)]
        assert used[name] == pytest.approx(planned)
        ends = [plan.learning_rate(epoch, 2) for epoch in range(9)]
        shown = [key for key in history if history[key] == pytest.approx(ends)]
        assert shown, f"{name} is not shown: {history}"
        assert rate(model.get(name)) == pytest.approx(ends[-2])
    assert rate(model.optimizer) == pytest.approx(default)  # which nothing has used
    assert history["learning_rate"] in [v for k, v in history.items() if k != "learning_rate"]


@pytest.mark.parametrize("replicas", [0, 2])
def test_no_optimizer_updates_anything_in_the_bn_pass(kit, replicas):
    model = two_nets(kit, on(replicas))
    states, weights = [], []

    def state():
        return [a for n in ("first", "other") for a in kit.optimizer_state(model.get(n))]

    keep = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (
            states.append(state()), weights.append(kit.trainable(model))
        )
    )  # fmt: skip
    model.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[keep, kit.SWA(2)])
    assert_bitwise(state(), states[2])
    mean = [np.mean(np.array(w, np.float64), 0) for w in zip(*weights[1:3], strict=True)]
    assert_weights(kit.trainable(model), mean)
    seen, norm = positions(data()[0]), model.nets["first"].layers[0]
    assert_mean(kit.statistics(norm)[0], seen.mean(0), seen.std(0))
    assert_variance(kit.statistics(norm)[1], seen.var(0))


def test_one_optimizer_that_is_used_beside_one_that_is_not_is_the_one_that_is_shown(kit):
    model = two_nets(kit, use=["other"])
    swa = kit.SWA(6, "constant")
    used, history = fit(kit, model, swa)
    assert history["learning_rate"][:-1] == pytest.approx(used["other"][:-1])
    assert history["learning_rate"][-1] == 0
    assert [key for key in history if "learning_rate" in key] == ["learning_rate"]
    assert rate(model.get("first")) == pytest.approx(FIRST)  # as it was


def test_manual_leaves_all_rates_alone_and_shows_those_in_use(kit):
    used, history = fit(kit, two_nets(kit), kit.SWA(2), epochs=4)
    assert used["first"] == pytest.approx([FIRST] * 3 + [0])
    assert used["other"] == pytest.approx([OTHER] * 3 + [0])
    for initial in (FIRST, OTHER):
        assert any(values == pytest.approx([initial] * 3 + [0]) for values in history.values())


def test_one_whose_rate_cannot_be_set_is_refused_by_name_before_the_first_batch(kit):
    model = two_nets(kit)
    decay = kit.keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model.other = kit.keras.optimizers.SGD(decay)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"cannot|can be set.*the model's `other`"):
        model.fit(
            batched(*data()), epochs=9, verbose=0, shuffle=False, callbacks=[kit.SWA(6, "constant")]
        )
    assert_bitwise(model.get_weights(), before)
    model.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[kit.SWA(2)])


def test_an_unused_one_need_not_suit_the_schedule(kit):
    """The default has a rate of 0.001, from which a cycle down to 0.01 would rise."""
    model, swa = two_nets(kit), kit.SWA(6, "cyclic", swa_lr=0.01, swa_freq=2)
    default = rate(model.optimizer)
    assert default < 0.01
    used, history = fit(kit, model, swa)
    for name, initial in (("first", FIRST), ("other", OTHER)):
        plan = swa.plan(9, 3, learning_rate=initial)
        assert used[name] == pytest.approx([plan.learning_rate(epoch) for epoch in range(9)])
    assert rate(model.optimizer) == pytest.approx(default)
    assert len([key for key in history if "learning_rate" in key]) == 3


def test_one_that_turns_out_to_be_used_is_refused_by_name_after_the_first_step(kit):
    model = two_nets(kit)
    with pytest.raises(ValueError, match=r"`swa_lr2` must be at least.*the model's `other`"):
        fit(kit, model, kit.SWA(6, "cyclic", swa_lr=0.05, swa_freq=2))
    assert kit.updates(model.get("first")) == 1


def test_one_optimizer_that_does_not_suit_the_schedule_is_refused_before_the_first_batch(kit):
    model = bn_then_dense(kit, NO_STRATEGY, kit.keras.optimizers.SGD)
    with pytest.raises(ValueError, match="`swa_lr2` must be at least"):
        model.fit(
            batched(*data()), epochs=9, verbose=0, shuffle=False,
            callbacks=[kit.SWA(6, "cyclic", swa_lr=0.05, swa_freq=2)],
        )  # fmt: skip
    assert kit.updates(model.optimizer) == 0


@pytest.mark.parametrize("teachers_rate", ["schedule", "zero"])
def test_the_optimizer_of_a_frozen_teacher_is_left_alone(kit, teachers_rate):
    decay = kit.keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    teachers = kit.keras.optimizers.SGD(decay if teachers_rate == "schedule" else 0.0)
    model = two_nets(kit, place=of_the_networks, use=["other"])
    model.nets["first"].trainable = False
    model.compile(teachers, kit.keras.optimizers.SGD(OTHER))
    swa = kit.SWA(6, "constant")
    plan = swa.plan(9, learning_rate=OTHER, batch_norm=False)
    used, history = fit(kit, model, swa)
    planned = pytest.approx([plan.learning_rate(epoch) for epoch in range(9)])
    assert used["other"] == planned
    assert history["learning_rate"] == planned
    assert rate(teachers) == pytest.approx(0.1 if teachers_rate == "schedule" else 0)


def test_one_that_is_first_used_in_a_later_epoch_is_shown_from_then_on(kit):
    use = ["first"]
    model = two_nets(kit, use=use)
    model.run_eagerly = True
    later = at(kit, 3, lambda model: use.append("other"), "on_epoch_begin")
    swa = kit.SWA(6, "constant")
    _, history = fit(kit, model, swa, after=[later])
    for key, initial, epochs in (
        ("learning_rate", FIRST, range(9)),
        ("learning_rate_first", FIRST, range(2, 9)),
        ("learning_rate_other", OTHER, range(2, 9)),
    ):
        plan = swa.plan(9, learning_rate=initial)
        assert history[key] == pytest.approx([plan.learning_rate(epoch) for epoch in epochs])


def test_a_run_that_is_resumed_knows_the_initial_rate_of_each(kit, tmp_path):
    class Interrupt(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 6:
                raise KeyboardInterrupt

    def make():
        return kit.SWA(8, "constant", backup_dir=tmp_path / "swa")

    model = two_nets(kit)
    with pytest.raises(KeyboardInterrupt):
        fit(kit, model, make(), after=[Interrupt()])
    assert rate(model.first) < FIRST
    used, _ = fit(kit, model, make(), initial_epoch=6)
    for name, initial in (("first", FIRST), ("other", OTHER)):
        plan = make().plan(9, 3, learning_rate=initial)
        assert used[name] == pytest.approx([plan.learning_rate(epoch) for epoch in range(6, 9)])


def test_trained_weights_are_saved_in_each_epoch_even_if_no_updates_are_counted(kit, tmp_path):
    """The model's own optimizer is idle, and saved with the model would be the average."""

    class StopError(Exception):
        pass

    def end(model):
        raise StopError

    def begin_epoch_6(model, **arguments):
        begun = []
        see = at(kit, 6, lambda model: begun.append(model.get_weights()), "on_train_batch_begin")
        swa = kit.SWA(
            3, swa_freq=2, validate_average=True, backup_dir=arguments.pop("folder", None)
        )
        model.fit(
            batched(*data()), validation_data=batched(*data(16, seed=3)), epochs=9, verbose=0,
            shuffle=False, callbacks=[swa, see, *arguments.pop("after", ())], **arguments,
        )  # fmt: skip
        return begun[0]

    def make():
        kit.keras.utils.set_random_seed(7)
        model = two_nets(kit)
        model.compile(kit.keras.optimizers.SGD(FIRST), kit.keras.optimizers.SGD(OTHER))
        return model

    interrupted = make()
    with pytest.raises(StopError):  # between the snapshots of epochs 4 and 6
        begin_epoch_6(interrupted, folder=tmp_path, after=[at(kit, 5, end)])
    resumed = make()
    resumed.set_weights(interrupted.get_weights())
    weights = begin_epoch_6(resumed, folder=tmp_path, initial_epoch=5)
    assert_bitwise(weights, begin_epoch_6(make()))


def test_optimizers_that_cannot_be_found_are_noticed_in_the_bn_pass(kit):
    model = two_nets(kit, place=hidden)
    with pytest.warns(UserWarning, match=r"changes weights by other means.*update_bn"):
        model.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[kit.SWA(2)])


TENSORFLOW_1 = [
    tf.compat.v1.train.AdamOptimizer,
    tf.compat.v1.train.GradientDescentOptimizer,
    lambda rate: tf.compat.v1.train.MomentumOptimizer(rate, 0.9),
]


def bn_then_dense(kit, strategy, optimizer):
    layers = kit.keras.layers
    with strategy.scope():
        model = kit.keras.Sequential(
            [layers.Input((3,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)]
        )
        model.compile(optimizer(0.01), "mse", jit_compile=False)
    return model


@tf_keras_only
@pytest.mark.parametrize(("optimizer", "replicas"), [*zip(TENSORFLOW_1, [2, 0, 0], strict=True)])
def test_optimizers_of_tensorflow_1_update_nothing_in_the_bn_pass(kit, optimizer, replicas):
    strategy = on(replicas)
    model, recorded = bn_then_dense(kit, strategy, optimizer), []
    keep = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: recorded.append(kit.trainable(model))
    )
    history = model.fit(
        batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[keep, kit.SWA(2)]
    ).history
    mean = [np.mean(np.array(w, np.float64), 0) for w in zip(*recorded[1:3], strict=True)]
    assert_weights(kit.trainable(model), mean)
    kernel, bias = (kit.array(v).astype(np.float64) for v in model.layers[0].weights)
    hidden = data()[0].astype(np.float64) @ kernel + bias
    mean, variance = kit.statistics(model.layers[1])
    np.testing.assert_allclose(mean, hidden.mean(0), rtol=0, atol=1e-6 * np.abs(hidden).max())
    np.testing.assert_allclose(variance, hidden.var(0), rtol=1e-5)
    assert "learning_rate" not in history  # they have no public one
    before = kit.trainable(model)
    model.fit(batched(*data()), verbose=0, shuffle=False)
    assert any((a != b).any() for a, b in zip(before, kit.trainable(model), strict=True))


@tf_keras_only
def test_optimizers_of_tensorflow_1_cannot_follow_a_schedule(kit):
    model = bn_then_dense(kit, NO_STRATEGY, TENSORFLOW_1[0])
    with pytest.raises(ValueError, match="not a number that can be set"):
        model.fit(
            batched(*data()), epochs=9, verbose=0, shuffle=False, callbacks=[kit.SWA(6, "constant")]
        )


@tf_keras_only
def test_one_of_tensorflow_1_in_a_custom_training_step_updates_nothing(kit):
    model = two_nets(kit)
    model.other = tf.compat.v1.train.GradientDescentOptimizer(OTHER)
    weights = []
    keep = kit.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(kit.trainable(model))
    )
    model.fit(batched(*data()), epochs=4, verbose=0, shuffle=False, callbacks=[keep, kit.SWA(2)])
    mean = [np.mean(np.array(w, np.float64), 0) for w in zip(*weights[1:3], strict=True)]
    assert_weights(kit.trainable(model), mean)
    assert_mean(kit.statistics(model.nets["first"].layers[0])[0], positions(data()[0]).mean(0), 1)
