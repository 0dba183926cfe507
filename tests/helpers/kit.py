"""Keras 3 and tf_keras, and what tests need of either in the same words."""

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
from tests.helpers.callbacks import recorder, tap


@dataclass(frozen=True)
class Kit:
    name: str
    keras: ModuleType
    SWA: type

    def clear_session(self):
        """Forget names and graphs; `settings.collect_garbage` frees their memory."""
        keep = {"free_memory": False} if self.keras is keras else {}
        self.keras.backend.clear_session(**keep)

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
        return recorder(self)

    @functools.cached_property
    def Tap(self):  # noqa: N802
        return tap(self)

    def assert_replicas_agree(self, model):
        for variable in model.weights:
            first, *others = self.replicas(variable)
            for other in others:
                np.testing.assert_array_equal(first, other, err_msg=variable.name)


KITS = [
    Kit("keras3", keras, swa_dist.keras.SWA),
    Kit("tf_keras", tf_keras, swa_dist.tfkeras.SWA),
]
