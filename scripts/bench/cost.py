"""What averaging costs: ours, the peers' and what the machine can do at best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench import averaging, isolated, memory, once, report, training
from scripts.bench.clock import Times
from scripts.bench.report import Page, Spread

COMMAND = "./scripts/benchmark"
KERAS_VERSIONS = {"Keras 3": False, "tf_keras": True}


def main() -> None:
    """Measure all, one process after the other, and write the page."""
    options = report.arguments("Measure what averaging costs.", COMMAND)
    packages = ("tensorflow", "keras", "tf_keras", "keras-swa", "numpy")
    page = Page(
        options,
        "cost.md",
        "# Cost, ours and the peers'",
        report.provenance(COMMAND, options.quick, *packages),
        "Times are medians, with quartiles in brackets, of contenders that took turns in one "
        "process; ratios are formed turn by turn. Everything is float32 on CPUs, which the virtual "
        "replicas share.",
    )
    # What takes long comes last: a run that is stopped has the rest.
    sections = (
        *(one_step, growth, swap, hooks, bn_pass, done_once, peak_memory, whole_fit),
        *(short_fit, every_step),
    )
    for section in sections:
        print(f"{section.__doc__} ...", flush=True)
        section(page)
        page.write()


def one_step(page: Page) -> None:
    """One averaging step on ResNet-50's weights."""
    rows: list[list[str]] = []
    parts: Times = {}
    for n in (1, 4) if page.quick else (1, 2, 4):
        found = isolated.call(averaging.on_resnet50, n, page.quick, replicas=4, legacy=True)
        times, parts = found["seconds"], found["parts"] or parts
        ours, later, theirs = (
            times[c] for c in (averaging.OURS, averaging.OURS_LATER, averaging.KERAS_SWA)
        )
        faster = ratio(theirs, ours)
        row = [str(n), ms(ours), ms(later), ms(theirs), faster.show(), "", ""]
        if n == 1:
            limit = times[averaging.LIMIT]
            above = ratio(ours, limit)
            row[-2:] = [ms(limit), above.show()]
            above_later = ratio(later, limit)
            looking, adding = (ms(parts[p]) for p in (averaging.LOOK, averaging.ADD))
            why = (
                "an update looks whether all weights are finite before it adds any, and so reads "
                f"them twice (looking {looking}, adding {adding}, each by itself)"
            )
            page.aim("averaging step, 1 replica: ours / keras-swa", 1 / faster.median, 1 / 4, why)
            page.aim(
                "averaging step, 1 replica: ours / in-place addition of one flat tensor",
                above.median,
                1.4,
                why,
            )
            page.aim(
                "the same after hundreds of updates",
                above_later.median,
                1.4,
                why,
            )
        if n == 4:
            page.aim(
                "averaging step, 4 replicas: ours / keras-swa",
                1 / faster.median,
                1 / 2,
                "4 averages are written, not one, through the memory that one machine's cores "
                "share",
            )
        rows.append(row)
    header = ["replicas", "ours", "ours, after hundreds", "keras-swa"]
    header += ["keras-swa / ours", "limit", "ours / limit"]
    page.add(
        "## One averaging step",
        f"On {'' if page.quick else 'the '}{found['parameters'] / 1e6:.1f} M trainable weights "
        f"{'' if page.quick else 'of ResNet-50 '}in {found['variables']} variables, tf_keras: "
        "`WeightAverage.update()` and the hooks that keras-swa runs at an epoch's end. Ours "
        "writes one average on each replica, keras-swa one NumPy copy on the host, however many "
        "replicas there are. The limit is the in-place addition of one flat tensor of that size "
        "to another.",
        report.table(header, rows),
        "The parts of our step on 1 replica, each in a graph of its own:",
        report.table(
            ["calling a graph that does nothing", "looking whether all is finite", "adding"],
            [[ms(parts[p]) for p in (averaging.NOTHING, averaging.LOOK, averaging.ADD)]],
        ),
    )


