"""Arguments, models and runs that SWA cannot serve are refused before the first batch."""

import copy
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.plan.options import Options
from tests.kits import KITS
from tests.tolerances import assert_bitwise

EPOCHS = 4
RATE = 0.1

# Nothing is trained in most of the rows: they do without the fixture's clean slate, and its price.
both = pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
KERAS_3, TF_KERAS = KITS

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["3", "", b"3", [3], (3,), {3}, {}, 3 + 0j, Decimal("0.5"), object, len]
NO_NUMBERS += [True, False, np.bool_(True), np.array(3), np.array([0.5]), np.str_("3")]
NOT_FINITE = [NAN, INF, -INF, np.float32("nan"), np.float64("inf"), np.float16("-inf")]
NOT_POSITIVE = [0, -1, np.int64(0), np.int8(-3), 0.0, -0.0, -0.5, np.float32(0), Fraction(-1, 2)]
NO_INTEGERS = [1.0, 2.5, np.float64(2.0), Fraction(3, 2), 1e9]
NO_RATES = [*NO_NUMBERS, None, *NOT_FINITE, *NOT_POSITIVE, "Auto", "0.1", b"auto"]
NO_RATES += [np.array("auto"), np.array([0.1, 0.2]), 10**400]  # the last is beyond a float
NO_NAMES = [None, "Manual", "CYCLIC", "constant ", "", "auto", b"manual", 0, True, NAN, str]
NO_NAMES += [["manual"], ("cyclic",), {"manual"}, np.array("manual"), np.array(["cyclic", "auto"])]

RULES = {
    "start_epoch": "an integer >= 1 (epochs count from 1), or a float between 0 and 1",
    "lr_schedule": "one of 'manual', 'constant', 'cyclic'",
    "swa_lr": "a finite number > 0, or 'auto'",
    "swa_lr2": "a finite number > 0, or 'auto'",
    "swa_freq": "an integer >= 1",
    "batch_size": "None or an integer >= 1",
    "verbose": "0 or 1",
    "backup_dir": "None or the path of a folder",
}
WRONG = {
    "start_epoch": [None, "auto", *NO_NUMBERS, *NOT_FINITE, *NOT_POSITIVE, *NO_INTEGERS],
    "lr_schedule": NO_NAMES,
    "swa_lr": NO_RATES,
    "swa_lr2": NO_RATES,
    "swa_freq": [None, "auto", 0.5, *NO_NUMBERS, *NOT_FINITE, *NOT_POSITIVE, *NO_INTEGERS],
    "batch_size": ["auto", 0.5, *NO_NUMBERS, *NOT_FINITE, *NOT_POSITIVE, *NO_INTEGERS],
    "verbose": [
        *[None, "auto", -1, 2, np.int64(2), 0.0, *NOT_FINITE, *NO_INTEGERS],
        *(value for value in NO_NUMBERS if type(value) is not bool),
    ],
    "backup_dir": ["", b"folder", 0, 1.5, True, ["folder"], open],
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param(argument, value, id=f"{argument}={value!r:.40}")
        for argument, values in WRONG.items()
        for value in values
    ],
)
def test_an_option_of_the_wrong_type_or_out_of_range_is_refused(argument, value):
    # Valid but for this one value, which is to be refused for itself.
    arguments = {"start_epoch": 2, "lr_schedule": "cyclic", "swa_freq": 2, argument: value}
    with pytest.raises(ValueError, match=f"^`{argument}` must be ") as error:
        Options(**arguments)
    assert RULES[argument] in str(error.value)
    assert f"Received: {argument}={value!r}." in str(error.value)


def test_a_tensor_is_not_taken_for_a_number():
    for argument in set(RULES) - {"lr_schedule"}:
        arguments = {"start_epoch": 2, "lr_schedule": "cyclic", "swa_freq": 2}
        for value in (tf.constant(3), tf.constant(0.5), tf.Variable(0.5)):
            with pytest.raises(ValueError, match=f"^`{argument}` must be .* Received: {argument}="):
                Options(**{**arguments, argument: value})


