"""How far a run has come. Pure Python."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run has come, beside the average itself.

    Attributes:
        n_averaged: Snapshots in the average.
        steps: Training steps that were counted for snapshots by steps.
        not_finite: Snapshots that were due and left out.
        stopped: Completed epochs when training was stopped early; 0: it was not.
        batch_size: Samples in the largest global batch; None before the first epoch has ended.
        final_statistics: Fingerprint of the BN statistics that the BN pass has ended with; None
            before.
    """

    n_averaged: int = 0
    not_finite: int = 0
    stopped: int = 0
    batch_size: int | None = None
    final_statistics: str | None = None
    steps: int = 0