def growth(page: Page) -> None:
    """Growth with parameters and variables."""
    million = 1_000_000
    if page.quick:
        sizes, fixed = [(n, 10) for n in (100_000, 300_000)], million // 10
        counts, rounds = [10, 100], 10
    else:
        sizes = [(n * million, 100) for n in (1, 3, 10, 30, 100)]
        fixed, counts, rounds = million, [10, 30, 100, 300, 1000], 15
    by_size, by_count = (
        isolated.call(averaging.grow, cases, rounds, replicas=1, legacy=True)
        for cases in (sizes, [(fixed, n) for n in counts])
    )
    path = page.output / "growth.png"
    draw_growth(path, sizes, by_size, counts, by_count, fixed)
    names = (averaging.OURS, averaging.KERAS_SWA, averaging.LIMIT)
    overhead = {
        name: np.polyfit(counts, [np.median(times[name]) for times in by_count], 1)[0]
        for name in names[:2]
    }
    rows = []
    cases = [*sizes, *((fixed, k) for k in counts)]
    for (n, k), times in zip(cases, [*by_size, *by_count], strict=True):
        each = ms(np.array(times[averaging.OURS]) / (n / 1e6))
        rows.append([f"{n / 1e6:g} M", str(k), *(ms(times[c]) for c in names), each])
    page.add(
        "## Growth",
        "One averaging step on equal variables, 1 replica:",
        report.table(
            ["parameters", "variables", *names, "ours, per million parameters"],
            rows,
        ),
        f"A variable more costs {overhead[averaging.OURS] * 1e6:.1f} µs, in keras-swa "
        f"{overhead[averaging.KERAS_SWA] * 1e6:.1f} µs (least squares over the number of "
        "variables).",
        f"![Time of one averaging step over parameters and variables]({path.name})",
    )


def bn_pass(page: Page) -> None:
    """The BN pass beside a training epoch."""
    cases = [("demo", "the demo's", 1, 60, 3), ("demo", "the demo's", 4, 60, 3)]
    cases += [("resnet50", "ResNet-50 at 64x64", 1, 16, 1)]
    versions = KERAS_VERSIONS
    if page.quick:  # each Keras once, here and in `hooks`
        cases, versions = [("demo", "the demo's", 4, 12, 1)], {"Keras 3": False}
    rows = []
    for network, called, replicas, steps, fits in cases:
        for version, legacy in versions.items():
            times = [
                isolated.call(
                    training.bn_pass, network, replicas, steps, replicas=replicas, legacy=legacy
                )
                for _ in range(fits)
            ]
            steady = [t for fit in times for t in fit["pass"][:-1]]
            share = Spread.of(
                [t / np.median(fit["training"]) for fit in times for t in fit["pass"][:-1]]
            )
            end = np.median([fit["pass"][-1] for fit in times])
            pooling = f"{(end - np.median(steady)) * 1e3:.0f} ms"
            steps_of = ms([t for fit in times for t in fit["training"]]), ms(steady)
            rows.append([called, version, str(replicas), *steps_of, share.show(), pooling])
            page.aim(
                f"step of the BN pass / training step, {called}, {version}, {replicas} replicas",
                share.median,
                0.5,
                "the statistics of what each BN layer is fed come on top of a forward pass, and in "
                "a network this small the fixed cost of operations shows",
            )
    header = ["network", "Keras", "replicas", "training step", "step of the BN pass", "ratio"]
    page.add(
        "## The BN pass",
        "Steps of two epochs of one `fit`, without the first, traced one; of the demo's network, "
        "three fits. What comes at the end, once, is the pooling.",
        report.table([*header, "at the end"], rows),
    )


