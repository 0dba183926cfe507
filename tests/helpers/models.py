"""A small model, with BN or without."""

import numpy as np

from tests.helpers.data import SCALE, SHIFT
from tests.helpers.devices import NO_STRATEGY

RATE = 0.05


def build(kit, strategy=NO_STRATEGY, norm=True, optimizer=None, **compile_arguments):
    """A model for `data`, of the same weights each time, compiled with SGD with momentum.

    Args:
        optimizer: Makes another optimizer, within the scope.
        compile_arguments: What `compile` gets besides.
    """
    kit.keras.utils.set_random_seed(7)
    layers = kit.keras.layers
    with strategy.scope():
        # Without BN, inputs of that size would saturate the units, and train nothing.
        scale = layers.Normalization(mean=SHIFT, variance=SCALE**2)
        first = layers.BatchNormalization() if norm else scale
        model = kit.keras.Sequential(
            [layers.Input((3,)), first, layers.Dense(1, activation="tanh")]
        )
        given = optimizer() if optimizer else kit.keras.optimizers.SGD(RATE, momentum=0.9)
        model.compile(given, "mse", **{"jit_compile": False, **compile_arguments})
        if not optimizer:
            build_optimizer(model)
    return model


def build_optimizer(model):
    """Build it where `fit` would do so in its first step, which is then traced a second time."""
    model.optimizer.build(model.trainable_variables)


def norm_of(model):
    """Its first BN layer."""
    return next(layer for layer in model.layers if hasattr(layer, "moving_mean"))


def poison(model):
    """Give it a weight that is not a number."""
    weight = model.trainable_variables[-1]
    weight.assign(np.full(weight.shape, np.nan))
