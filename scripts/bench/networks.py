"""The networks that are measured, and the strategies under which they are."""

from typing import Any

from scripts import demo


def strategy(replicas: int) -> Any:
    """Return a strategy of that many virtual CPUs, or of the GPU if there is one; none for 0."""
    import tensorflow as tf

    if not replicas:
        return tf.distribute.get_strategy()
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    # The default way to add up gradients fails on CPUs in some combinations.
    return tf.distribute.MirroredStrategy(
        [f"{kind}:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def build(name: str, *sizes: Any) -> Any:
    """Return one of the networks below, or the demo's, of this process's Keras."""
    import tensorflow as tf

    functions = (application, demo.build_model, equal_layers, equal_weights, without_bn)
    return {function.__name__: function for function in functions}[name](tf.keras, *sizes)


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


def without_bn(keras: Any) -> Any:
    """Return two convolutions and a dense layer, for images of 28 x 28."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def plain(keras: Any, shape: tuple[int, int, int]) -> Any:
    """Return three convolutions and two dense layers, with BN as Keras makes it by default."""
    layers = keras.layers
    inputs = x = layers.Input(shape)
    for filters, strides in ((16, 2), (32, 1), (32, 2)):
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dense(64, use_bias=False)(layers.Flatten()(x))
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def application(keras: Any, name: str, pixels: int) -> Any:
    """Return one of Keras's networks with random weights.

    ResNet-50 has 25.6 M trainable weights in 214 variables, and 53 BN layers.
    """
    return getattr(keras.applications, name)(weights=None, input_shape=(pixels, pixels, 3))
