"""Draw the learning rates and snapshots of SWA's schedules, from its plan: no TensorFlow.

    python scripts/plot_schedules.py
    python scripts/plot_schedules.py --epochs 30 --start-epoch 21 --swa-freq 2

It needs matplotlib (`pip install matplotlib`). It prints each schedule's plan, too.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from swa_dist import Plan

RATE, PASS, SNAPSHOT = "#1f4e79", "#d9d9d9", "#c0392b"


def parse() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--start-epoch", type=int, default=40)
    parser.add_argument("--swa-freq", type=int, default=5, help="length of a cycle in epochs")
    parser.add_argument("--steps", type=int, default=20, help="batches in an epoch")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="before training")
    parser.add_argument("--swa-lr", type=float, default=0.01)
    parser.add_argument("--swa-lr2", type=float, default=0.05)
    default = Path(__file__).parent / "results" / "lr_schedules.png"
    parser.add_argument("--output", type=Path, default=default)
    return parser.parse_args()


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """Return the plan of each schedule."""
    rates: dict[str, dict[str, Any]] = {
        "manual": {},
        "constant": {"swa_lr": options.swa_lr},
        "cyclic": {
            "swa_lr": options.swa_lr,
            "swa_lr2": options.swa_lr2,
            "swa_freq": options.swa_freq,
        },
    }
    return {
        schedule: Plan(
            options.epochs,
            options.start_epoch,
            schedule,
            **arguments,
            steps_per_epoch=options.steps,
            initial_learning_rate=options.learning_rate,
        )
        for schedule, arguments in rates.items()
    }


def draw(axes: Axes, schedule: str, plan: Plan, initial_rate: float) -> None:
    """Draw one schedule: the rate of every batch, the snapshots, and the BN pass."""
    steps = plan.steps_per_epoch or 1
    batches = [(e, b) for e in range(plan.epochs) for b in range(steps)]
    yours = schedule == "manual"
    rates = [initial_rate if (r := plan.learning_rate(*at)) is None else r for at in batches]
    x = [epoch + (batch + 1) / steps for epoch, batch in batches]
    label = "learning rate" + (": yours, whatever it is" if yours else "")
    axes.plot(x, rates, color=RATE, linestyle="--" if yours else "-", label=label)

    ends = [e for e in range(plan.epochs) if plan.is_snapshot(e)]
    at_ends = [rates[(e + 1) * steps - 1] for e in ends]
    axes.plot(
        [e + 1 for e in ends], at_ends, "o", color=SNAPSHOT, markersize=4,
        label=f"snapshot ({len(ends)})",
    )  # fmt: skip
    axes.axvspan(plan.epochs - 1, plan.epochs, color=PASS, label="BN pass of the average")
    axes.set_title(f"lr_schedule={schedule!r}", loc="left", fontsize=10)
    axes.set_xlim(0, plan.epochs)
    axes.set_ylim(-0.03 * initial_rate, 1.1 * initial_rate)
    axes.set_ylabel("learning rate")
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Print and draw the three schedules."""
    options = parse()
    figure, rows = plt.subplots(3, 1, figsize=(7, 7.5), sharex=True, layout="constrained")
    for axes, (schedule, plan) in zip(rows, plans(options).items(), strict=True):
        print(f"lr_schedule={schedule!r}\n{plan}\n")
        draw(axes, schedule, plan, options.learning_rate)
    rows[-1].set_xlabel("epochs that are over")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)
    print(f"Drawn: {options.output}")


if __name__ == "__main__":
    main()
