"""What each epoch of a run is, and which learning rate each batch gets."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import swa_dist
from swa_dist import Plan
from swa_dist.plan.options import Options
from tests.helpers.kit import KITS

INITIAL_RATE = 0.5


def plan(start_epoch, epochs, has_bn=False, initial_rate=INITIAL_RATE, steps=None, **arguments):
    return Plan(
        epochs,
        start_epoch,
        **arguments,
        steps_per_epoch=steps,
        initial_learning_rate=initial_rate,
        batch_norm=has_bn,
    )


def snapshots(start_epoch, swa_freq, epochs, has_bn):
    """The definition: epochs counted from 1 at whose ends the weights enter the average."""
    bn_epoch = epochs if has_bn else None
    return [
        e
        for e in range(1, epochs + 1)
        if e >= start_epoch and (e - start_epoch + 1) % swa_freq == 0 and e != bn_epoch
    ]


def test_snapshots_are_where_the_definition_puts_them():
    refused = 0
    for case in itertools.product(range(1, 9), range(1, 5), range(1, 11), (False, True)):
        start_epoch, swa_freq, epochs, has_bn = case
        expected = snapshots(*case)
        if not expected:
            refused += 1
            with pytest.raises(ValueError, match=f"start_epoch={start_epoch}, swa_freq={swa_freq}"):
                plan(start_epoch, epochs, has_bn, swa_freq=swa_freq)
            continue
        p = plan(start_epoch, epochs, has_bn, swa_freq=swa_freq)
        run = range(epochs)
        assert [e + 1 for e in run if p.is_snapshot(e)] == expected, case
        assert [e + 1 for e in run if p.is_bn_pass(e)] == ([epochs] if has_bn else []), case
        assert [e + 1 for e in run if p.is_start(e)] == [start_epoch], case
        assert p.start_epoch == start_epoch
    assert 0 < refused < 8 * 4 * 10 * 2


def test_snapshots_of_the_papers_run():
    p = plan(45, 60, has_bn=True)
    assert [e + 1 for e in range(60) if p.is_snapshot(e)] == list(range(45, 60))


@pytest.mark.parametrize(
    ("start_epoch", "epochs", "expected"),
    [
        (0.75, 60, 46),
        (0.1, 30, 4),
        (0.5, 5, 4),  # 2/5 < 0.5 <= 3/5
        (0.5, 6, 4),
        (0.29, 100, 30),
        (1e-9, 10, 2),
        (0.99, 100, 100),
        (5 / 6, 60, 51),
        (2 / 3, 60, 41),
        (Fraction(3, 4), 60, 46),
        (Fraction(5, 6), 6, 6),
        (Fraction(2, 3), 3, 3),
        (np.float64(0.1), 30, 4),
        (np.float32(0.75), 60, 46),
        (np.float32(0.1), 30, 4),
        (np.float16(0.5), 5, 4),
        (np.int64(3), 5, 3),
        (np.uint8(200), 300, 200),
        (7, 9, 7),
    ],
    ids=repr,
)
def test_start_epoch_as_a_fraction_of_epochs(start_epoch, epochs, expected):
    p = plan(start_epoch, epochs)
    assert p.start_epoch == expected
    assert [e + 1 for e in range(epochs) if p.is_start(e)] == [expected]
    assert [e + 1 for e in range(epochs) if p.is_snapshot(e)] == list(range(expected, epochs + 1))


def test_a_hundredth_of_epochs_is_taken_as_it_is_written():
    for hundredths, epochs in itertools.product(range(1, 100), (5, 7, 30, 60, 100)):
        behind = (Fraction(e - 1, epochs) for e in range(1, epochs + 2))
        expected = 1 + next(i for i, b in enumerate(behind) if b >= Fraction(hundredths, 100))
        if expected <= epochs:
            assert plan(float(f"0.{hundredths:02}"), epochs).start_epoch == expected


def test_a_quotient_of_epochs_begins_after_as_many_epochs_as_it_says():
    wrong = [
        f"{behind}/{epochs}"
        for epochs in range(2, 61)
        for behind in range(1, epochs)
        if plan(behind / epochs, epochs).start_epoch != behind + 1
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("arguments", "epochs", "has_bn", "words"),
    [
        ({"start_epoch": 5}, 4, False, ["start_epoch=5", "end of epoch 5", "to epoch 4"]),
        ({"start_epoch": 4}, 4, True, ["start_epoch=4", "epoch 4, recomputes", "epoch 3 is the"]),
        ({"start_epoch": 0.99}, 5, False, ["start_epoch=0.99", "end of epoch 6", "to epoch 5"]),
        ({"start_epoch": 0.75}, 4, True, ["start_epoch=0.75", "end of epoch 4", "epoch 3 is the"]),
        ({"start_epoch": 3, "swa_freq": 3}, 4, False, ["swa_freq=3", "end of epoch 5", "epoch 4"]),
        ({"start_epoch": 2, "swa_freq": 3}, 4, True, ["swa_freq=3", "end of epoch 4", "epoch 3"]),
        ({"start_epoch": 1}, 1, True, ["start_epoch=1", "epoch 1", "epoch 0 is the last"]),
    ],
)
def test_a_run_without_a_snapshot_is_refused(arguments, epochs, has_bn, words):
    with pytest.raises(ValueError, match=r"^`start_epoch` and `swa_freq` must") as error:
        plan(epochs=epochs, has_bn=has_bn, **arguments)
    for word in ["Received: ", *words]:
        assert word in str(error.value)


def test_a_run_that_begins_after_its_last_snapshot_is_refused():
    p = plan(2, 6, has_bn=True, swa_freq=2)  # snapshots at the ends of epochs 3 and 5
    for epoch in range(5):
        p.check_first_epoch(epoch)
    for epoch in (5, 6):
        with pytest.raises(ValueError, match=r"^`start_epoch` and `swa_freq` must") as error:
            p.check_first_epoch(epoch)
        for word in ("start_epoch=2", "swa_freq=2", f"from epoch {epoch + 1}", "to epoch 6"):
            assert word in str(error.value)


def test_manual_leaves_the_rate_alone_but_for_the_bn_pass():
    for initial_rate in (INITIAL_RATE, None):
        p = plan(2, 4, has_bn=True, initial_rate=initial_rate, steps=3)
        assert [p.learning_rate(e, 1) for e in range(4)] == [None, None, None, 0.0]
        assert not any(p.changes_within(e) for e in range(4))


def test_constant_goes_down_to_the_rate_of_averaging_and_stays():
    expected = [0.5] * 3 + [0.4, 0.2] + [0.1] * 3 + [0.0]  # t = 0, .2, .4 | .6, .8 |
    for batch, steps in ((0, None), (0, 3), (2, 3)):
        p = plan(6, 9, has_bn=True, lr_schedule="constant", swa_lr=0.1, steps=steps)
        rates = [p.learning_rate(e, batch) for e in range(9)]
        assert rates == pytest.approx(expected, rel=1e-12)
    assert not any(p.changes_within(e) for e in range(9))


def cycle(length, swa_lr, swa_lr2):
    """The definition: batch i of c, counted from 1, has t = i/c and (1 - t) swa_lr2 + t swa_lr."""
    return [(1 - i / length) * swa_lr2 + i / length * swa_lr for i in range(1, length + 1)]


def test_cyclic_falls_batch_by_batch_and_ends_a_cycle_with_its_snapshot():
    steps = 3
    cycles = {"swa_lr": 0.1, "swa_lr2": 0.4, "swa_freq": 2}
    p = plan(3, 8, has_bn=True, lr_schedule="cyclic", steps=steps, **cycles)
    rates = [[p.learning_rate(e, b) for b in range(steps)] for e in range(8)]
    assert rates[:2] == [[0.5] * 3] * 2  # t = 0, .5 on the way to epoch 3
    assert rates[-1] == [0.0] * 3
    averaging = list(itertools.chain(*rates[2:-1]))
    assert averaging == pytest.approx((cycle(6, 0.1, 0.4) * 3)[:15], rel=1e-12)
    assert [e for e in range(8) if p.changes_within(e)] == [2, 3, 4, 5, 6]
    at_snapshots = [rates[e][-1] for e in range(8) if p.is_snapshot(e)]
    assert at_snapshots == [0.1, 0.1]


def test_cyclic_without_known_steps_has_one_rate_an_epoch_that_begins_at_the_top():
    p = plan(1, 4, lr_schedule="cyclic", swa_lr=0.1, swa_lr2=0.4, swa_freq=3)
    expected = [0.4, 0.3, 0.2, 0.4]
    for batch in (0, 1, 50):
        rates = [p.learning_rate(e, batch) for e in range(4)]
        assert rates == pytest.approx(expected, rel=1e-12)


def test_batches_beyond_the_steps_do_not_reach_into_the_next_epochs_part_of_the_cycle():
    p = plan(1, 4, lr_schedule="cyclic", swa_lr=0.1, swa_lr2=0.4, swa_freq=2, steps=3)
    for epoch in range(4):
        last = p.learning_rate(epoch, 2)
        assert [p.learning_rate(epoch, b) for b in (3, 4, 99)] == [last] * 3
    assert p.learning_rate(1, 99) == 0.1
    assert p.learning_rate(0, 99) == pytest.approx(0.25)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int16, np.int32, np.int64])
def test_a_numpy_swa_freq_counts_as_an_integer_of_any_size(integer):
    steps = 10_000
    cycles = {"swa_lr": 0.1, "swa_lr2": 0.4, "swa_freq": integer(5)}
    p = plan(1, 400, lr_schedule="cyclic", steps=steps, **cycles)
    assert p.learning_rate(398, steps - 1) == pytest.approx(0.1 + 0.3 / 5, rel=1e-12)
    assert p.learning_rate(399, steps - 1) == 0.1
    assert [e + 1 for e in range(400) if p.is_snapshot(e)] == list(range(5, 401, 5))


def test_automatic_rates_are_fractions_of_the_initial_one():
    p = plan(1, 4, lr_schedule="cyclic", swa_freq=2, initial_rate=0.4, steps=1)
    assert p.learning_rate(1) == pytest.approx(0.04, rel=1e-12)
    assert p.learning_rate(0) == pytest.approx((0.04 + 0.04 + 0.25 * 0.36) / 2, rel=1e-12)
    p = plan(1, 4, lr_schedule="cyclic", swa_freq=2, initial_rate=0.4, swa_lr=0.2, steps=1)
    assert p.learning_rate(0) == pytest.approx((0.2 + 0.25) / 2, rel=1e-12)
    p = plan(1, 4, lr_schedule="constant", initial_rate=0.4)
    assert p.learning_rate(3) == pytest.approx(0.04, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "initial_rate", "words"),
    [
        ({"swa_lr2": 0.01}, 0.2, ["swa_lr2=0.01", "swa_lr=0.02"]),  # swa_lr: 0.1 of 0.2
        ({"swa_lr": 0.5}, 0.1, ["swa_lr2=0.4", "swa_lr=0.5"]),  # 0.5 + 0.25 (0.1 - 0.5)
    ],
)
def test_an_automatic_rate_on_the_wrong_side_of_a_given_one_is_refused(
    arguments, initial_rate, words
):
    with pytest.raises(ValueError, match=r"^`swa_lr2` must be at least `swa_lr`") as error:
        plan(1, 4, lr_schedule="cyclic", swa_freq=2, initial_rate=initial_rate, **arguments)
    for word in ["Received: ", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("lr_schedule", ["constant", "cyclic"])
def test_a_schedule_needs_a_rate_that_can_be_set(lr_schedule):
    options = Options(1, lr_schedule, swa_freq=2)
    with pytest.raises(ValueError, match=r"^`lr_schedule` must be 'manual'") as error:
        options.check_initial_rate(None, "")
    for word in ("LearningRateSchedule", f"Received: lr_schedule='{lr_schedule}'"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match=r"learning rate is 0.* That is the model's `critic`\.$"):
        options.check_initial_rate(0.0, "critic")
    options.check_initial_rate(0.1, "")
    Options(1).check_initial_rate(None, "")  # "manual" needs none


def test_plan_and_schedules_import_no_framework():
    code = """if True:
        import json, sys
        import swa_dist
        print(swa_dist.Plan(60, 45), file=sys.stderr)
        print(json.dumps(sorted(set(sys.modules) & {"tensorflow", "keras", "tf_keras", "numpy"})))
    """
    root = Path(swa_dist.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == []


def test_a_plan_prints_as_a_table():
    p = Plan(*(60, 45, "cyclic", 0.001, 0.003, 3), steps_per_epoch=390, initial_learning_rate=0.1)
    assert repr(p) == str(p)  # as a notebook shows it
    assert str(p).splitlines() == [
        "epochs    what happens            learning rate",
        "1 to 23   training                0.1",
        "24 to 40  training                0.09438 to 0.004375",
        "41 to 44  training                0.001",
        "45 to 59  training and averaging  0.003 to 0.001 in 3 epochs of 390 batches",
        "60        BN pass of the average  0",
        "snapshots (5): at the end of epoch 47, 50, ..., 59",
    ]


def test_a_printed_plan_shows_epochs_that_are_trained_for_no_snapshot():
    assert str(Plan(11, 4, "cyclic", 0.01, 0.02, 3)).splitlines()[3:7] == [
        "4 to 9  training and averaging     0.02 to 0.01 in 3 epochs",
        "10      training, for no snapshot  0.02 to 0.01 in 3 epochs",
        "11      BN pass of the average     0",
        "snapshots (2): at the end of epoch 6, 9",
    ]
    assert "for no snapshot" not in str(Plan(10, 4, "cyclic", 0.01, 0.02, 3))
    assert "7       training, for no snapshot" in str(Plan(7, 1, swa_freq=2, batch_norm=False))


def test_snapshots_by_steps_are_counted_on_across_epochs():
    for start, every, epochs, steps, has_bn, bn_data in itertools.product(
        range(1, 4), (1, 2, 5, 7), range(2, 6), (1, 3, 4), (False, True), (False, True)
    ):
        trained = range(start, epochs + (not has_bn or bn_data))
        # The definition: steps from the beginning of epoch `start` on, and at which of them one is.
        counted = [(e, b) for e in trained for b in range(1, steps + 1)]
        taken = counted[every - 1 :: every]
        make = functools.partial(
            Plan, epochs, start, snapshot_freq=every, batch_norm=has_bn, bn_data=bn_data
        )
        if not taken:
            with pytest.raises(ValueError, match="must leave room for at least one snapshot"):
                make(steps_per_epoch=steps)
            continue
        p = make(steps_per_epoch=steps)
        assert f"snapshots ({len(taken)}): every " in str(p)
        assert p.first_snapshot == taken[0][0]
        run = range(epochs)
        assert [e + 1 for e in run if p.is_snapshot(e)] == [e for e, b in taken if b == steps]
        assert [e + 1 for e in run if p.averages_steps(e)] == [*trained]
        assert [e + 1 for e in run if p.is_bn_pass(e)] == [epochs] * (has_bn and not bn_data)
        unknown = make()
        assert not any(map(unknown.is_snapshot, run))
        assert "snapshots: every " in str(unknown)


def test_printed_plans_of_steps_and_of_data_for_bn_statistics():
    p = Plan(60, 45, snapshot_freq=10, steps_per_epoch=520)
    assert str(p).splitlines()[-2:] == [
        "60        BN pass of the average  0",
        "snapshots (780): every 10 steps from epoch 45 on",
    ]
    p = KITS[0].SWA(0.5, snapshot_freq=1, bn_data=np.ones((2, 3))).plan(4)
    assert str(p).splitlines() == [
        "epochs  what happens            learning rate",
        "1 to 2  training                yours",
        "3 to 4  training and averaging  yours",
        "snapshots: every step from epoch 3 on",
        "BN statistics: from `bn_data`, at the end of epoch 4",
    ]
    p = Plan(4, 3, bn_data=True)
    assert [e for e in range(4) if p.is_snapshot(e)] == [2, 3]
    assert p.stopped_after(2).is_bn_pass(3)  # of a run that is resumed after a stop


def test_a_printed_plan_says_what_depends_on_a_rate_it_was_not_told():
    assert str(Plan(5, 4, "constant", batch_norm=False)).splitlines() == [
        "epochs  what happens            learning rate",
        "1 to 2  training                ?",
        "3       training                ?",
        "4 to 5  training and averaging  ?",
        "snapshots (2): at the end of epoch 4, 5",
        "?: depends on the optimizer's learning rate, which was not given",
    ]
    lines = str(Plan(5, 4, "constant", swa_lr=0.01)).splitlines()
    assert lines[3:5] == [
        "4       training and averaging  0.01",
        "5       BN pass of the average  0",
    ]


def test_a_printed_plan_of_a_rate_that_is_left_alone():
    assert str(Plan(4, 0.5)).splitlines() == [
        "epochs  what happens            learning rate",
        "1 to 2  training                yours",
        "3       training and averaging  yours",
        "4       BN pass of the average  0",
        "snapshots (1): at the end of epoch 3",
    ]


def test_a_printed_plan_agrees_with_its_answers():
    for start_epoch, freq, epochs, has_bn in itertools.product(
        range(1, 8), (1, 2), range(3, 12), (False, True)
    ):
        schedule = "constant" if freq == 1 else "cyclic"
        try:
            p = plan(start_epoch, epochs, has_bn, 0.5, 3, lr_schedule=schedule, swa_freq=freq)
        except ValueError:
            continue
        told = {}
        for line in str(p).splitlines()[1:-1]:
            span, what, rate = re.split("  +", line)
            first, *last = map(int, span.split(" to "))
            told |= dict.fromkeys(range(first, (last or [first])[0] + 1), (what, rate))
        assert list(told) == list(range(1, epochs + 1))
        for epoch in range(epochs):
            what, rate = told[epoch + 1]
            assert (what == "BN pass of the average") == p.is_bn_pass(epoch)
            if p.is_snapshot(epoch):
                assert what == "training and averaging"
            ends = [float(number) for number in rate.split(" in ")[0].split(" to ")]
            for batch in range(3):
                assert ends[-1] * 0.999 <= p.learning_rate(epoch, batch) <= ends[0] * 1.001


def test_a_run_that_stops_early_has_its_bn_pass_in_the_next_epoch():
    p = plan(0.5, 10, has_bn=True).stopped_after(6)
    assert p.epochs == 8
    assert [e + 1 for e in range(8) if p.is_snapshot(e)] == [6, 7]
    assert [e + 1 for e in range(8) if p.is_bn_pass(e)] == [8]


@pytest.mark.parametrize(
    ("argument", "value"),
    [(a, v) for a in ("epochs", "steps_per_epoch") for v in (0, -1, 1.0, "3", True)]
    + [("epochs", None)]
    + [("initial_learning_rate", v) for v in (0, -0.1, float("nan"), "0.1", True)]
    + [("batch_norm", v) for v in (None, 1, "yes")],
)
def test_a_plan_of_what_cannot_be_is_refused(argument, value):
    with pytest.raises(
        ValueError, match=f"^`{argument}` must be .* Received: {argument}={value!r}"
    ):
        Plan(**{"epochs": 5, "start_epoch": 2, argument: value})


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_the_callback_tells_its_plan(kit):
    arguments = {"lr_schedule": "cyclic", "swa_lr": 0.1, "swa_lr2": 0.4, "swa_freq": 2}
    told = kit.SWA(3, **arguments).plan(8, steps_per_epoch=3, learning_rate=0.5)
    assert told == plan(3, 8, has_bn=True, initial_rate=0.5, steps=3, **arguments)


@pytest.mark.parametrize("has_bn", [True, False])
@pytest.mark.parametrize("start", [1, 2, 5, 0.5])
@pytest.mark.parametrize("freq", [1, 2, 3])
def test_snapshots_are_the_epochs_that_end_with_one(start, freq, has_bn):
    p = Plan(13, start, swa_freq=freq, batch_norm=has_bn)
    for first in range(14):
        for end in range(14):
            listed = [epoch for epoch in range(first, end) if p.is_snapshot(epoch)]
            assert list(p.snapshot_epochs(first, end)) == listed


@pytest.mark.parametrize("schedule", ["manual", "constant", "cyclic"])
def test_a_plan_costs_no_more_for_ten_million_epochs(schedule):
    """`fit(epochs=10**7)` with early stopping is an idiom: nothing is listed over all epochs."""

    class Counted(Plan):
        asked = 0

        def learning_rate(self, epoch, batch=0):
            Counted.asked += 1
            return super().learning_rate(epoch, batch)

        def is_snapshot(self, epoch):
            Counted.asked += 1
            return super().is_snapshot(epoch)

        def _phase(self, epoch):
            Counted.asked += 1
            return super()._phase(epoch)

    for start in (2, 0.75, 10**7 - 2):
        Counted.asked = 0
        p = Counted(10**7, start, schedule, swa_freq=2, initial_learning_rate=0.1)
        lines = str(p).splitlines()
        p.check_first_epoch(10**6 if start != 2 else 5)
        assert len(p.snapshot_epochs(0, 10**7)) == (10**7 - p.start_epoch) // 2
        assert Counted.asked < 1000
        assert lines[-2].split()[0] == "10000000"
