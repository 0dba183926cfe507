"""Recompute the BN statistics of a model, in one pass over data."""

import warnings
from typing import Any

import tensorflow as tf

from swa_dist.batch_size import rows
from swa_dist.bn_pass import describe_unobserved, observing
from swa_dist.bn_statistics import BatchNormStatistics
from swa_dist.data import distributed_inputs
from swa_dist.flavour import Flavour
from swa_dist.replicas import (
    ReplicaFunction,
    check_eager,
    check_strategy,
    local_variable,
    read,
    sum_over_replicas,
)

# Parts of a count that float32 holds, and adds up over 4,096 replicas, exactly. Not every
# accelerator can add up integers.
_PART = 2**12


def update_bn(
    model: Any,
    data: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    verbose: int = 0,
) -> int:
    """Recompute the statistics of a model's batch normalization layers from data.

    Weights that were averaged, loaded or edited need statistics of their own. The model sees each
    batch once, forward only, in training mode, on all replicas of its strategy. Then each live BN
    layer has, on every replica, the mean and the population variance (divisor n) of all rows that
    reached it, however they were dealt out to batches and replicas:

        mean = sum(x) / n,    variance = sum((x - mean)^2) / n

    A BN layer behind another one is fed what that one normalizes with its batch's moments, and so
    depends on how large the batches are, as it does in training.

    Frozen layers, layers called with `training=False` and layers that no row reached keep their
    statistics. So do weights, optimizer and metrics. What a forward pass itself writes moves on:
    random seeds, other layers' own state. If anything fails, or is interrupted, the statistics are
    again what they were, bit by bit.

    Args:
        model: A built model of Keras 3 or tf_keras, compiled or not.
        data: What `fit` takes as `x`: arrays, in a list or dict if the model has several inputs, a
            `tf.data.Dataset`, a distributed dataset, a `PyDataset` or `Sequence`, a generator, or
            another iterable of batches, such as a `DataLoader` of PyTorch. A tuple of arrays, and a
            batch that is a tuple or list, is `(x,)`, `(x, y)` or `(x, y, sample_weight)`, of which
            `x` is used. In a batch, several inputs are a tuple, list or dict in place of `x`. Items
            of a `PyDataset` are taken in order, without its workers.
        batch_size: Rows in a global batch of arrays, an integer >= 1; 32 by default, as in `fit`.
            Other data has batches of its own.
        steps: The largest number of batches to take, an integer >= 1; None: all there are.
        verbose: 1 shows Keras's progress bar, 0 nothing.

    Returns:
        The number of rows (samples) that the model saw, over all replicas. 0 if it has no live BN
        layer: then nobody touches the data.

    Raises:
        TypeError: `model` or `data` is no such thing.
        ValueError: An argument is out of range; `batch_size` was given with data that has batches;
            the data has no rows, or no end and `steps` is None; a tuple or list has another length
            than above; the model is not built, or its strategy's replicas have no statistics of
            their own.

    Distribution:
        In cross-replica context, on every worker. `tf.data.Dataset` and arrays are sharded over
        workers as in `fit`; of anything else, each worker's data is its own share. It communicates
        once, at the end, if the model's layers do not.

    Example:
        >>> model.load_weights("averaged.weights.h5")
        >>> update_bn(model, x_train, batch_size=256, verbose=1)
        60000

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
        section 3.2, https://arxiv.org/abs/1803.05407; `torch.optim.swa_utils.update_bn`.
    """
    check_eager()
    flavour = Flavour.of(model)
    if verbose not in (0, 1):
        raise ValueError(f"`verbose` must be 0 or 1. Received: verbose={verbose!r}.")
    if not model.built:
        raise ValueError(
            "`model` must be built: it has no batch normalization statistics yet. Received: "
            f"{model.name!r}. Call it on a batch, or its `build` with an input shape."
        )
    layers = flavour.live_batch_norm(model)
    if not layers:
        return 0
    strategy = model.distribute_strategy
    check_strategy(strategy, [variable for layer in layers for variable in layer.variables])
    inputs, length = distributed_inputs(data, strategy, batch_size, steps)

    statistics = BatchNormStatistics(layers, strategy)
    count = _RowCount(strategy)
    shadows = flavour.untraced(model)

    def forward(x: Any) -> None:
        model(x, training=True)
        count.add(x)

    # With autograph: tf_keras has a model's `call` converted only if this is.
    @tf.function(reduce_retracing=True)
    def step(x: Any) -> None:
        strategy.run(forward, args=(x,))

    progress = flavour.progress_bar(length, verbose)
    done = 0
    statistics.begin()
    try:
        for done, x in enumerate(inputs, 1):
            with observing(statistics, layers, shadows):
                # Called directly, the fifth pass of one batch would be taken for the fifth
                # retracing, and warned of.
                step.get_concrete_function(x)(x)
            progress.update(done)
        total = count.total
        if not total:
            raise ValueError(f"`data` must have rows. Received: {done} batches, without any row.")
        statistics.pool()
    except BaseException:
        statistics.restore()
        raise
    if done != length:  # where nobody knew, it does not know that it is finished
        progress.update(done, finalize=True)
    if statistics.unobserved:
        warnings.warn(describe_unobserved(statistics.unobserved), stacklevel=2)
    return total


class _RowCount:
    """Counts rows on each replica, and adds them up over all when asked."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        with strategy.scope():
            self._own = local_variable(tf.zeros([], tf.int64))
            self._total = local_variable(tf.zeros([], tf.int64))
        self._add_up = ReplicaFunction(self._add_up_replica, strategy)

    def add(self, inputs: Any) -> None:
        self._own.assign_add(rows(inputs))

    @property
    def total(self) -> int:
        self._add_up()
        return read(self._total, self._strategy)

    def _add_up_replica(self) -> None:
        parts = [self._own // _PART, self._own % _PART]
        sums = sum_over_replicas([tf.cast(part, tf.float32) for part in parts])
        high, low = (tf.cast(part, tf.int64) for part in sums)
        self._total.assign(high * _PART + low)
