"""Many trainings on all cores, of which each finished one is kept on disk."""

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from scripts.bench.evidence.settings import Case, Json


class Runs:
    """Does what was not done before, in one process per core.

    A process has one thread, so that its results are the same bit by bit wherever it runs on this
    machine, and whatever runs beside it.

    Args:
        path: The file with a line of JSON for every finished run: what was asked, what was found.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        self._asked: dict[str, None] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                run = json.loads(line)
                self._found[_key(run["asked"])] = run["found"]
        if text and not text.endswith("\n"):
            path.write_text(text + "\n")
        self._pool: Pool | None = None

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.terminate()

    def do(self, asked: Sequence[Json]) -> list[Any]:
        """Return what each run finds, in their order; see `training.do`."""
        self._asked.update(dict.fromkeys(map(_key, asked)))
        todo = [run for run in asked if _key(run) not in self._found]
        if todo and not self._pool:
            # What a process inherits when it is forked, TensorFlow does not survive.
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(os.cpu_count(), initializer=_use_one_thread)
        began = time.monotonic()
        finished = self._pool.imap_unordered(_do, todo) if self._pool else ()
        for done, (run, found) in enumerate(finished, 1):
            self._found[_key(run)] = found
            with self._path.open("a") as file:
                file.write(_line(run, found))
            minutes = (time.monotonic() - began) / 60
            print(
                f"{run['what']}, {done} of {len(todo)}: {Case(**run['case']).name}, seed "
                f"{run['seed']}. {minutes:.1f} minutes, about "
                f"{minutes / done * (len(todo) - done):.1f} to go.",
                flush=True,
            )
        return [self._found[_key(run)] for run in asked]

    def tidy(self) -> None:
        """Leave in the file what was asked for, in that order, and nothing else."""
        new = self._path.with_suffix(".new")
        new.write_text("".join(_line(json.loads(key), self._found[key]) for key in self._asked))
        new.replace(self._path)


def _line(asked: Json, found: Any) -> str:
    return json.dumps({"asked": asked, "found": found}) + "\n"


def _key(asked: Json) -> str:
    return json.dumps(asked, sort_keys=True)


def _use_one_thread() -> None:
    from scripts.bench.evidence import training

    training.use_one_thread()


def _do(run: Json) -> tuple[Json, Any]:
    from scripts.bench.evidence import training

    return run, training.do(run)
