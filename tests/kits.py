"""The two Kerases under test, and what tests need of either in the same words."""

import functools
import inspect
from dataclasses import dataclass
from types import ModuleType

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import swa_dist.keras
import swa_dist.tfkeras


@dataclass(frozen=True)
class Kit:
    name: str
    keras: ModuleType
    SWA: type

    def tensor(self, variable):
        return variable.value if self.keras is keras else variable

    def array(self, variable):
        """The value that replica 0 has, which is what Keras reads, saves and serves."""
        return self.replicas(variable)[0]

    def replicas(self, variable):
        """The value that each replica has."""
        variable = self.tensor(variable)
        local = tf.distribute.get_strategy().experimental_local_results(variable)
        if hasattr(variable, "values"):
            local = variable.values
        return [np.array(v.numpy(), copy=True) for v in local]

    def trainable(self, model):
        return [self.array(v) for v in model.trainable_variables]

    def statistics(self, layer):
        return [self.array(layer.moving_mean), self.array(layer.moving_variance)]

    def optimizer_state(self, optimizer):
        """Everything that an optimizer keeps, but for the learning rate."""
        variables = optimizer.variables
        if callable(variables):
            variables = variables()
        rate = getattr(optimizer, "_learning_rate", None)
        return [self.array(v) for v in variables if v is not rate]

    def rate(self, model):
        if type(model.optimizer).__name__ == "MultiOptimizer":  # which has none of its own
            return float("nan")
        return float(tf.convert_to_tensor(model.optimizer.learning_rate).numpy())

    def updates(self, optimizer):
        """How often an optimizer has updated weights."""
        return int(tf.convert_to_tensor(optimizer.iterations))

    @property
    def has_renorm(self):
        """Whether its BatchNormalization knows `renorm`, as Keras 3 does from 3.13 on."""
        classes = self.keras.layers.BatchNormalization.__mro__
        return any("renorm" in inspect.signature(cls.__init__).parameters for cls in classes)

    def fragile(self):
        """A layer that passes its inputs on while a variable is true, and fails when it is not."""
        healthy = tf.Variable(True, trainable=False)

        class Fragile(self.keras.layers.Layer):
            def call(self, inputs):
                with tf.control_dependencies([tf.debugging.assert_equal(healthy, True)]):
                    return tf.identity(inputs)

        return Fragile(), healthy

    @functools.cached_property
    def Recorder(self):  # noqa: N802
        return _recorder(self)

    @functools.cached_property
    def Tap(self):  # noqa: N802
        return _tap(self)

    def assert_replicas_agree(self, model):
        for variable in model.weights:
            first, *others = self.replicas(variable)
            for other in others:
                np.testing.assert_array_equal(first, other, err_msg=variable.name)


KITS = [
    Kit("keras3", keras, swa_dist.keras.SWA),
    Kit("tf_keras", tf_keras, swa_dist.tfkeras.SWA),
]


def _recorder(kit):
    class Recorder(kit.keras.callbacks.Callback):
        """Records weights and rates as training goes by."""

        def on_train_begin(self, logs=None):
            self.weights, self.rates, self.batch_rates, self.states = [], [], [], []

        def on_epoch_begin(self, epoch, logs=None):
            self.batch_rates.append([])
            self.is_last, self.trained = epoch + 1 == self.params["epochs"], None

        def on_train_batch_end(self, batch, logs=None):
            self.batch_rates[-1].append(kit.rate(self.model))
            if self.is_last:
                self.trained = kit.trainable(self.model)

        def on_epoch_end(self, epoch, logs=None):
            # By the end of the last epoch the model may have the average already.
            self.weights.append(self.trained if self.is_last else kit.trainable(self.model))
            self.rates.append(kit.rate(self.model))
            self.states.append(kit.optimizer_state(self.model.optimizer))

        def mean(self, *epochs):
            """The float64 mean of the weights at the ends of epochs, counted from 1."""
            chosen = [self.weights[e - 1] for e in epochs]
            return [
                np.mean([w.astype(np.result_type(w, np.float64)) for w in ws], 0)
                for ws in zip(*chosen, strict=True)
            ]

    return Recorder


def _tap(kit):
    class Tap(kit.keras.layers.Layer):
        """Passes its inputs on, and keeps what reached it in training while `on`."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.on = False
            self.seen = []

        def _keep(self, inputs):
            if self.on:
                self.seen.append(np.array(inputs))

        def call(self, inputs, training=None):
            if training:
                tf.numpy_function(self._keep, [tf.cast(inputs, tf.float32)], [], stateful=True)
            return inputs

        def compute_output_shape(self, input_shape):
            return input_shape

        def positions(self, axis=-1):
            """All positions seen, in float64: an array (positions, channels)."""
            return np.concatenate([positions(batch, axis) for batch in self.seen])

    return Tap


def batched(*arrays, size=8):
    """Arrays as a dataset of batches.

    For models that are trained or evaluated under a strategy a second time. Keras 3 then drops an
    iterator as soon as it has given a batch, and TensorFlow 2.21 may crash if the iterator's thread
    is still at work, which takes long where Keras has made the dataset of arrays.
    """
    return tf.data.Dataset.from_tensor_slices(arrays).batch(size)


def positions(batch, axis=-1):
    """An array as (positions, channels), in float64."""
    batch = np.moveaxis(np.asarray(batch, np.float64), axis, -1)
    return batch.reshape(-1, batch.shape[-1])
