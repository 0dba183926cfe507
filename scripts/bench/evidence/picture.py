"""Draw loss and error along the line from the SGD solution to the SWA solution."""

from pathlib import Path

import numpy as np

from scripts.bench.evidence.findings import Interval, Results
from scripts.bench.evidence.settings import Settings

CURVES = (("train_loss", "train loss"), ("test_loss", "test loss"), ("test_error", "test error, %"))
COLORS = {"train_loss": "#1f4e79", "test_loss": "#c0392b", "test_error": "#7d6608"}


def draw(settings: Settings, results: Results, path: Path) -> None:
    """Draw a column for each case: means over the seeds, and how sure the shape is.

    Seeds differ by more than the points of a line do. So the bands are those of the difference from
    the SGD solution, within the seeds: they have no width there.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        len(CURVES),
        len(results),
        figsize=(3 * len(results), 7),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column, (case, runs) in zip(grid.T, results.items(), strict=True):
        for axes, (curve, label) in zip(column, CURVES, strict=True):
            values = np.array([run["line"][curve] for run in runs])
            if curve.endswith("error"):
                values = 100 * values
            from_sgd = values - values[:, [settings.points.index(0.0)]]
            half = np.array([(i.high - i.low) / 2 for i in map(Interval.of, from_sgd.T)])
            mean = values.mean(axis=0)
            color = COLORS[curve]
            axes.plot(settings.points, mean, color=color)
            axes.fill_between(
                settings.points, mean - half, mean + half, color=color, alpha=0.2, lw=0
            )
            for t in (0, 1):
                axes.axvline(t, color="gray", lw=0.8, ls=":")
            axes.spines[["top", "right"]].set_visible(False)
            if axes is column[0]:
                axes.set_title(case.name.replace(", not", ",\nnot"), fontsize=10)
            if axes in grid[:, 0]:
                axes.set_ylabel(label)
        column[-1].set_xticks([0, 1], ["SGD", "SWA"])
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Drew {path}.", flush=True)