def whole_fit(page: Page) -> None:
    """A whole fit with and without SWA."""
    rounds, epochs, steps = (1, 4, 8) if page.quick else (10, 12, 15)
    rows = []
    for network, called in (("demo", "the demo's"), ("no BN", "two convolutions, no BN")):
        for version, legacy in KERAS_VERSIONS.items():
            if page.quick and legacy == (network == "demo"):
                continue
            found = isolated.call(training.whole_fit, network, rounds, epochs, steps, legacy=legacy)
            plain, ours = found[training.PLAIN], found[training.OURS]
            rest, traced = np.array(ours) - found["hooks"], "none"
            if network == "demo":
                rest, traced = rest - found["trace"], s(found["trace"])
            without = ratio(rest, plain)
            fits = s(plain), s(ours), ratio(ours, plain).show()
            rows.append([called, version, *fits, traced, s(found["hooks"]), without.show()])
            page.aim(
                f"whole `fit` with SWA / without, but for what is done once, {called}, {version}",
                without.median,
                1.0,
                "no BN pass saves a backward pass here: what is left is the snapshots, and the "
                "trace of what is counted in the training step"
                if network != "demo"
                else "the saved backward passes of one epoch are less than the noise (see the "
                "quartiles)",
            )
    header = ["network", "Keras", "without", "with SWA", "ratio"]
    header += ["trace of the BN pass", "hooks, done once", "ratio but for these"]
    page.add(
        "## A whole `fit`",
        f"{epochs} epochs of {steps} batches, a new model each time, snapshots in the last "
        "quarter. Done once: the trace of the BN pass, and the longest call of each of SWA's "
        "hooks, which traces or makes what later calls use.",
        report.table(header, rows),
    )


def hooks(page: Page) -> None:
    """Steps before averaging begins."""
    sizes, versions = (8, 7, 300), KERAS_VERSIONS
    if page.quick:
        sizes, versions = (2, 5, 50), {"tf_keras": True}
    rows = []
    for version, legacy in versions.items():
        times = isolated.call(training.hooks, *sizes, legacy=legacy)
        empty, ours = times[training.EMPTY], times[training.OURS]
        spread = Spread.of(empty)
        excess = float(np.median(ours)) - spread.median
        rows.append([version, *(us(times[c]) for c in (training.PLAIN, training.EMPTY))])
        rows[-1] += [us(ours), f"{excess * 1e6:+.0f} µs"]
        page.aim(
            f"step before averaging: SWA beyond an empty callback, µs, {version}",
            excess * 1e6,
            30,
            "samples and batches are counted in the training step, a handful of scalar operations",
        )
    page.add(
        "## Steps before averaging begins",
        "A network of one layer and 9 weights, so that hooks are what there is to see; time per "
        "step, epoch by epoch.",
        report.table(["Keras", "no callback", "empty callback", "SWA", "SWA beyond empty"], rows),
    )


def done_once(page: Page) -> None:
    """What is done once in a fit of ResNet-50."""
    goals = {"hooks": 0.15, "pass": 0.8, "end": 0.05}
    called = {
        "hooks": "SWA's hooks, in all",
        "pass": "first step of the BN pass",
        "end": "end of the BN pass",
    }
    versions, rows = KERAS_VERSIONS, []
    if page.quick:
        versions = {"Keras 3": False}
    for version, legacy in versions.items():
        for n in (1,) if page.quick else (1, 2, 4):
            found = isolated.call(once.of_resnet50, n, replicas=n, legacy=legacy)
            shares = {part: found[part] / found["training"] for part in goals}
            seconds = {part: f"{report.digits(found[part])} s" for part in found}
            cells = [f"{seconds[part]}: {report.digits(shares[part])}" for part in goals]
            rows.append([version, str(n), seconds["training"], *cells])
            for part, goal in goals.items():
                page.aim(
                    f"{called[part]} / first training step, ResNet-50, {version}, {n} replicas",
                    shares[part],
                    goal,
                    "half of it are the buffers' variables and what a process does for the first "
                    "time",
                )
    page.add(
        "## What is done once",
        f"ResNet-50 at 32x32, {once.EPOCHS} epochs of {once.STEPS} steps, `SWA(2)`; CPU seconds, "
        "and the ratio to the first call of the training step, which is traced.",
        report.table(["Keras", "replicas", "first training step", *called.values()], rows),
    )


