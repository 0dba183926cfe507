"""Learning rates as pure functions of where training stands.

Epochs and batches count from 1 here, as in the paper.
"""


def annealed(epoch: int, start_epoch: int, initial_rate: float, swa_lr: float) -> float:
    """Return the rate of an epoch on the way from the initial rate to the SWA rate.

    With t = (epoch - 1) / (start_epoch - 1), the share of the way that is behind us, the rate is
    `initial_rate` up to t = 0.5, falls linearly to `swa_lr` at t = 0.9, and stays there.

    Args:
        epoch: Epoch, counted from 1.
        start_epoch: Epoch in which averaging begins, counted from 1.
        initial_rate: Rate that the optimizer had before training.
        swa_lr: Rate while averaging.

    Returns:
        The learning rate of every batch of that epoch.

    Reference:
        Izmailov et al., arXiv 1803.05407, section 5.1 and the schedule of its experiments.
    """
    t = (epoch - 1) / (start_epoch - 1) if epoch < start_epoch else 1.0
    if t <= 0.5:
        return initial_rate
    if t < 0.9:
        return initial_rate + (swa_lr - initial_rate) * (t - 0.5) / 0.4
    return swa_lr


def cyclic(batch: int, cycle_length: int, swa_lr: float, swa_lr2: float) -> float:
    """Return the rate of one batch of a cycle that falls linearly from `swa_lr2` to `swa_lr`.

    Batch i of c has t(i) = i / c and rate (1 - t) * swa_lr2 + t * swa_lr: the last batch of a
    cycle, right before the snapshot, has exactly `swa_lr`.

    Args:
        batch: Batch i within the cycle, from 1 to `cycle_length`. A batch past the end of the
            cycle (an epoch that was longer than expected) has the last one's rate.
        cycle_length: Batches c in a cycle.
        swa_lr: Rate at the end of the cycle.
        swa_lr2: Rate at its beginning.

    Returns:
        The learning rate of that batch.

    Reference:
        Izmailov et al., arXiv 1803.05407, section 3.1.
    """
    t = min(batch / cycle_length, 1.0)
    return (1 - t) * swa_lr2 + t * swa_lr
