"""The text of warnings, and of printed lines. Pure Python."""

from collections.abc import Sequence


class SWAWarning(UserWarning):
    """The class of every warning of swa_dist, by which they can be filtered."""


# The lines that keras-swa prints, word for word.

HAS_BATCH_NORM = (
    "Model uses batch normalization. SWA will require last epoch to be a forward pass and will "
    "run with no learning rate"
)
STARTING = "starting stochastic weight averaging"
FINAL = "final model weights set to stochastic weight average"
RESETTING_BATCH_NORM = "reinitializing batch normalization layers"
RUNNING_BN_PASS = "running forward pass to adjust batch normalization"

# Ours: large models seem to hang there.
TRACING_BN_PASS = "tracing the forward pass, which takes up to half as long as the first step did"


RUNNING_OVER_BN_DATA = "running forward pass over `bn_data` to recompute batch normalization"


def of_epoch(epoch: int, line: str) -> str:
    """Return a line about an epoch, counted from 0."""
    return f"Epoch {epoch + 1:05d}: {line}"


def resuming(n_averaged: int) -> str:
    """Say with which average a run is resumed."""
    return f"Resuming with the average of {n_averaged} snapshots"


def list_epochs(epochs: Sequence[int]) -> str:
    """Return epochs, counted from 0, as people count them; of many the first and the last."""
    if len(epochs) > 4:
        return f"{epochs[0] + 1}, {epochs[1] + 1}, ..., {epochs[-1] + 1}"
    return ", ".join(str(epoch + 1) for epoch in epochs)


def options_without_effect(lr_schedule: str, swa_lr: object, swa_lr2: object) -> list[str]:
    """Say which learning rates a schedule does not use."""
    unused = {"manual": ("swa_lr", "swa_lr2"), "constant": ("swa_lr2",), "cyclic": ()}
    needs = {"swa_lr": "'constant' or 'cyclic'", "swa_lr2": "'cyclic'"}
    given = {"swa_lr": swa_lr, "swa_lr2": swa_lr2}
    return [
        f"`{name}` has no effect with lr_schedule={lr_schedule!r}. Received: {name}="
        f"{given[name]!r}. Leave it out, or choose lr_schedule={needs[name]}."
        for name in unused[lr_schedule]
        if given[name] != "auto"
    ]


def missed_snapshots(epoch: int, missed: range, validate_average: bool) -> str:
    """Warn of a run that begins with an epoch, without the snapshots that were due before."""
    text = (
        f"Training begins with epoch {epoch + 1}: the snapshots of epoch {list_epochs(missed)} are "
        "not in the average. With `backup_dir`, from the first epoch on, they are kept for a run "
        "that is resumed."
    )
    if validate_average:
        text += (
            " With `validate_average`, a model that was saved at the end of one of these epochs, "
            "by BackupAndRestore or ModelCheckpoint say, was saved with the average in place of "
            "its trained weights: training then continues from the average. `backup_dir` keeps the "
            "trained weights, too."
        )
    return text


def unknown_initial_rate(epoch: int, rate: float) -> str:
    """Warn of a run that begins with an epoch, and plans from a rate that may not be the first."""
    return (
        f"Training begins with epoch {epoch + 1}: its learning rates are planned from the "
        f"optimizer's present rate, {rate:.4g}, as the initial one. If an earlier part of this run "
        "has lowered it, compile the model with the initial rate before `fit`. With `backup_dir`, "
        "from the first epoch on, it is kept for a run that is resumed."
    )


def batch_norm_too_late() -> str:
    """Warn of BN layers that begin to train when no epoch is left for a BN pass."""
    return (
        "Batch normalization layers began to train when no epoch was left for their statistics. "
        "The average will have the average of the snapshots' moving statistics, which are not "
        "those of the averaged weights. For exact ones, give SWA `bn_data`, call `update_bn(model, "
        "data)` after `fit`, or train for more epochs."
    )


def not_finite(epoch: int, n_averaged: int, weight: str, empty_replica: bool) -> str:
    """Warn of a snapshot that was left out."""
    cause = (
        "a batch had fewer samples than there are replicas, and training on none makes NaN; choose "
        "batches that reach every replica"
        if empty_replica
        else "training has diverged; lower the learning rate, or clip the gradients"
    )
    return (
        f"The weights at the end of epoch {epoch + 1} are not finite, and do not enter the "
        f"average, which has {n_averaged} snapshots. The first such weight is {weight!r}. Likely "
        f"cause: {cause}."
    )


def not_finite_steps(epoch: int, due: int, missing: int, n_averaged: int, weight: str) -> str:
    """Warn of snapshots by steps that were left out."""
    still = f"The first weight that is still not finite is {weight!r}. " if weight else ""
    return (
        f"Left out of the average: {missing} of {due} snapshots of epoch {epoch + 1}, of weights "
        f"that were not finite. The average has {n_averaged}. {still}Likely cause: training has "
        "diverged; lower the learning rate, or clip the gradients."
    )


def bn_data_without_effect() -> str:
    """Warn of `bn_data` for a model without BN layers."""
    return (
        "`bn_data` has no effect: the model has no batch normalization layers that train. Leave it "
        "out."
    )


