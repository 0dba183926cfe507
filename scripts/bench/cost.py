"""What averaging costs: ours, the peers' and what the machine can do at best."""

from typing import Any

import numpy as np

from scripts.bench import averaging, isolated, memory, training
from scripts.bench.averaging import ADD, KERAS_SWA, LIMIT, LOOK, NOTHING, OURS, OURS_LATER
from scripts.bench.isolated import KERAS_VERSIONS
from scripts.bench.report import Page, digits, ms, s, spread, table, us
from scripts.bench.training import ADDONS, EMA, EMPTY, PLAIN, STEPS, STEPS_EMA, UPDATE

Job = dict[str, Any]

DEMO: Job = {"network": ["build_model"], "batch": 80}
JOBS: dict[str, Job] = {
    "the demo's": DEMO,
    "two convolutions, no BN": DEMO | {"network": ["without_bn"]},
    "ResNet-50 at 64x64": {"network": ["application", "ResNet50", 64], "batch": 16},
}


def main() -> None:
    """Measure all, one process after the other."""
    page = Page("cost.md", "./scripts/benchmark")
    # What takes long comes last: a run that is stopped has the rest.
    page.measure(one_step, growth, swap, hooks, bn_pass)
    page.measure(done_once, peak_memory, whole_fit, short_fit, every_step)


def one_step(page: Page) -> None:
    """One averaging step."""
    network = ["equal_weights", 200_000, 20] if page.quick else ["application", "ResNet50", 224]
    rows, parts = [], []
    for n in (1, 4) if page.quick else (1, 2, 4):
        beside = [KERAS_SWA, LIMIT] if n == 1 else [KERAS_SWA]
        groups = [[OURS, *beside], [OURS_LATER, *beside], [NOTHING, LOOK, ADD]]
        times = time_steps(network, n, groups if n == 1 else groups[:2])
        ours, later, theirs = times[OURS], times[OURS_LATER], times[KERAS_SWA]
        row = [str(n), ms(ours), ms(later), ms(theirs), spread(theirs / ours), "", ""]
        if n == 1:
            limit, parts = times[LIMIT], [ms(times[part]) for part in (NOTHING, LOOK, ADD)]
            row[-2:] = [ms(limit), spread(ours / limit)]
            page.aim("averaging step, 1 replica: ours / keras-swa", ours / theirs, 0.25)
            what = "averaging step, 1 replica: ours / in-place addition of one flat tensor"
            page.aim(what, ours / limit, 1.4)
            page.aim("the same after hundreds of updates", later / limit, 1.4)
        elif n == 4:
            page.aim("averaging step, 4 replicas: ours / keras-swa", ours / theirs, 0.5)
        rows.append(row)
    header = ["replicas", "ours", "ours, after hundreds", "keras-swa", "keras-swa / ours"]
    page.put("one step", table([*header, "limit", "ours / limit"], rows))
    header = ["calling a graph that does nothing", "looking whether all is finite", "adding"]
    page.put("parts of a step", table(header, [parts]))


def growth(page: Page) -> None:
    """Growth with parameters and variables."""
    million, fixed, sizes, counts = 1_000_000, 100, [1, 3, 10, 30, 100], [10, 30, 100, 300, 1000]
    if page.quick:
        million, fixed, sizes, counts = 100_000, 10, [1, 3], [10, 100]
    cases = [*((n * million, fixed) for n in sizes), *((million, k) for k in counts)]
    names = [OURS, KERAS_SWA, LIMIT]
    found = [time_steps(["equal_weights", *case], 1, [names]) for case in cases]
    rows = []
    for (n, k), times in zip(cases, found, strict=True):
        each = ms(times[OURS] / (n / 1e6))
        rows.append([f"{n / 1e6:g} M", str(k), *(ms(times[name]) for name in names), each])
    by_size, by_count = found[: len(sizes)], found[len(sizes) :]
    draw_growth(page, ("million parameters", sizes, by_size), ("variables", counts, by_count))
    ours, theirs = (
        1e6 * np.polyfit(counts, [np.median(times[name]) for times in by_count], 1)[0]
        for name in (OURS, KERAS_SWA)
    )
    page.put(
        "growth",
        table(["parameters", "variables", *names, "ours, per million parameters"], rows),
        f"A variable more costs {ours:.1f} µs, in keras-swa {theirs:.1f} µs (least squares over "
        "the number of variables).",
    )


