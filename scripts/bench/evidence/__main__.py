"""Measure whether SWA makes models better: ./scripts/evidence [--quick] [--output FOLDER]."""

import functools
import hashlib
import os
from dataclasses import asdict
from importlib.metadata import version

import numpy as np

from scripts.bench import report
from scripts.bench.evidence import findings, picture
from scripts.bench.evidence.runs import Runs
from scripts.bench.evidence.settings import FULL, QUICK, Case, Json, Settings
from scripts.bench.isolated import ROOT

COMMAND = "./scripts/evidence"
PACKAGES = ("tensorflow", "tf_keras", "keras-swa")


def main() -> None:
    """Choose rates, compare, write down what comes out."""
    # keras-swa runs on nothing else. The processes that train inherit it.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    options = report.arguments(
        "Compare SGD with SWA on real digits. It goes on where it was stopped: remove "
        "evidence.jsonl from the folder to measure everything anew.",
        COMMAND,
    )
    settings = QUICK if options.quick else FULL
    with Runs(options.output / "evidence.jsonl") as runs:
        tuned = choose_rates(runs, settings)
        asked = [
            ask(settings, "compare", case, seed, rate=choice.rate, shares=choice.shares)
            for case, choice in tuned.items()
            for seed in settings.seeds
        ]
        found = iter(runs.do(asked))
        results = {case: [next(found) for _ in settings.seeds] for case in tuned}
        runs.tidy()

    picture.draw(settings, results, options.output / "evidence.png")
    report.write(
        options.output,
        "evidence.md",
        *findings.page(settings, tuned, results),
        report.provenance(COMMAND, options.quick, *PACKAGES),
    )


def choose_rates(runs: Runs, settings: Settings) -> dict[Case, findings.Tuning]:
    """Try rates on seeds that are used for nothing else; first SGD's, then SWA's."""
    trials = [
        ask(settings, "tune_sgd", case, seed, rate=rate)
        for case in settings.cases
        for rate in settings.initial_rates
        for seed in settings.tuning_seeds
    ]
    shape = (len(settings.cases), len(settings.initial_rates), len(settings.tuning_seeds))
    losses = np.reshape([found["test"][0] for found in runs.do(trials)], shape).mean(axis=-1)
    losses = np.nan_to_num(losses, nan=np.inf)  # what diverges is no choice
    sgd = {
        case: dict(zip(settings.initial_rates, row.tolist(), strict=True))
        for case, row in zip(settings.cases, losses, strict=True)
    }
    best = {case: min(tried, key=tried.__getitem__) for case, tried in sgd.items()}

    trials = [
        ask(settings, "tune_swa", case, seed, rate=best[case], shares=settings.swa_shares)
        for case in settings.cases
        for seed in settings.tuning_seeds
    ]
    found = iter(runs.do(trials))
    tuned = {}
    for case in settings.cases:
        of_seeds = [next(found) for _ in settings.tuning_seeds]
        swa = {
            schedule: {
                share: float(np.mean([seed[schedule][i][0] for seed in of_seeds]))
                for i, share in enumerate(settings.swa_shares)
            }
            for schedule in of_seeds[0]
        }
        tuned[case] = findings.Tuning(sgd[case], swa)
    return tuned


def ask(settings: Settings, what: str, case: Case, seed: int, **more: object) -> Json:
    """Return what a run is to do: all that its results depend on."""
    return {
        "what": what,
        "case": asdict(case),
        "seed": seed,
        **more,
        "settings": settings.as_json(),
        "versions": {name: version(name) for name in PACKAGES} | {"swa_dist": _sources()},
    }


@functools.cache
def _sources() -> str:
    """Return a digest of the code that is measured: with another, all is measured anew."""
    files = sorted((ROOT / "swa_dist").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


if __name__ == "__main__":
    main()