def other_batch_size(given: int, fed: int | None) -> str:
    """Warn of a batch size that is not the one that training is fed."""
    return (
        f"`batch_size`={given} was given to SWA, but training feeds global batches of {fed}. SWA "
        "goes by what it is fed; leave `batch_size` out."
    )


def epoch_continues(epoch: int) -> str:
    """Warn of a batch after an epoch's snapshot was taken."""
    return (
        f"Epoch {epoch + 1} continues after its end: its data has grown, or a callback has "
        "evaluated the model with SWA among the callbacks. The epoch's snapshot was taken before."
    )


def stop_withdrawn(epoch: int) -> str:
    """Warn of an epoch that begins after a stop that was withdrawn."""
    return (
        f"Training continues with epoch {epoch + 1} from the average: `stop_training` was set when "
        "SWA gave it to the model, and a callback after SWA has withdrawn it. Put that callback "
        "before SWA."
    )


def average_lost(n_averaged: int) -> str:
    """Warn of an average that was overwritten in the model."""
    return (
        f"The average of {n_averaged} snapshots is lost: weights were restored, and trained, while "
        "the model carried the average for validation. Later snapshots begin a new one. Restore "
        "weights with the model's `load_weights` or `set_weights`, which SWA notices."
    )


def not_saved(epoch: int, error: Exception) -> str:
    """Warn of a checkpoint that could not be written."""
    end = f"The average at the end of epoch {epoch + 1}"
    return f"{end} was not saved, and training continues: {error}"


def no_snapshot(finished_epoch: int | None, first_snapshot: str, not_finite: bool) -> str:
    """Warn of a run that has ended without an average.

    Args:
        finished_epoch: The last epoch, counted from 0; None: there was none.
        first_snapshot: When the first snapshot was to be taken.
        not_finite: Whether snapshots were due and left out.
    """
    if not_finite:
        why = "no snapshot was finite."
    else:
        why = (
            f"training ended {_end(finished_epoch)}, and SWA would have taken its first snapshot "
            f"at {first_snapshot}."
        )
    return f"The model keeps the weights that it has: {why}"


def no_bn_pass(finished_epoch: int | None, n_averaged: int, began: bool) -> str:
    """Warn of averaged BN statistics.

    Args:
        finished_epoch: The last epoch, counted from 0; None: there was none.
        n_averaged: Snapshots in the average.
        began: Whether there was a BN pass, though not to its end.
    """
    if began:
        why = "there was no data in the BN pass, or the model was trained in the midst of it"
        remedy = "let `fit` have data for one more epoch after the last snapshot"
    else:
        why = (
            f"training ended {_end(finished_epoch)}, and the BN pass would have been the epoch "
            "after. Either a callback that stands after SWA in the list set `stop_training`, or "
            "the data ran out"
        )
        remedy = (
            "put such a callback before SWA, let `fit` have data for every epoch, or give SWA "
            "`bn_data`"
        )
    return (
        f"The batch normalization statistics were not recomputed: {why}. SWA leaves the average of "
        f"{n_averaged} snapshots in the model, and of their moving statistics, which are not those "
        f"of the averaged weights, unless later callbacks restore others. For exact ones: {remedy}."
    )


def moved_weights() -> str:
    """Warn of a training step that moves weights in the BN pass."""
    return (
        "The training step changes weights by other means than the optimizers that SWA finds, as "
        "sharpness-aware minimization and adversarial perturbations of weights do. It did so in "
        "the BN pass, too: the batch normalization statistics are partly those of other weights "
        "than the average. For exact ones, give SWA `bn_data`, or call `update_bn(model, data)` "
        "after `fit`."
    )


def unobserved_layers(names: Sequence[str], averaged: bool) -> str:
    """Warn of BN layers whose inputs could not be observed.

    Args:
        names: The layers.
        averaged: Whether they have the average of the snapshots' statistics meanwhile.
    """
    listed = ", ".join(map(repr, names))
    meanwhile = (
        " Until then they hold the average of the snapshots' moving statistics." if averaged else ""
    )
    return (
        "The statistics of some batch normalization layers were not recomputed: "
        f"{listed}. They run in a `tf.function` of your own, which was traced before. Take that "
        f"`tf.function` away: Keras compiles the whole step.{meanwhile}"
    )


def several_workers(jobs: object) -> str:
    """Warn of workers with which Keras 3 cannot train."""
    return (
        "Keras 3 cannot train with several workers (seen with 3.15.1: `fit` under "
        "MultiWorkerMirroredStrategy fails before its first batch), and TF_CONFIG names several. "
        f"Received: {jobs}. Use tf_keras, and `from swa_dist.tfkeras import SWA`."
    )


def earlier_run_overwritten(folder: str, saved: int, epoch: int) -> str:
    """Warn of the checkpoints of another run, which this one overwrites."""
    return (
        f"`backup_dir`, {folder!r}, has the average of an earlier run, as it was after epoch "
        f"{saved}. This run begins with epoch {epoch + 1}, and overwrites it."
    )


def damaged_checkpoint(path: str, reason: str) -> str:
    """Warn of a checkpoint that cannot be read."""
    return f"A checkpoint in `backup_dir` cannot be used: {path!r} is damaged ({reason})."


def _end(epoch: int | None) -> str:
    return "before its first epoch" if epoch is None else f"with epoch {epoch + 1}"