def draw_growth(page: Page, *panels: tuple[str, list[int], list[Any]]) -> None:
    """Draw time over parameters, and over variables."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, (label, xs, found) in zip(both, panels, strict=True):
        for name, color in ((KERAS_SWA, "#c0392b"), (OURS, "#1f4e79"), (LIMIT, "#7f7f7f")):
            quartiles = [np.quantile(times[name], [0.25, 0.5, 0.75]) * 1e3 for times in found]
            low, median, high = np.transpose(quartiles)
            axes.plot(xs, median, color=color, marker="o", markersize=4, label=name)
            axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_xticks(xs, xs)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    both[0].set_ylabel("ms for one averaging step")
    both[0].legend(frameon=False)
    figure.savefig(page.output / "growth.png", dpi=120)


def swap(page: Page) -> None:
    """Memory of a swap."""
    depth, width = (4, 1024) if page.quick else (12, 1600)
    cases = [(n, dtype) for dtype in ("float32", "bfloat16") for n in (1, 2, 4)]
    columns = (memory.THERE, memory.BACK, memory.COPY)
    rows, peaks = [], []
    for n, dtype in cases[:1] if page.quick else cases:
        found = isolated.call(memory.swap, n, dtype, depth, width, legacy=True)
        rows.append([dtype, str(n), *(digits(found[column]) for column in columns)])
        peaks += [found[memory.THERE], found[memory.BACK]]
    page.aim("peak memory of a swap above before, in layers per replica, at most", max(peaks), 1.1)
    page.put("swap", table(["weights", "replicas", *columns], rows))


def hooks(page: Page) -> None:
    """Steps before averaging begins."""
    rounds, epochs, steps = (2, 5, 50) if page.quick else (8, 7, 300)
    job: Job = {"network": ["equal_layers", 3, 1], "batch": 32, "each_step": False}
    job |= {"rounds": rounds, "epochs": epochs, "steps": steps, "start": epochs}
    rows = []
    for version, legacy in {"tf_keras": True}.items() if page.quick else KERAS_VERSIONS.items():
        fits = isolated.call(training.fits, [PLAIN, EMPTY, OURS], **job, legacy=legacy)
        # The first epoch traces, the last averages.
        times = {
            what: [epoch[0] / steps for fit in fits[what] for epoch in fit["times"][1:-1]]
            for what in fits
        }
        excess = (np.median(times[OURS]) - np.median(times[EMPTY])) * 1e6
        rows.append([version, *map(us, times.values()), f"{excess:+.0f} µs"])
        page.aim(f"step before averaging: SWA beyond an empty callback, µs, {version}", excess, 30)
    header = ["Keras", "no callback", "empty callback", "SWA", "SWA beyond empty"]
    page.put("steps before averaging", table(header, rows))


def bn_pass(page: Page) -> None:
    """The BN pass."""
    cases = [("the demo's", 1, 60, 3), ("the demo's", 4, 60, 3), ("ResNet-50 at 64x64", 1, 16, 1)]
    rows = []
    for network, n, steps, repeats in [("the demo's", 4, 12, 1)] if page.quick else cases:
        for version, legacy in versions(page):
            job = JOBS[network] | {"epochs": 3, "steps": steps, "replicas": n, "legacy": legacy}
            fits = [fit_ours(**job) for _ in range(repeats)]
            share = np.concatenate([fit["pass"] / np.median(fit["training"]) for fit in fits])
            steps_of = [
                ms(np.concatenate([f[which] for f in fits])) for which in ("training", "pass")
            ]
            end = 1e3 * np.median([fit["end"] for fit in fits])
            rows.append([network, version, str(n), *steps_of, spread(share), f"{end:.0f} ms"])
            what = f"step of the BN pass / training step, {network}, {version}, {n} replicas"
            page.aim(what, share, 0.5)
    header = ["network", "Keras", "replicas", "training step", "step of the BN pass", "ratio"]
    page.put("BN pass", table([*header, "at the end"], rows))


def done_once(page: Page) -> None:
    """What is done once."""
    job: Job = {"network": ["application", "ResNet50", 32], "batch": 16}
    job |= {"epochs": 4, "steps": 4, "start": 2, "clock": "cpu"}
    goals = {
        "SWA's hooks, in all": ("hooks", 0.15),
        "first step of the BN pass": ("bn", 0.8),
        "end of the BN pass": ("end", 0.05),
    }
    rows = []
    for version, legacy in versions(page):
        for n in (1,) if page.quick else (1, 2, 4):
            fit = fit_ours(**job, replicas=n, legacy=legacy)
            row = [version, str(n), f"{digits(fit['first'])} s"]
            for called, (part, goal) in goals.items():
                share = fit[part] / fit["first"]
                row.append(f"{digits(fit[part])} s: {digits(share)}")
                what = f"{called} / first training step, ResNet-50, {version}, {n} replicas"
                page.aim(what, share, goal)
            rows.append(row)
    page.put("done once", table(["Keras", "replicas", "first training step", *goals], rows))


def peak_memory(page: Page) -> None:
    """Peak of memory of a fit."""
    depth, times = (2, 1) if page.quick else (6, 5)
    job: Job = {"network": ["equal_layers", 3200, depth], "batch": 8, "steps": 1, "epochs": 6}
    rows = []
    for n in (1,) if page.quick else (1, 4):
        peaks: dict[str, Any] = {PLAIN: [], OURS: [], KERAS_SWA: []}
        for what, found in peaks.items():
            for _ in range(times):
                fit = fit_one(what, **job, start=2, replicas=n, legacy=True)
                found.append(fit["peak"] / (4 * 3200**2 * depth))
        plain, *others = map(np.array, peaks.values())
        above = [peak - np.median(plain) for peak in others]
        ranges = [f"{np.median(a):.2f} [{a.min():.2f}, {a.max():.2f}]" for a in above]
        rows.append([str(n), *ranges, f"± {np.ptp(plain) / 2:.2f}"])
        what = f"peak memory above plain training, in weights' sizes per replica, on {n}"
        page.aim(what, above[0] / n, 1.1)
    header = ["replicas", "ours", "keras-swa", "noise of the plain run"]
    page.put("peak of memory", table(header, rows))


def whole_fit(page: Page) -> None:
    """A whole fit with and without SWA."""
    rounds, epochs, steps = (1, 4, 8) if page.quick else (10, 12, 15)
    job = {"rounds": rounds, "warm_up": 1, "epochs": epochs, "steps": steps, "replicas": 1}
    cases = [(network, version) for network in list(JOBS)[:2] for version in KERAS_VERSIONS]
    rows = []
    for network, version in cases[::3] if page.quick else cases:
        named = JOBS[network] | job | {"legacy": KERAS_VERSIONS[version]}
        fits = isolated.call(training.fits, [PLAIN, OURS], **named, start=epochs * 3 // 4)
        plain, ours = (np.array([fit["total"] for fit in fits[what]]) for what in fits)
        longest = [map(max, filter(None, fit["hooks"].values())) for fit in fits[OURS]]
        once = np.array(list(map(sum, longest)))
        rest, traced = ours - once, "none"
        if network == "the demo's":
            found = map(training.parts, fits[OURS])
            trace = np.array([max(fit["bn"] - np.median(fit["pass"]), 0) for fit in found])
            rest, traced = rest - trace, s(trace)
        shown = s(plain), s(ours), spread(ours / plain), traced, s(once), spread(rest / plain)
        rows.append([network, version, *shown])
        what = f"whole `fit` with SWA / without, but for what is done once, {network}, {version}"
        page.aim(what, rest / plain, 1.0)
    header = ["network", "Keras", "without", "with SWA", "ratio", "trace of the BN pass"]
    page.put("whole fit", table([*header, "hooks, done once", "ratio but for these"], rows))


def short_fit(page: Page) -> None:
    """A short fit of MobileNetV2 with and without SWA."""
    n, epochs, steps, rounds = (1, 3, 2, 1) if page.quick else (2, 5, 8, 3)
    job: Job = {"network": ["application", "MobileNetV2", 64], "batch": 16, "replicas": n}
    job |= {"epochs": epochs, "steps": steps, "start": 2, "clock": "cpu"}
    rows = []
    for version, legacy in KERAS_VERSIONS.items():
        totals = [
            [fit_one(what, **job, legacy=legacy)["total"] for what in (PLAIN, OURS)]
            for _ in range(rounds)
        ]
        plain, ours = np.transpose(totals)
        rows.append([version, s(plain), s(ours), spread(ours / plain)])
        what = f"whole `fit` of MobileNetV2, {n} replicas, from the first step, {version}"
        page.aim(what, ours / plain, 1.6)
    page.put("short fit", table(["Keras", "without", "with SWA", "ratio"], rows))


def every_step(page: Page) -> None:
    """An update in every step."""
    cases = {"the demo's": 40} if page.quick else {"the demo's": 40, "ResNet-50 at 64x64": 12}
    ways: list[tuple[str, list[str], Job]] = [
        *(
            (name, [UPDATE, STEPS, STEPS_EMA, EMA], {"legacy": legacy})
            for name, legacy in KERAS_VERSIONS.items()
        ),
        ("TF 2.15", [ADDONS], {"python": isolated.ADDONS}),
    ]
    rows = []
    for network, steps in cases.items():
        for version, contenders, environment in ways:
            # The machine may be busy beside.
            job = JOBS[network] | {"epochs": 2, "steps": steps, "rounds": 3, "clock": "cpu"}
            job |= environment
            try:
                fits = isolated.call(training.fits, [PLAIN, *contenders], **job)
            except isolated.FailedError as error:
                rows.append([network, version, contenders[0], str(error), "", "", ""])
                continue
            times = {
                what: np.array([t for fit in fits[what] for t in fit["times"][1][1:-1]])
                for what in fits
            }
            plain = times.pop(PLAIN)
            for what, seconds in times.items():
                more = np.quantile(seconds / np.median(plain) - 1, [0.5, 0.25, 0.75])
                shown = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*more)
                whole = [fit["total"] for fit in fits[what]]
                rows.append([network, version, what, ms(plain), ms(seconds), shown, s(whole)])
            if EMA in times:
                ratio = times[STEPS_EMA] / np.median(times[EMA])
                page.aim(f"step of {network}, {version}: {STEPS_EMA} / {EMA}", ratio, 1.03)
    header = ["network", "environment", "average", "step without", "step with", "more", "whole fit"]
    page.put("every step", table(header, rows))


def versions(page: Page) -> list[tuple[str, bool]]:
    """Return the Keras versions: in a quick run the first. `hooks` has the other."""
    return list(KERAS_VERSIONS.items())[: 1 if page.quick else None]


def time_steps(network: list[Any], replicas: int, groups: list[list[str]]) -> dict[str, Any]:
    """Return the seconds of averaging steps, under tf_keras, as arrays."""
    found = isolated.call(averaging.steps, network, replicas, groups, legacy=True)
    return {name: np.array(seconds) for name, seconds in found.items()}


def fit_one(what: str, **job: Any) -> training.Fit:
    """Return the `fit` of one contender in a process of its own."""
    (fit,) = isolated.call(training.fits, [what], **job)[what]
    return dict(fit)


def fit_ours(**job: Any) -> dict[str, Any]:
    """Return what is told of a `fit` with SWA in a process of its own."""
    return training.parts(fit_one(OURS, **job))


if __name__ == "__main__":
    main()
