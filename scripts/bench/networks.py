"""The networks that are measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = list[NDArray[Any]]

FILTERS = (16, 32)  # of the small network's convolutions, 3 by 3
EPSILON = 1e-3  # Keras's default


def mirrored(replicas: int) -> Any:
    """Return a strategy of that many virtual CPUs."""
    import tensorflow as tf

    # The default way to add up gradients fails on CPUs in some combinations.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def small(keras: Any) -> Any:
    """Return a network of two convolutions with BN, for digits of 8 by 8 pixels."""
    layers = keras.layers
    x = inputs = layers.Input((8, 8, 1))
    for filters in FILTERS:
        x = layers.Conv2D(filters, 3, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(epsilon=EPSILON)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def small_weights(seed: int) -> list[Arrays]:
    """Return initial weights of the small network, layer by layer."""
    rng = np.random.default_rng(seed)
    weights, channels = [], 1
    for filters in FILTERS:
        scale = np.sqrt(2 / (9 * channels))
        weights += [[scale * rng.normal(size=(3, 3, channels, filters))]]
        weights += [[np.ones(filters), np.zeros(filters), np.zeros(filters), np.ones(filters)]]
        channels = filters
    weights += [[rng.normal(size=(channels, 10)) / np.sqrt(channels), np.zeros(10)]]
    return [[array.astype("float32") for array in layer] for layer in weights]


def set_by_layer(model: Any, weights: Sequence[Arrays]) -> None:
    """Give a model weights, layer by layer."""
    layers = [layer for layer in model.layers if layer.weights]
    for layer, arrays in zip(layers, weights, strict=True):
        layer.set_weights(arrays)


def get_by_layer(model: Any) -> list[Arrays]:
    """Return copies of a model's weights, layer by layer."""
    layers = [layer for layer in model.layers if layer.weights]
    return [[np.array(array, copy=True) for array in layer.get_weights()] for layer in layers]


def small_statistics(weights: list[Arrays], shards: list[NDArray[Any]]) -> list[tuple[Any, Any]]:
    """Return what the small network's BN layers are fed, as mean and variance, by definition.

    Args:
        weights: Its weights, layer by layer.
        shards: What each replica gets of each batch. It normalizes them with their own moments.

    Returns:
        Float64 mean and population variance over all rows, for each BN layer.
    """
    seen: list[Arrays] = [[] for _ in FILTERS]
    for shard in shards:
        x = shard.astype("float64")
        for i in range(len(FILTERS)):
            (kernel,), (gamma, beta, *_) = weights[2 * i : 2 * i + 2]
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
            x = np.einsum("nhwcij,ijcf->nhwf", windows, kernel.astype("float64"))
            seen[i].append(x.reshape(-1, x.shape[-1]))
            normal = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + EPSILON)
            x = np.maximum(normal * gamma.astype("float64") + beta, 0)
    pooled = [np.concatenate(rows) for rows in seen]
    return [(rows.mean(0), rows.var(0)) for rows in pooled]


def equal_weights(keras: Any, parameters: int, variables: int) -> Any:
    """Return a model that holds so many parameters in so many variables, and does nothing."""

    class Weights(keras.layers.Layer):
        def build(self, input_shape: Any) -> None:
            for i in range(variables):
                self.add_weight(name=f"w{i}", shape=(parameters // variables,), initializer="ones")
            super().build(input_shape)

        def call(self, x: Any) -> Any:
            return x

    inputs = keras.layers.Input((1,))
    return keras.Model(inputs, Weights()(inputs))


def equal_layers(keras: Any, width: int, depth: int, dtype: str = "float32") -> Any:
    """Return a network of so many dense layers with width * width weights each."""
    return keras.Sequential(
        [keras.layers.Input((width,))]
        + [keras.layers.Dense(width, use_bias=False, dtype=dtype) for _ in range(depth)]
    )


def resnet50(keras: Any, pixels: int = 224) -> Any:
    """Return Keras's ResNet-50 with random weights: 25.6 M parameters, 53 BN layers."""
    return keras.applications.ResNet50(weights=None, input_shape=(pixels, pixels, 3))
