"""The text of errors about a run as a whole. Pure Python."""

from collections.abc import Sequence

from swa_dist.plan.messages import list_epochs


def no_room_for_a_snapshot(
    *,
    start_epoch: float,
    swa_freq: int,
    first_snapshot: int,
    first_epoch: int,
    epochs: int,
    ends_with_bn_pass: bool,
) -> str:
    """Say why no snapshot fits into a run."""
    begins = f" from epoch {first_epoch + 1}" if first_epoch else ""
    last = (
        f", of which the last, epoch {epochs}, recomputes the batch normalization statistics"
        if ends_with_bn_pass
        else ""
    )
    earlier = (
        " Snapshots of an earlier run are known only from a `backup_dir`." if first_epoch else ""
    )
    return (
        "`start_epoch` and `swa_freq` must leave room for at least one snapshot. Received: "
        f"start_epoch={start_epoch}, swa_freq={swa_freq}: the first snapshot is at the end of "
        f"epoch {first_snapshot}, but `fit` trains{begins} to epoch {epochs}{last}, so that epoch "
        f"{epochs - ends_with_bn_pass} is the last that could be averaged. Begin earlier or train "
        f"for more epochs.{earlier}"
    )


def no_checkpoint_of_missed_snapshots(epoch: int, missed: range, folder: str) -> str:
    """Refuse to resume a run at an epoch for which its folder has no average."""
    return (
        f"`backup_dir` must have the average as it was before epoch {epoch + 1}. Received: "
        f"{folder}. But snapshots were due in epoch {list_epochs(missed)}. Go on with "
        "the weights of the end of an epoch that is there, and with its number as `initial_epoch`; "
        "or leave `backup_dir` out, and the average will have later snapshots only."
    )


def no_average(first_snapshot: str, lost: bool) -> str:
    """Refuse `averaged_weights` without an average."""
    received = (
        "after weights were restored while the average was in the model: it is lost."
        if lost
        else f"before {first_snapshot}."
    )
    return (
        f"`averaged_weights` must be called after the first snapshot. Received: a call {received}"
    )


def weights_added(name: str, n_averaged: int, first_snapshot: int) -> str:
    """Refuse a weight that is not in the snapshots that were taken."""
    return (
        "`trainable` must not change from False to True, and no weights may be added, once SWA has "
        f"taken a snapshot. Received: the weight {name!r}, which is not in the {n_averaged} "
        f"snapshots. Change it before epoch {first_snapshot}, or between two calls of `fit`."
    )


def too_few_steps(start_epoch: float, snapshot_freq: int, steps: int, epochs: Sequence[int]) -> str:
    """Say why no snapshot by steps fits into a run."""
    return (
        "`snapshot_freq` must leave room for at least one snapshot. Received: start_epoch="
        f"{start_epoch}, snapshot_freq={snapshot_freq}, but `fit` trains {steps} steps from epoch "
        f"{epochs[0] + 1} to {epochs[-1] + 1}. Begin earlier, train for more epochs, or take "
        "snapshots more often."
    )


def not_built() -> str:
    """Refuse a model whose steps are to be averaged, and that is not built."""
    return (
        "`model` must be built before the epoch in which `snapshot_freq` steps are counted first. "
        "Received: a model with layers that are not. Call it on a batch, or its `build` with an "
        "input shape, before `fit`; or begin with a later `start_epoch`."
    )