def short_fit(page: Page) -> None:
    """A short fit of MobileNetV2 with and without SWA."""
    replicas, epochs, steps, rounds = (1, 3, 2, 1) if page.quick else (2, 5, 8, 3)
    rows = []
    for version, legacy in KERAS_VERSIONS.items():
        fits: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for with_swa, seconds in fits.items():
                seconds.append(
                    isolated.call(
                        once.whole_fit,
                        *(replicas, epochs, steps, with_swa),
                        replicas=replicas,
                        legacy=legacy,
                    )
                )
        more = ratio(fits[True], fits[False])
        rows.append([version, s(fits[False]), s(fits[True]), more.show()])
        page.aim(
            f"whole `fit` of MobileNetV2, {replicas} replicas, from the first step, {version}",
            more.median,
            1.6,
            "the trace of the BN pass, and what is done once",
        )
    page.add(
        "## A short `fit` from its first step",
        f"MobileNetV2 at 64x64 on {replicas} replicas, {epochs} epochs of {steps} steps, `SWA(2)`; "
        "CPU seconds, each of a process of its own.",
        report.table(["Keras", "without", "with SWA", "ratio"], rows),
    )


def peak_memory(page: Page) -> None:
    """Peak of memory of a fit."""
    depth, times = (2, 1) if page.quick else (6, 5)
    weights = depth * memory.LAYER_BYTES
    rows = []
    for n in (1,) if page.quick else (1, 4):
        peaks = {
            what: [
                isolated.call(memory.peak_of_fit, what, n, depth, replicas=n, legacy=True)
                for _ in range(times)
            ]
            for what in (memory.PLAIN, memory.OURS, memory.KERAS_SWA)
        }
        plain = float(np.median(peaks[memory.PLAIN]))
        above = {
            what: [(peak - plain) / weights for peak in peaks[what]]
            for what in (memory.OURS, memory.KERAS_SWA)
        }
        noise = np.ptp(peaks[memory.PLAIN]) / 2 / weights
        rows.append([str(n), *map(_range, above.values()), f"± {noise:.2f}"])
        page.aim(
            f"peak memory above plain training, in weights' sizes per replica, on {n}",
            float(np.median(above[memory.OURS])) / n,
            1.1,
            "what is beyond the buffers is about one of the layers, as with keras-swa"
            if noise < 0.1 * n
            else "not to be told from the noise of the plain run",
        )
    page.add(
        "## Peak of memory",
        f"The process's peak in a `fit` of {depth} dense layers, {weights / 2**20:.0f} MiB of "
        "weights on each replica, above the peak without averaging, in multiples of one replica's "
        f"weights; median, least and most of {times}. tf_keras.",
        report.table(["replicas", "ours", "keras-swa", "noise of the plain run"], rows),
    )


def swap(page: Page) -> None:
    """Memory of a swap."""
    if page.quick:
        depth, width, cases = 4, 1024, [(1, "float32")]
    else:
        depth, width = 12, 1600
        cases = [(n, dtype) for dtype in ("float32", "bfloat16") for n in (1, 2, 4)]
    found = isolated.call(memory.swaps, cases, depth, width, replicas=4, legacy=True)
    columns = (memory.THERE, memory.BACK, memory.COPY)
    rows = [
        [dtype, str(n), *(report.digits(peaks[c]) for c in columns)]
        for (n, dtype), peaks in zip(cases, found, strict=True)
    ]
    page.aim(
        "peak memory of a swap above before, in layers per replica, at most",
        max(peaks[c] for peaks in found for c in columns[:2]),
        1.1,
        "several layers were under way at once",
    )
    page.add(
        "## Memory of a swap",
        "What `WeightAverage.swap()` takes at its peak on top of what the process has, in "
        f"multiples of one of the average's {depth} equal layers, for each replica; beside it, a "
        "copy of all. On the way back tensors only change hands.",
        report.table(["weights", "replicas", *columns], rows),
    )


