import json

import numpy as np
import pytest

from scripts.bench.evidence.findings import Interval, Tuning, in_words
from scripts.bench.evidence.runs import Runs
from scripts.bench.evidence.settings import CASES, QUICK, Settings


class TestInterval:
    def test_it_is_students(self) -> None:
        # The 97.5 % quantiles of Student's t, from any printed table.
        for n, quantile in ((2, 12.7062), (10, 2.2622), (31, 2.0423)):
            values = np.random.default_rng(n).normal(3, 2, n)
            mean = sum(values) / n
            half = quantile * np.sqrt(sum((values - mean) ** 2) / (n - 1) / n)
            interval = Interval.of(values)
            np.testing.assert_allclose(
                [interval.mean, interval.low, interval.high],
                [mean, mean - half, mean + half],
                rtol=1e-4,
            )

    @pytest.mark.parametrize(
        ("low", "high", "sign"), [(1, 2, 1), (-2, -1, -1), (-1, 2, 0), (0, 2, 0), (-2, 0, 0)]
    )
    def test_its_sign_is_that_of_all_its_numbers(self, low: float, high: float, sign: int) -> None:
        assert Interval((low + high) / 2, low, high).sign == sign

    @pytest.mark.parametrize(
        ("numbers", "shown"),
        [
            ((0.0123, 0.0011, 0.0235), "**+0.012** [+0.001, +0.024]"),
            ((-0.00004, -0.01204, 0.01196), "+0.000 [-0.012, +0.012]"),
            ((20.0, -11.0, 51.0), "+20 [-11, +51]"),
            ((0.0, 0.0, 0.0), "+0.00 [+0.00, +0.00]"),
        ],
    )
    def test_it_shows_two_digits_of_its_width(
        self, numbers: tuple[float, float, float], shown: str
    ) -> None:
        assert str(Interval(*numbers)) == shown.replace("-", "\N{MINUS SIGN}")


class TestWords:
    lower, higher, neither = Interval(-2, -3, -1), Interval(2, 1, 3), Interval(0, -1, 1)

    def test_they_name_the_cases_on_each_side(self) -> None:
        intervals = dict(zip(CASES, (self.lower, self.neither, self.higher), strict=False))
        names = [case.name for case in CASES]
        assert in_words(intervals, "less", "more") == (
            f"less for {names[0]}; more for {names[2]}; no difference shown for {names[1]}"
        )

    @pytest.mark.parametrize(
        ("interval", "said"),
        [
            (lower, "less in every case"),
            (higher, "more in every case"),
            (neither, "no difference shown in any case"),
        ],
    )
    def test_they_sum_up_what_holds_for_all(self, interval: Interval, said: str) -> None:
        assert in_words(dict.fromkeys(CASES, interval), "less", "more") == said


def test_the_lowest_loss_chooses_the_rates() -> None:
    tuned = Tuning({0.1: 0.3, 0.2: 0.1, 0.4: 0.2}, {"constant": {0.5: 2.0, 1.0: 1.0}})
    assert (tuned.rate, tuned.shares) == (0.2, {"constant": 1.0})


def test_settings_survive_json() -> None:
    again = Settings.from_json(json.loads(json.dumps(QUICK.as_json())))
    assert again.as_json() == QUICK.as_json()


class TestRuns:
    def test_what_is_done_is_not_done_again(self, tmp_path) -> None:
        path = tmp_path / "runs.jsonl"
        done = [{"asked": {"seed": i}, "found": {"loss": i / 7}} for i in range(3)]
        lines = [json.dumps(run) for run in done]
        path.write_text("\n".join([*lines, lines[0][:20]]))  # killed while it wrote
        with Runs(path) as runs:
            assert runs.do([{"seed": 2}, {"seed": 0}]) == [{"loss": 2 / 7}, {"loss": 0.0}]
            runs.tidy()
        assert path.read_text().splitlines() == [lines[2], lines[0]]
