"""Learning rates as functions of where training stands."""

from fractions import Fraction

import pytest

from swa_dist.plan.schedules import annealed, cyclic


@pytest.mark.parametrize(
    ("start_epoch", "initial_rate", "swa_lr", "expected"),
    [
        # Ten epochs on the way: t = 0, .1, ... .5 | .6, .7, .8 | .9, and the epochs that average.
        (11, 0.5, 0.1, [0.5] * 6 + [0.4, 0.3, 0.2] + [0.1] * 4),
        (11, 0.1, 0.5, [0.1] * 6 + [0.2, 0.3, 0.4] + [0.5] * 4),  # warms up if it is told to
        (6, 0.4, 0.1, [0.4] * 3 + [0.325, 0.175] + [0.1] * 3),  # t = 0, .2, .4 | .6, .8 |
        (1, 0.5, 0.1, [0.1] * 3),  # no way to go
        (2, 0.5, 0.1, [0.5] + [0.1] * 3),  # t = 0
        (3, 0.5, 0.1, [0.5] * 2 + [0.1] * 3),  # t = 0, .5
        (4, 0.5, 0.1, [0.5] * 2 + [0.5 - 0.4 * 5 / 12] + [0.1] * 3),  # t = 0, 1/3, 2/3
        (11, 0.3, 0.3, [0.3] * 13),
    ],
)
def test_annealed_has_the_values_worked_out_by_hand(start_epoch, initial_rate, swa_lr, expected):
    rates = [annealed(e + 1, start_epoch, initial_rate, swa_lr) for e in range(len(expected))]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_annealed_is_the_sentence_of_the_definition_for_every_start():
    initial_rate, swa_lr = 0.7, 0.02
    for start_epoch in range(2, 101):
        for epoch in range(1, 131):
            way = Fraction(epoch - 1, start_epoch - 1)
            if way <= Fraction(1, 2):
                assert annealed(epoch, start_epoch, initial_rate, swa_lr) == initial_rate
            elif way >= Fraction(9, 10):
                assert annealed(epoch, start_epoch, initial_rate, swa_lr) == swa_lr
            else:
                # A line through two points: (0.5, initial_rate) and (0.9, swa_lr).
                line = initial_rate * (0.9 - way) / 0.4 + swa_lr * (way - 0.5) / 0.4
                rate = annealed(epoch, start_epoch, initial_rate, swa_lr)
                assert rate == pytest.approx(line, rel=1e-12), (start_epoch, epoch)


@pytest.mark.parametrize(
    ("swa_lr", "swa_lr2", "expected"),
    [
        (0.1, 0.5, [0.4, 0.3, 0.2, 0.1]),
        (0.0, 1.0, [0.8, 0.6, 0.4, 0.2, 0.0]),
        (0.1, 0.5, [0.1]),  # a cycle of one batch has its lowest rate only
        (0.25, 0.25, [0.25] * 3),
        (0.1, 0.175, [0.1625, 0.15, 0.1375, 0.125, 0.1125, 0.1]),
    ],
)
def test_cyclic_has_the_values_worked_out_by_hand(swa_lr, swa_lr2, expected):
    length = len(expected)
    rates = [cyclic(i, length, swa_lr, swa_lr2) for i in range(1, length + 1)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [1, 3, 7, 49, 1000])
@pytest.mark.parametrize(("swa_lr", "swa_lr2"), [(0.1, 0.3), (1e-7, 0.9), (0.01, 0.07)])
def test_the_last_batch_of_a_cycle_has_exactly_the_lowest_rate(length, swa_lr, swa_lr2):
    assert cyclic(length, length, swa_lr, swa_lr2) == swa_lr


def test_a_batch_beyond_the_cycle_has_the_last_ones_rate():
    assert [cyclic(i, 4, 0.1, 0.5) for i in (5, 8, 1000)] == [0.1] * 3
