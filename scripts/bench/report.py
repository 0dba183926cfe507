"""What a measurement hands to its readers: tables, spreads, and how to make them again."""

import argparse
import datetime
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
QUICK = Path(tempfile.gettempdir()) / "swa_dist-quick"


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles that say how far single measurements lie around it."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Sum up repeated measurements of one quantity."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high), len(values))

    def show(self, unit: str = "", scale: float = 1.0) -> str:
        """Return `median [lower quartile, upper quartile] unit`, in multiples of `scale`."""
        median, low, high = (digits(v / scale) for v in (self.median, self.low, self.high))
        return f"{median} [{low}, {high}] {unit}".rstrip()


def digits(value: float) -> str:
    """Return a number to three digits and decimals at most, without an exponent if possible."""
    if not np.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    decimals = 2 - int(np.floor(np.log10(abs(value)))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


class Page:
    """What was found so far: paragraphs, and which targets were met.

    Args:
        options: What `arguments` has read.
        name: Name of the file.
        introduction: The paragraphs at its beginning, the title first.
    """

    def __init__(self, options: argparse.Namespace, name: str, *introduction: str) -> None:
        self.quick: bool = options.quick
        self.output: Path = options.output
        self._name = name
        self._introduction = introduction
        self._targets: list[list[str]] = []
        self._paragraphs: list[str] = []

    def add(self, *paragraphs: str) -> None:
        """Add paragraphs or tables."""
        self._paragraphs += paragraphs

    def aim(self, what: str, found: float, at_most: float, cause: str) -> None:
        """State a target, whether it was met, and if not, why."""
        missed = "missed, at these sizes" if self.quick else f"missed: {cause}"
        outcome = "met" if found <= at_most else missed
        self._targets.append([what, digits(at_most), digits(found), outcome])

    def write(self) -> None:
        """Write down what there is."""
        targets = table(["target", "at most", "found", ""], self._targets)
        write(
            self.output, self._name, *self._introduction, "## Targets", targets, *self._paragraphs
        )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in row] for row in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def arguments(description: str, command: str) -> argparse.Namespace:
    """Read `--quick` and `--output`, the options that all measurements have.

    What is made quickly says little: it goes to a temporary folder unless told otherwise.
    """
    parser = argparse.ArgumentParser(prog=command, description=description)
    parser.add_argument(
        "--quick", action="store_true", help="run every line of code, at sizes that say little"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder (default: {RESULTS.parent.name}/{RESULTS.name}; "
        "with --quick a temporary one)",
    )
    options = parser.parse_args()
    if options.output is None:
        options.output = QUICK if options.quick else RESULTS
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def provenance(command: str, quick: bool, *packages: str) -> str:
    """Return the sentence that says what made a page: command, date, machine and versions.

    Args:
        command: What to type.
        quick: Whether it was made with `--quick`.
        packages: Names of the packages whose versions matter.
    """
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    made = (
        f"Made by `{command}{' --quick' if quick else ''}` on {datetime.date.today()}, on "
        f"{os.cpu_count()} cores of {_processor()}, {platform.system()}, with Python "
        f"{platform.python_version()}, {versions}."
    )
    if quick:
        made += " **A quick run: it shows that all of it works. Its numbers say little.**"
    return made


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def write(folder: Path, name: str, *paragraphs: str) -> None:
    """Write a page of paragraphs and tables, and say where it is."""
    path = folder / name
    path.write_text("\n\n".join(paragraph.strip("\n") for paragraph in paragraphs) + "\n")
    print(f"Wrote {path}.", flush=True)
