"""Where a run starts: from the beginning, or where it was interrupted."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from swa_dist.averaging.snapshots import Snapshots
from swa_dist.plan import errors, messages
from swa_dist.plan.plan import Plan
from swa_dist.plan.progress import Progress
from swa_dist.resume.saved_run import SavedRun


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        plan: The run's plan, with what an earlier part of the run had learned.
        progress: How far that had come.
        initial_rates: Learning rates before its first epoch, by the optimizers' names; empty if
            there was no earlier part.
        snapshot_due: Whether the model has weights that are still to enter the average: it was
            saved at the end of the last epoch, and the run interrupted before the average was.
        missed: Epochs, counted from 0, whose snapshots were due and are not in the average.
        is_resumed: Whether there was an earlier part.
    """

    plan: Plan
    progress: Progress = field(default_factory=Progress)
    initial_rates: Mapping[str, float | None] = field(default_factory=dict)
    snapshot_due: bool = False
    missed: range = range(0)
    is_resumed: bool = False


def find_start(epoch: int, plan: Plan, snapshots: Snapshots, saved: SavedRun | None) -> Start:
    """Find where a run starts, and restore the average that was saved.

    Args:
        epoch: The first epoch, counted from 0; `plan.epochs` if none is left to train.
        plan: The run's plan, as far as it is known.
        snapshots: Get the average that was saved.
        saved: The run's folder, if it has one.

    Returns:
        Where it starts.

    Raises:
        ValueError: The checkpoint is of a run with another configuration, or there is none for
            snapshots that were due.
    """
    resumed = saved.resume(epoch, plan, snapshots.average) if saved else None
    if not saved or not resumed:
        start = Start(plan, missed=plan.snapshot_epochs(0, epoch))
    else:
        progress = resumed.progress
        missed = resumed.plan.snapshot_epochs(
            resumed.completed_epochs, min(epoch, progress.stopped or epoch)
        )
        due = (
            list(missed[:2]) == [epoch - 1]
            and plan.snapshot_steps is None  # else it had snapshots that are lost
            and saved.is_at_end_of_epoch(epoch, resumed.completed_epochs)
        )
        start = Start(
            *(resumed.plan, progress, resumed.initial_rates, due),
            missed=missed[:0] if due else missed,
            is_resumed=True,
        )
    if saved and start.missed and epoch < start.plan.epochs:
        raise ValueError(errors.no_checkpoint_of_missed_snapshots(epoch, start.missed, str(saved)))
    return start


def warnings_of(
    start: Start, epoch: int, validate_average: bool, initial_rate: float | None
) -> list[str]:
    """Return what to warn of when a run starts later than with its first epoch.

    Args:
        start: Where it starts.
        epoch: Its first epoch, counted from 0.
        validate_average: See `SWA`.
        initial_rate: The learning rate that is taken for the initial one; None if it is known to
            be that.
    """
    warnings = []
    if start.missed:
        warnings.append(messages.missed_snapshots(epoch, start.missed, validate_average))
    is_unsure = epoch > 0 and not start.is_resumed
    if is_unsure and initial_rate and start.plan.needs_initial_learning_rate(epoch):
        warnings.append(messages.unknown_initial_rate(epoch, initial_rate))
    return warnings
