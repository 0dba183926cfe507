"""How each peer is used, as its own documentation says.

Each needs what it was made for: keras-swa tf_keras as `tf.keras` (`TF_USE_LEGACY_KERAS=1`),
tensorflow-addons TensorFlow 2.15. So nothing is imported before it is asked for.
"""

import warnings
from collections.abc import Iterable
from typing import Any


def keras_swa_callback(
    start_epoch: int, lr_schedule: str = "manual", swa_lr: float | str = "auto", **arguments: Any
) -> Any:
    """Return keras-swa 0.1.7's callback.

    With BN layers it wants `batch_size`, and makes the last epoch its BN pass.
    """
    from swa.tfkeras import SWA

    return SWA(start_epoch, lr_schedule, swa_lr, **arguments)


def addons_optimizer(optimizer: Any, first: int, every: int) -> Any:
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


def finish_addons(model: Any, batches: Iterable[Any]) -> None:
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
