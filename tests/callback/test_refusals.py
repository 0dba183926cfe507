"""What cannot be averaged is refused before the first batch, and nothing has changed."""

from fractions import Fraction

import numpy as np
import pytest

from tests.helpers.assertions import assert_bitwise, assert_undisturbed
from tests.helpers.data import data
from tests.helpers.devices import NO_STRATEGY
from tests.helpers.fits import fit
from tests.helpers.kit import KITS
from tests.helpers.models import build

EPOCHS, RATE = 4, 0.1

# Nothing is trained in most of the rows: they do without the fixture's clean slate, and its price.
both = pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)

KERAS_3, TF_KERAS = KITS


def test_numpy_scalars_and_fractions_mean_what_they_say(kit):
    swa = kit.SWA(
        np.float32(0.5), np.str_("cyclic"), Fraction(1, 50), np.float64(0.08), np.int64(2),
        np.int64(4), np.int64(0),
    )  # fmt: skip
    recorder = kit.Recorder()
    attempt(kit, dense(kit), [recorder, swa], batch_size=4)
    assert swa.n_averaged == 1
    # Two steps an epoch: a cycle of four from 0.08 down to 0.02.
    assert recorder.batch_rates[2:] == [
        pytest.approx([0.065, 0.05], rel=1e-6),
        pytest.approx([0.035, 0.02], rel=1e-6),
    ]


def dense(kit, *between, optimizer=None):
    layers = kit.keras.layers
    model = kit.keras.Sequential([layers.Input((3,)), *between, layers.Dense(1)])
    return compiled(kit, model, optimizer)


def compiled(kit, model, optimizer=None):
    model.compile(optimizer or kit.keras.optimizers.SGD(RATE, momentum=0.9), "mse")
    return model


def with_bn(kit):
    return dense(kit, kit.keras.layers.BatchNormalization())


def scheduled(kit):
    return dense(kit, optimizer=kit.keras.optimizers.SGD(decay(kit)))


def decay(kit):
    return kit.keras.optimizers.schedules.ExponentialDecay(RATE, 10, 0.9)


def frozen(kit):
    model = dense(kit)
    model.trainable = False
    return compiled(kit, model)


def without_weights(kit):
    layers = kit.keras.layers
    return compiled(kit, kit.keras.Sequential([layers.Input((3,)), layers.Activation("relu")]))


