"""How tensorflow-addons' SWA is used, as its own documentation says: with TensorFlow 2.15."""

import warnings
from collections.abc import Iterable
from typing import Any


def average_weights(optimizer: Any, first: int, every: int) -> Any:
    """Return tensorflow-addons' SWA around one of `tf.keras.optimizers.legacy`.

    Args:
        optimizer: The optimizer that trains.
        first: Number of the training step, from 1, after which it takes its first snapshot.
        every: Steps from one snapshot to the next.
    """
    with warnings.catch_warnings():  # that it has come to the end of its life
        warnings.simplefilter("ignore")
        from tensorflow_addons.optimizers import SWA

    return SWA(optimizer, start_averaging=first - 1, average_period=every)


def finish(model: Any, batches: Iterable[Any]) -> None:
    """Do what its documentation advises at the end of training.

    `assign_average_vars`; then, "if your model has batch-normalization layers", "a forward pass
    over the data in training mode".

    Args:
        model: The trained model.
        batches: Inputs, batch by batch; of a distributed dataset under a strategy.
    """
    import tensorflow as tf

    with warnings.catch_warnings():  # that BN statistics have no average
        warnings.simplefilter("ignore")
        model.optimizer.assign_average_vars(model.variables)
    strategy = model.distribute_strategy

    @tf.function
    def forward(batch: Any) -> None:
        strategy.run(lambda inputs: model(inputs, training=True), args=(batch,))

    for batch in batches:
        forward(batch)
