"""The variables of a model that are averaged, and what must hold of it and its strategy."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from swa_dist.protocols import Model


def check_eager() -> None:
    """Refuse the graph mode of TensorFlow 1.

    Raises:
        RuntimeError: Eager execution was disabled.
    """
    if not tf.compat.v1.executing_eagerly_outside_functions():
        raise RuntimeError(
            "swa_dist needs eager execution, TensorFlow 2's default. Received: a program that has "
            "disabled it. Remove `tf.compat.v1.disable_eager_execution()` or "
            "`tf.compat.v1.disable_v2_behavior()`; `fit` compiles the training step all the same."
        )


def check_strategy(strategy: tf.distribute.Strategy, variables: Iterable[tf.Variable]) -> None:
    """Refuse a strategy under which each replica cannot average its own copy of these variables.

    Raises:
        ValueError: The replicas do not step together, or the variables are not the strategy's.
    """
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "SWA needs a strategy whose replicas step together. Received: "
            f"{type(strategy).__name__}, whose workers each train at their own pace, so that they "
            "never hold the weights of one snapshot together. Use MirroredStrategy, "
            "MultiWorkerMirroredStrategy or TPUStrategy."
        )
    if isinstance(strategy, tf.distribute.experimental.CentralStorageStrategy):
        raise ValueError(
            "SWA needs a strategy that gives each replica its own copy of the weights. Received: "
            f"{type(strategy).__name__}, which keeps one for all. Use MirroredStrategy."
        )
    for variable in variables:
        if not strategy.extended.variable_created_in_scope(variable):
            raise ValueError(
                "`model` must be created within the scope of the strategy that trains it. "
                f"Received: the weight {variable.name!r}, which was created outside the scope of "
                f"{type(strategy).__name__}. Build and compile the model under `with "
                "strategy.scope():`."
            )


def tensorflow_variable(variable: Any) -> tf.Variable:
    """Return the TensorFlow variable behind one of Keras 3; one of TensorFlow's as it is."""
    value = variable.value
    return variable if callable(value) else value


def last_restore(variable: Any) -> int:
    """Return a number that changes whenever a `tf.train.Checkpoint` restores the variable.

    Private for want of a public name. Checked with TensorFlow 2.16 and 2.21, Keras 3.10 and 3.15.
    """
    return getattr(variable, "_update_uid", -1)


def is_differentiable(variable: Any) -> bool:
    """Return whether a gradient can reach a variable, of either Keras: none reaches a counter."""
    dtype = tf.as_dtype(variable.dtype)
    return bool(dtype.is_floating or dtype.is_complex)


def trainable_variables(model: Model) -> list[tf.Variable]:
    """Return the TensorFlow variables that training a model changes, as far as it has any yet.

    See `is_differentiable`.
    """
    try:
        variables = model.trainable_variables
    except ValueError:  # tf_keras, of a Sequential that was never called
        return []
    return [tensorflow_variable(v) for v in variables if is_differentiable(v)]


def check_trainable_variables(model: Model) -> list[tf.Variable]:
    """Return the variables of `trainable_variables`, of which there must be some.

    Raises:
        ValueError: There are none, or one has no fixed shape.
    """
    variables = trainable_variables(model)
    if not variables:
        raise ValueError(
            "`model` must be built and have trainable weights before SWA can average them. "
            f"Received: the model {model.name!r}, built={model.built}, with none. Call it on a "
            "batch, or `build` it, before."
        )
    for variable in variables:
        if not variable.shape.is_fully_defined():
            raise ValueError(
                "`model` must have trainable weights of fixed shapes. Received: the weight "
                f"{variable.name!r} of shape {variable.shape}."
            )
    return variables