def unbuilt_subclass(kit):
    class Subclass(kit.keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = kit.keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    return compiled(kit, Subclass())


NO_SNAPSHOT = "`start_epoch` and `swa_freq` must leave room for at least one snapshot"

NOT_SETTABLE = "`lr_schedule` must be 'manual' for an optimizer whose"

TWO_EPOCHS_UP_TO_3 = {"start_epoch": 2, "swa_freq": 2}

CYCLIC = {"start_epoch": 2, "lr_schedule": "cyclic", "swa_freq": 2}


@both
@pytest.mark.parametrize(
    ("build", "arguments", "fit_arguments", "words"),
    [
        pytest.param(*row, id=name)
        for name, row in {
            "start_epoch beyond epochs": (
                dense, {"start_epoch": 5}, {},
                [NO_SNAPSHOT, "start_epoch=5", "epoch 4"],
            ),
            "start_epoch far beyond epochs": (
                dense, {"start_epoch": 10**6}, {},
                [NO_SNAPSHOT, "start_epoch=1000000", "epoch 4"],
            ),
            "a fraction that is over at the end": (
                dense, {"start_epoch": 0.9}, {},
                [NO_SNAPSHOT, "start_epoch=0.9", "epoch 5", "epoch 4"],
            ),
            "start_epoch in the BN pass": (
                with_bn, {"start_epoch": 4}, {},
                [NO_SNAPSHOT, "start_epoch=4", "epoch 4", "batch normalization"],
            ),
            "swa_freq beyond epochs": (
                dense, {"start_epoch": 3, "swa_freq": 3}, {},
                [NO_SNAPSHOT, "swa_freq=3", "epoch 5", "epoch 4"],
            ),
            "the only snapshot is behind the first epoch": (
                dense, TWO_EPOCHS_UP_TO_3, {"initial_epoch": 3},
                [NO_SNAPSHOT, "start_epoch=2", "swa_freq=2", "epoch 4"],
            ),
            "constant, the optimizer has a schedule": (
                scheduled, {"start_epoch": 2, "lr_schedule": "constant"}, {},
                [NOT_SETTABLE, "LearningRateSchedule", "lr_schedule='constant'"],
            ),
            "cyclic, the optimizer has a schedule": (
                scheduled, CYCLIC, {},
                [NOT_SETTABLE, "LearningRateSchedule", "lr_schedule='cyclic'"],
            ),
            "swa_lr2 below the automatic swa_lr": (
                dense, {**CYCLIC, "swa_lr2": 0.005}, {},
                ["`swa_lr2` must be at least `swa_lr`", "swa_lr2=0.005", "swa_lr=0.01"],
            ),
            "the automatic swa_lr2 below swa_lr": (
                dense, {**CYCLIC, "swa_lr": 0.5}, {},
                ["`swa_lr2` must be at least `swa_lr`", "swa_lr2=0.4", "swa_lr=0.5"],
            ),
            "no trainable weights": (
                frozen, {"start_epoch": 2}, {},
                ["`model` must", "trainable weights", "with none"],
            ),
            "no weights": (
                without_weights, {"start_epoch": 2}, {},
                ["`model` must", "trainable weights", "with none"],
            ),
        }.items()
    ],
)  # fmt: skip
def test_what_a_model_or_a_run_does_not_allow_is_refused(
    kit, build, arguments, fit_arguments, words
):
    model, swa = build(kit), kit.SWA(**arguments)
    message = refusal(kit, model, swa, ValueError, **fit_arguments)
    for word in [*words, "Received: "]:
        assert word in message


@both
def test_a_run_without_an_epoch_warns_and_leaves_the_model_alone(kit):
    model, swa = dense(kit), kit.SWA(2)
    before = state(kit, model)
    with pytest.warns(UserWarning, match="before its first epoch, .* at the end of epoch 2"):
        attempt(kit, model, [swa], initial_epoch=EPOCHS)
    assert_bitwise(state(kit, model), before)


@pytest.mark.parametrize("arguments", [{"start_epoch": 2, "lr_schedule": "constant"}, CYCLIC])
def test_a_legacy_optimizer_with_a_schedule_is_refused(arguments):
    model = dense(TF_KERAS, optimizer=TF_KERAS.keras.optimizers.legacy.SGD(decay(TF_KERAS)))
    message = refusal(TF_KERAS, model, TF_KERAS.SWA(**arguments), ValueError)
    for word in (NOT_SETTABLE, "Received: lr_schedule="):
        assert word in message


def test_a_rate_that_keras_3_can_only_read_is_refused():
    model = dense(KERAS_3, optimizer=KERAS_3.keras.optimizers.SGD(lambda: RATE))
    message = refusal(KERAS_3, model, KERAS_3.SWA(2, "constant"), ValueError)
    for word in (NOT_SETTABLE, "Received: lr_schedule='constant'"):
        assert word in message


@pytest.mark.parametrize(
    ("kit", "optimizer"),
    [(KERAS_3, KERAS_3.keras.optimizers), (TF_KERAS, TF_KERAS.keras.optimizers.legacy)],
    ids=["keras3", "tf_keras legacy"],
)
def test_a_rate_that_is_a_function_stays_one(kit, optimizer):
    rate = [RATE]
    model = dense(kit, optimizer=optimizer.SGD(lambda: rate[0]))
    refusal(kit, model, kit.SWA(5), ValueError)
    rate[0] = 0.5
    assert kit.rate(model) == 0.5


@both
def test_an_uncompiled_model_is_refused(kit):
    layers = kit.keras.layers
    model = kit.keras.Sequential([layers.Input((3,)), layers.Dense(1)])
    fed, before = counter(kit), kit.trainable(model)
    with pytest.raises((ValueError, RuntimeError), match=r"^You must .*compile"):
        attempt(kit, model, [fed, kit.SWA(2)])
    assert fed.batches == 0
    assert_bitwise(kit.trainable(model), before)


@pytest.mark.parametrize(
    ("kit", "other", "remedy"),
    [
        (KERAS_3, TF_KERAS, "from swa_dist.keras import SWA"),
        (TF_KERAS, KERAS_3, "from swa_dist.tfkeras import SWA"),
    ],
    ids=["a model of Keras 3", "a model of tf_keras"],
)
@pytest.mark.parametrize("build", [dense, unbuilt_subclass])
def test_a_model_of_the_other_keras_is_refused(kit, other, remedy, build):
    model = build(kit)
    message = refusal(kit, model, other.SWA(2), TypeError)
    for word in (f"`{remedy}`", f"`{other.keras.__name__}`", f"Received: {type(model).__module__}"):
        assert word in message


def test_after_a_refusal_the_model_and_the_instance_serve_as_if_nothing_had_been(kit):
    visited = []
    for refused in (True, False):
        kit.keras.utils.set_random_seed(3)
        model, swa, recorder = dense(kit), kit.SWA(5), kit.Recorder()
        if refused:
            refusal(kit, model, swa, ValueError, epochs=4)
            refusal(kit, model, kit.SWA(**CYCLIC, swa_lr=0.5), ValueError)
        attempt(kit, model, [recorder, swa], epochs=6)
        assert swa.n_averaged == 2
        visited.append([array for epoch in recorder.weights for array in epoch])
        visited[-1] += [*kit.trainable(model), *recorder.rates]
    assert_bitwise(*visited)


def attempt(kit, model, callbacks, **arguments):
    x, y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")
    arguments = {"epochs": EPOCHS, "shuffle": False, **arguments}
    return model.fit(x, y, verbose=0, callbacks=callbacks, **arguments)


def refusal(kit, model, swa, error, **fit_arguments):
    """The message with which `fit` is refused before its first batch, the model left as it is."""
    model.make_train_function()  # as `fit` does first: what is there then has to stay
    function, before = model.train_function, state(kit, model)
    fed = counter(kit)
    with pytest.raises(error) as raised:
        attempt(kit, model, [fed, swa], **fit_arguments)
    assert fed.batches == 0
    assert model.train_function is function
    assert_bitwise(state(kit, model), before)
    return str(raised.value)


def state(kit, model):
    weights = model.weights if model.built else []
    rate = model.optimizer.learning_rate
    if isinstance(rate, kit.keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(model.optimizer.iterations)
    return [*(kit.array(v) for v in weights), *kit.optimizer_state(model.optimizer), rate]


def counter(kit):
    class Counter(kit.keras.callbacks.Callback):
        batches = 0

        def on_train_batch_begin(self, batch, logs=None):
            self.batches += 1

    return Counter()


def test_two_in_one_fit_are_refused(kit):
    model = build(kit)
    before = model.get_weights()
    twice = kit.SWA(2)
    for pair in ([kit.SWA(2), kit.SWA(3)], [twice, twice]):
        with pytest.raises(ValueError, match="`callbacks` must have one SWA"):
            model.fit(*data(), epochs=4, verbose=0, callbacks=pair)
        assert_bitwise(model.get_weights(), before)
    fit(kit, model, epochs=4)  # what was refused is forgotten


def test_a_model_from_outside_the_scope_is_refused(kit, two_replicas):
    model = build(kit, NO_STRATEGY)
    with two_replicas.scope(), pytest.raises((ValueError, RuntimeError)) as error:
        fit(kit, model, epochs=4)
    assert "scope" in str(error.value)


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


def test_a_rate_of_zero_is_no_start_for_a_schedule(kit):
    model = build(kit)
    model.optimizer.learning_rate = 0.0
    with pytest.raises(ValueError, match="whose learning rate is 0"):
        model.fit(*data(), epochs=4, verbose=0, callbacks=[kit.SWA(2, "constant")])
