"""Pages of results: their text is written by hand, their tables are measured."""

import argparse
import datetime
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
QUICK = Path(tempfile.gettempdir()) / "swa_dist-quick"
PACKAGES = ("tensorflow", "keras", "tf_keras", "keras-swa", "numpy")


class Page:
    """A page of which some blocks are measured: between `<!-- NAME -->` and `<!-- end -->`.

    All else in the file is kept. Reads the options `--quick` and `--output`.

    Args:
        name: Name of the file.
        command: What to type for it.
        note: What else the block "made" says.
    """

    def __init__(self, name: str, command: str, note: str = "") -> None:
        parser = argparse.ArgumentParser(prog=command, description=f"Measure {name} anew.")
        parser.add_argument(
            "--quick", action="store_true", help="run every line of code, at sizes that say little"
        )
        where = f"folder (default: scripts/results; with --quick {QUICK})"
        parser.add_argument("--output", type=Path, help=where)
        options = parser.parse_args()
        self.quick: bool = options.quick
        self.output: Path = (options.output or (QUICK if self.quick else RESULTS)).resolve()
        self._path = self.output / name
        if self.output != RESULTS:
            self.output.mkdir(parents=True, exist_ok=True)
            shutil.copy(RESULTS / name, self._path)
        self._targets: list[list[str]] = []
        self.put("made", f"{provenance(command, self.quick)} {note}".strip())

    def measure(self, *sections: Callable[["Page"], None]) -> None:
        """Measure one section after the other; what there is after each is in the file."""
        for section in sections:
            print(f"{section.__doc__} ...", flush=True)
            section(self)
        print(f"Wrote {self._path}.", flush=True)

    def put(self, block: str, *paragraphs: str) -> None:
        """Replace a block."""
        put(self._path, block, *paragraphs)

    def aim(self, what: str, found: Any, at_most: float) -> None:
        """State a target, and whether the median of what was found meets it."""
        median = float(np.median(found))
        outcome = "met" if median <= at_most else "missed"
        self._targets.append([what, digits(at_most), digits(median), outcome])
        self.put("targets", table(["target", "at most", "found", ""], self._targets))


def put(path: Path, block: str, *paragraphs: str) -> None:
    """Replace a block of a page."""
    text, new = path.read_text(), "\n\n".join(p.strip("\n") for p in paragraphs)
    lines = rf"^<!-- {block} -->\n.*?^<!-- end -->$"
    parts = re.split(lines, text, flags=re.MULTILINE | re.DOTALL)
    if len(parts) != 2:
        raise ValueError(f"{path} must have one block `<!-- {block} -->`.")
    path.write_text(f"<!-- {block} -->\n\n{new}\n\n<!-- end -->".join(parts))


def spread(values: Any, unit: str = "", scale: float = 1.0) -> str:
    """Return `median [lower quartile, upper quartile] unit`, in multiples of `scale`."""
    low, median, high = (digits(v / scale) for v in np.quantile(values, [0.25, 0.5, 0.75]))
    return f"{median} [{low}, {high}] {unit}".rstrip()


ms = partial(spread, unit="ms", scale=1e-3)
us = partial(spread, unit="µs", scale=1e-6)
s = partial(spread, unit="s")


def digits(value: float) -> str:
    """Return a number to three digits and decimals at most, without an exponent if possible."""
    if not np.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    decimals = 2 - int(np.floor(np.log10(abs(value)))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in row] for row in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def provenance(command: str, quick: bool = False, packages: Sequence[str] = PACKAGES) -> str:
    """Return the sentence that says what made a page: command, date, machine and versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    made = (
        f"Made by `{command}{' --quick' if quick else ''}` on {datetime.date.today()}, on "
        f"{os.cpu_count()} cores of {[*names, platform.machine()][0]}, {platform.system()}, with "
        f"Python {platform.python_version()}, {versions}."
    )
    if quick:
        made += " **A quick run, at other sizes than the text says: its numbers say little.**"
    return made