@pytest.mark.parametrize(
    ("arguments", "argument", "rule", "received"),
    [
        (
            {"lr_schedule": "cyclic"},
            "swa_freq", "an integer >= 2 with lr_schedule='cyclic'", "swa_freq=1",
        ),
        (
            {"lr_schedule": "cyclic", "swa_freq": np.int64(1)},
            "swa_freq", "an integer >= 2 with lr_schedule='cyclic'", f"swa_freq={np.int64(1)!r}",
        ),
        (
            {"lr_schedule": "cyclic", "swa_freq": 2, "swa_lr": 0.1, "swa_lr2": 0.05},
            "swa_lr2", "at least `swa_lr`", "swa_lr2=0.05, swa_lr=0.1",
        ),
        (
            {"lr_schedule": "cyclic", "swa_freq": 2, "swa_lr": 0.1000001, "swa_lr2": 0.1},
            "swa_lr2", "at least `swa_lr`", "swa_lr2=0.1, swa_lr=0.1000001",
        ),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(arguments, argument, rule, received):
    with pytest.raises(ValueError, match=f"^`{argument}` must be ") as error:
        Options(2, **arguments)
    assert rule in str(error.value)
    assert f"Received: {received}." in str(error.value)


@both
@pytest.mark.parametrize(
    ("arguments", "ineffective"),
    [
        ((2, "manual", 0.01), ["swa_lr=0.01"]),
        ((2, "manual", 0.01, 0.1), ["swa_lr=0.01", "swa_lr2=0.1"]),
        ((2, "manual", "auto", 0.1), ["swa_lr2=0.1"]),
        ((2, "constant", 0.01, 0.001), ["swa_lr2=0.001"]),  # below `swa_lr`, which is no matter
        ((2, "manual", np.str_("auto"), np.str_("auto")), []),
        ((2, "cyclic", 0.01, 0.1, 3), []),
    ],
)
def test_a_rate_without_effect_is_warned_of_once(kit, arguments, ineffective):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        swa = kit.SWA(*arguments)
        print(swa.plan(9, learning_rate=0.1))
        copy.copy(swa)
    assert len(seen) == len(ineffective)
    for warning, received in zip(seen, ineffective, strict=True):
        name, schedule = received.partition("=")[0], f"lr_schedule={arguments[1]!r}"
        assert f"`{name}` has no effect with {schedule}. Received: {received}." in str(
            warning.message
        )
        assert warning.filename == __file__


@both
def test_the_callback_checks_its_options(kit):
    for argument, rule in RULES.items():
        with pytest.raises(ValueError, match=f"^`{argument}` must be ") as error:
            kit.SWA(**{"start_epoch": 2, "lr_schedule": "cyclic", "swa_freq": 2, argument: -1.5})
        assert rule in str(error.value)


@both
def test_start_epoch_is_required_and_unknown_arguments_are_not_swallowed(kit):
    with pytest.raises(TypeError, match="start_epoch"):
        kit.SWA()
    with pytest.raises(TypeError, match="swa_momentum"):
        kit.SWA(2, swa_momentum=0.9)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"start_epoch": v} for v in [1, 10**6, 10**400, np.int64(3), np.uint8(1), np.int32(7)]),
        *({"start_epoch": v} for v in [0.5, 1e-9, 1 - 1e-9, np.float32(0.75), Fraction(3, 4)]),
        *({"lr_schedule": v} for v in ["manual", "constant", np.str_("constant")]),
        *({"swa_freq": v} for v in [1, 2, 10**6, np.int16(2)]),
        *({"batch_size": v} for v in [None, 1, np.int64(256)]),
        *({"verbose": v} for v in [0, 1, True, False, np.int64(1)]),
        *({"backup_dir": v} for v in [None, "folder", Path("folder"), np.str_("folder")]),
        *(
            {"lr_schedule": "constant", "swa_lr": v}
            for v in ["auto", np.str_("auto"), 1, 1e-12, np.float32(0.1), Fraction(1, 100), 5]
        ),
        *(
            {"lr_schedule": "cyclic", "swa_freq": 2, "swa_lr": v, "swa_lr2": v}
            for v in ["auto", 0.1, np.float64(0.1), 2]
        ),
    ],
    ids=lambda arguments: ",".join(f"{k}={v!r:.20}" for k, v in arguments.items()),
)
def test_unusual_values_that_make_sense_are_accepted(arguments):
    options = Options(**{"start_epoch": 2, **arguments})
    assert all(getattr(options, name) is value for name, value in arguments.items())


def test_numpy_scalars_and_fractions_mean_what_they_say(kit):
    swa = kit.SWA(
        np.float32(0.5), np.str_("cyclic"), Fraction(1, 50), np.float64(0.08), np.int64(2),
        np.int64(4), np.int64(0),
    )  # fmt: skip
    recorder = kit.Recorder()
    fit(kit, dense(kit), [recorder, swa], batch_size=4)
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
        fit(kit, model, [swa], initial_epoch=EPOCHS)
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
        fit(kit, model, [fed, kit.SWA(2)])
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
        fit(kit, model, [recorder, swa], epochs=6)
        assert swa.n_averaged == 2
        visited.append([array for epoch in recorder.weights for array in epoch])
        visited[-1] += [*kit.trainable(model), *recorder.rates]
    assert_bitwise(*visited)


def fit(kit, model, callbacks, **arguments):
    x, y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")
    arguments = {"epochs": EPOCHS, "shuffle": False, **arguments}
    return model.fit(x, y, verbose=0, callbacks=callbacks, **arguments)


def refusal(kit, model, swa, error, **fit_arguments):
    """The message with which `fit` is refused before its first batch, the model left as it is."""
    model.make_train_function()  # as `fit` does first: what is there then has to stay
    function, before = model.train_function, state(kit, model)
    fed = counter(kit)
    with pytest.raises(error) as raised:
        fit(kit, model, [fed, swa], **fit_arguments)
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