def every_step(page: Page) -> None:
    """An update in every step."""
    cases = [("demo", "the demo's", 40)]
    if not page.quick:
        cases += [("resnet50", "ResNet-50 at 64x64", 12)]
    ways: Sequence[tuple[str, list[str], dict[str, Any]]] = [
        *(
            (f, [training.OURS, training.EMA], {"legacy": legacy})
            for f, legacy in KERAS_VERSIONS.items()
        ),
        ("TF 2.15", [training.ADDONS], {"python": isolated.ADDONS}),
    ]
    averages = {
        training.OURS: "`WeightAverage.update()`",
        training.EMA: "`use_ema`",
        training.ADDONS: "tensorflow-addons SWA",
    }
    rows = []
    for network, called, steps in cases:
        for environment, contenders, settings in ways:
            everyone = [training.PLAIN, *contenders]
            try:
                times = isolated.call(training.every_step, network, everyone, 2, steps, **settings)
            except isolated.FailedError as error:
                rows.append([called, environment, averages[contenders[0]], str(error), "", ""])
                continue
            plain = Spread.of(times[training.PLAIN])
            for c in contenders:
                above = Spread.of([t / plain.median - 1 for t in times[c]])
                more = f"{above.median:+.1%} [{above.low:+.1%}, {above.high:+.1%}]"
                steps_of = ms(times[training.PLAIN]), ms(times[c])
                rows.append([called, environment, averages[c], *steps_of, more])
    page.add(
        "## An update in every step",
        "SGD with momentum; no strategy.",
        report.table(
            ["network", "environment", "average", "step without", "step with", "more"], rows
        ),
    )


def draw_growth(
    path: Path,
    sizes: list[tuple[int, int]],
    by_size: list[Times],
    counts: list[int],
    by_count: list[Times],
    fixed: int,
) -> None:
    """Draw time over parameters, and over variables."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    looks = {
        averaging.KERAS_SWA: ("keras-swa", "#c0392b", "s", "-"),
        averaging.OURS: ("ours", "#1f4e79", "o", "-"),
        averaging.LIMIT: ("in-place addition of one flat tensor", "#7f7f7f", "", "--"),
    }
    for axes, xs, times in (
        (left, [n for n, _ in sizes], by_size),
        (right, counts, by_count),
    ):
        for name, (label, color, marker, line) in looks.items():
            spreads = [Spread.of(t[name]) for t in times]
            axes.plot(
                *(xs, [q.median * 1e3 for q in spreads]),
                color=color, marker=marker, linestyle=line, markersize=4, label=label,
            )  # fmt: skip
            low, high = ([getattr(q, end) * 1e3 for q in spreads] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for which in (axes.xaxis, axes.yaxis):
            which.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            which.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.set_xticks(xs)
        axes.minorticks_off()
        axes.set_ylabel("ms for one averaging step")
    left.set_xlabel("parameters, millions")
    left.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda n, _: f"{n / 1e6:g}"))
    left.set_title(f"{sizes[0][1]} variables", loc="left", fontsize=10)
    right.set_xlabel("variables")
    right.set_title(f"{fixed / 1e6:g} million parameters", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"Drew {path}.", flush=True)


def ratio(numerators: Any, denominators: Any) -> Spread:
    """Return the ratio of two contenders, turn by turn."""
    return Spread.of(list(np.asarray(numerators) / np.asarray(denominators)))


def ms(seconds: Any) -> str:
    """Return milliseconds."""
    return Spread.of(seconds).show("ms", 1e-3)


def us(seconds: Any) -> str:
    """Return microseconds."""
    return Spread.of(seconds).show("µs", 1e-6)


def s(seconds: Any) -> str:
    """Return seconds."""
    return Spread.of(seconds).show("s")


def _range(values: list[float]) -> str:
    return f"{np.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
