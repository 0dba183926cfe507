"""What is asked of a model and of an optimizer, of Keras 3 or tf_keras."""

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf


class Model(Protocol):
    """A Keras model, as far as it is used."""

    name: str
    built: bool
    stop_training: bool
    train_function: Callable[..., Any]
    train_step: Callable[..., Any]
    make_train_function: Callable[..., Any]

    @property
    def variables(self) -> list[Any]:
        """Variables, of Keras 3 or TensorFlow."""

    @property
    def trainable_variables(self) -> list[Any]:
        """Those that training changes."""

    @property
    def distribute_strategy(self) -> tf.distribute.Strategy:
        """The strategy under which the model was created."""

    def __call__(self, inputs: Any, training: bool | None = None) -> Any:
        """Run a forward pass."""


class Optimizer(Protocol):
    """A Keras optimizer, as far as it is used."""

    learning_rate: Any

    @property
    def iterations(self) -> tf.Variable:
        """The number of steps that it has made."""
