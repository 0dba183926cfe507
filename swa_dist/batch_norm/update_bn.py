"""`update_bn`: recompute the BN statistics of a model in one pass over data."""

import warnings
from typing import Any

from swa_dist.batch_norm.forward_pass import ForwardPass
from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import check_eager, check_strategy
from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning
from swa_dist.protocols import Model


def update_bn(
    model: Model,
    data: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    verbose: int = 0,
) -> int:
    """Recompute the statistics of a model's batch normalization layers from data.

    Weights that were averaged, loaded or edited need statistics of their own. The model sees each
    batch once, forward only, in training mode, on all replicas of its strategy. Then each trainable
    BN layer has, on every replica, the mean and the population variance (divisor n) of all
    positions that reached it, however they were distributed over batches and replicas:

        mean = sum(x) / n,    variance = sum((x - mean)^2) / n

    The input of a BN layer behind another one is normalized with the batch's moments, and so
    depends on the size of the batches, as in training.

    Frozen layers, layers called with `training=False` and layers that no position reached keep
    their statistics. Optimizer and metrics do not change, and neither do weights. What a forward
    pass itself writes does: random seeds, other layers' own state, the kernel of a layer under
    `SpectralNormalization`. On an exception, or Ctrl-C, the statistics are restored bitwise.

    Args:
        model: A built model of Keras 3 or tf_keras, compiled or not.
        data: What `fit` takes as `x`: arrays, in a list or dict if the model has several inputs, a
            `tf.data.Dataset`, a distributed dataset, a `PyDataset` or `Sequence`, a generator, or
            another iterable of batches, such as a `DataLoader` of PyTorch. A tuple of arrays, and a
            batch that is a tuple or list, is `(x,)`, `(x, y)` or `(x, y, sample_weight)`, of which
            `x` is used. In a batch, several inputs are a tuple, list or dict in place of `x`. Items
            of a `PyDataset` are taken in order, without its workers.
        batch_size: Samples in a global batch of arrays, an integer >= 1; 32 by default, as in
            `fit`. Other data has batches of its own.
        steps: The largest number of batches to take, an integer >= 1; None: all there are.
        verbose: 1 shows Keras's progress bar, 0 nothing.

    Returns:
        The number of samples that the model saw, over all replicas. 0 if it has no trainable BN
        layer: then the data is not read.

    Raises:
        RuntimeError: Eager execution was disabled.
        TypeError: `model` or `data` is of another type.
        ValueError: An argument is out of range; `batch_size` was given with data that has batches;
            the data has no samples, or no end and `steps` is None; a tuple or list has another
            length than above; the model is not built, or its strategy's replicas have no statistics
            of their own.

    Distribution:
        In cross-replica context, on every worker. `tf.data.Dataset` and arrays are sharded over
        workers as in `fit`; of anything else, each worker has its own data. It communicates
        only at the end, if the model's layers do not.

    Example:
        >>> model.load_weights("averaged.weights.h5")
        >>> update_bn(model, x_train, batch_size=256, verbose=1)
        60000

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
        section 3.2, https://arxiv.org/abs/1803.05407; `torch.optim.swa_utils.update_bn`.
    """
    check_eager()
    keras_api = KerasAPI.of(model)
    if verbose not in (0, 1):
        raise ValueError(f"`verbose` must be 0 or 1. Received: verbose={verbose!r}.")
    if not model.built:
        raise ValueError(
            "`model` must be built: it has no batch normalization statistics yet. Received: "
            f"{model.name!r}. Call it on a batch, or its `build` with an input shape."
        )
    layers = keras_api.trainable_batch_norm(model)
    if not layers:
        return 0
    variables = [variable for layer in layers for variable in layer.variables]
    check_strategy(model.distribute_strategy, variables)
    forward_pass = ForwardPass(model, keras_api)
    total = forward_pass.run(data, batch_size, steps, verbose)
    if forward_pass.unobserved:
        message = messages.unobserved_layers(forward_pass.unobserved, averaged=False)
        warnings.warn(message, SWAWarning, stacklevel=2)
    return total
