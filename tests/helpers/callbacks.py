"""Callbacks that record, and callbacks that act."""

import numpy as np
import tensorflow as tf

from tests.helpers.data import positions


def recorder(kit):
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


def tap(kit):
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


def at(kit, epoch, action, hook="on_epoch_end"):
    """A callback that acts on the model in one hook of one epoch, counted from 1."""

    class At(kit.keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            self.epoch = number + 1
            if hook == "on_epoch_begin":
                self.act()

        def act(self, *args, **kwargs):
            if self.epoch == epoch:
                action(self.model)

    if hook != "on_epoch_begin":
        setattr(At, hook, At.act)
    return At()


def stop(model):
    model.stop_training = True
