"""Arguments: which are refused, with which words, and which are not."""

import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from swa_dist.plan import messages
from swa_dist.plan.options import Options
from tests.helpers.kit import KITS

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [
    *["3", "", b"3", [3], (3,), {3}, {}, 3 + 0j, Decimal("0.5"), object, len],
    *[True, False, np.bool_(True), np.array(3), np.array([0.5]), np.str_("3")],
]
NOT_FINITE = [NAN, INF, -INF, np.float32("nan"), np.float64("inf"), np.float16("-inf")]
NOT_POSITIVE = [0, -1, np.int64(0), np.int8(-3), 0.0, -0.0, -0.5, np.float32(0), Fraction(-1, 2)]
NO_INTEGERS = [1.0, 2.5, np.float64(2.0), Fraction(3, 2), 1e9]
NO_RATES = [
    *[*NO_NUMBERS, None, *NOT_FINITE, *NOT_POSITIVE, "Auto", "0.1", b"auto"],
    *[np.array("auto"), np.array([0.1, 0.2]), 10**400],  # the last is beyond a float
]
NO_NAMES = [
    *[None, "Manual", "CYCLIC", "constant ", "", "auto", b"manual", 0, True, NAN, str],
    *[["manual"], ("cyclic",), {"manual"}, np.array("manual"), np.array(["cyclic", "auto"])],
]

RULES = {
    "start_epoch": "an integer >= 1 (epochs count from 1), or a float between 0 and 1",
    "lr_schedule": "one of 'manual', 'constant', 'cyclic'",
    "swa_lr": "a finite number > 0, or 'auto'",
    "swa_lr2": "a finite number > 0, or 'auto'",
    "swa_freq": "an integer >= 1",
    "batch_size": "None or an integer >= 1",
    "verbose": "0 or 1",
    "backup_dir": "None or the path of a folder",
    "validate_average": "True or False",
    "bn_steps": "None or an integer >= 1",
    "snapshot_freq": "'epoch', or an integer >= 1",
    "ema_momentum": "None or a number in (0, 1)",
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
    "validate_average": [None, 0, 1, "True", "", 0.0, [True], np.array([True])],
    "bn_steps": ["auto", 0.5, *NO_NUMBERS, *NOT_FINITE, *NOT_POSITIVE, *NO_INTEGERS],
    "snapshot_freq": [
        *[None, "step", "Epoch", np.array("epoch"), b"epoch", 0.5],
        *[*NO_NUMBERS, *NOT_FINITE, *NOT_POSITIVE, *NO_INTEGERS],
    ],
    "ema_momentum": ["0.9", 1, 1.5, 2, *NO_NUMBERS, *NOT_FINITE, *NOT_POSITIVE, np.float32(1)],
}
CYCLIC = {"start_epoch": 2, "lr_schedule": "cyclic", "swa_freq": 2}


@pytest.mark.parametrize("argument", WRONG)
def test_an_option_of_the_wrong_type_or_out_of_range_is_refused(argument):
    tensors = [tf.constant(3), tf.constant(0.5), tf.Variable(0.5)]
    for value in [*WRONG[argument], *(tensors if argument != "lr_schedule" else [])]:
        # Valid but for this one value, which is to be refused for itself.
        with pytest.raises(ValueError, match=f"^`{argument}` must be ") as error:
            Options(**{**CYCLIC, argument: value})
        assert RULES[argument] in str(error.value)
        assert f"Received: {argument}={value!r}." in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "argument", "rule", "received"),
    [
        (
            {"lr_schedule": "cyclic", "swa_freq": 2, "snapshot_freq": 10},
            "snapshot_freq", "'epoch' with lr_schedule='cyclic': snapshots are taken at the ends",
            "snapshot_freq=10",
        ),
        (
            {"swa_freq": 2, "snapshot_freq": 10},
            "snapshot_freq", "'epoch' with swa_freq=2, which counts epochs between snapshots",
            "snapshot_freq=10",
        ),
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


ACCEPTED = [
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
    *({**CYCLIC, "swa_lr": v, "swa_lr2": v} for v in ["auto", 0.1, np.float64(0.1), 2]),
]


def test_unusual_values_that_make_sense_are_accepted():
    for arguments in ACCEPTED:
        options = Options(**{"start_epoch": 2, **arguments})
        assert all(getattr(options, name) is value for name, value in arguments.items()), arguments


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_the_callback_checks_its_options(kit):
    for argument, rule in RULES.items():
        with pytest.raises(ValueError, match=f"^`{argument}` must be ") as error:
            kit.SWA(**{**CYCLIC, argument: -1.5})
        assert rule in str(error.value)
    with pytest.raises(TypeError, match="start_epoch"):
        kit.SWA()
    with pytest.raises(TypeError, match="swa_momentum"):
        kit.SWA(2, swa_momentum=0.9)


@pytest.mark.parametrize(
    ("arguments", "ineffective"),
    [
        (("manual", 0.01, "auto"), ["swa_lr=0.01"]),
        (("manual", 0.01, 0.1), ["swa_lr=0.01", "swa_lr2=0.1"]),
        (("manual", "auto", 0.1), ["swa_lr2=0.1"]),
        (("constant", 0.01, 0.001), ["swa_lr2=0.001"]),  # below `swa_lr`, which is no matter
        (("manual", np.str_("auto"), np.str_("auto")), []),
        (("cyclic", 0.01, 0.1), []),
    ],
)
def test_a_rate_without_effect_is_named(arguments, ineffective):
    told = list(messages.options_without_effect(*arguments))
    assert len(told) == len(ineffective)
    for message, received in zip(told, ineffective, strict=True):
        name, schedule = received.partition("=")[0], f"lr_schedule={arguments[0]!r}"
        assert f"`{name}` has no effect with {schedule}. Received: {received}." in message


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_the_callback_warns_of_it_once_and_where_it_is_made(kit):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        swa = kit.SWA(2, "manual", 0.01)
        swa.plan(9, learning_rate=0.1)
    (warning,) = seen
    assert "`swa_lr` has no effect" in str(warning.message)
    assert warning.filename == __file__
