"""Variables and functions of which every replica has its own."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf


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
    """Refuse a strategy whose replicas cannot average these variables, each its own copy.

    Raises:
        ValueError: The replicas do not step together, or the variables are not the strategy's.
    """
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "SWA needs a strategy whose replicas step together. Received: "
            f"{type(strategy).__name__}, whose workers train each at its own pace, so that there "
            "is no moment at which all hold the weights of one snapshot. Use MirroredStrategy, "
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


def is_trained(variable: Any) -> bool:
    """Return whether a gradient can reach a variable, of either Keras: none reaches a counter."""
    dtype = tf.as_dtype(variable.dtype)
    return bool(dtype.is_floating or dtype.is_complex)


def trainable_variables(model: Any) -> list[tf.Variable]:
    """Return the TensorFlow variables that training a model changes, as far as it has any yet.

    See `is_trained`.
    """
    try:
        variables = model.trainable_variables
    except ValueError:  # tf_keras, of a Sequential that was never called
        return []
    return [tensorflow_variable(v) for v in variables if is_trained(v)]


def built_trainable_variables(model: Any) -> list[tf.Variable]:
    """Return the variables of `trainable_variables`.

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


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Return whether this worker is the one that writes files; the only worker is."""
    return bool(strategy.extended.should_checkpoint)


def local_variable(initial_value: tf.Tensor) -> tf.Variable:
    """Create a variable whose copy on each replica is written by that replica alone.

    Args:
        initial_value: Value on every replica, of any shape and dtype.

    Returns:
        A variable with aggregation NONE: assigning it inside `strategy.run` sends nothing.

    Distribution:
        Call it within the strategy's scope.
    """
    return tf.Variable(initial_value, trainable=False, aggregation=tf.VariableAggregation.NONE)


def read(variable: tf.Variable, strategy: tf.distribute.Strategy) -> int:
    """Return the value of a local scalar variable on this worker's first replica."""
    return int(strategy.experimental_local_results(variable)[0])


def sum_over_replicas(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """Sum each value over all replicas.

    Distribution:
        Call it in replica context, on every replica with as many values of the same shapes.
    """
    if not values:
        return []
    # Not `ReplicaContext.all_reduce`: for its gradient it keeps every graph it is in alive.
    return tf.distribute.get_replica_context().merge_call(_reduce, args=values)


def mean_over_replicas(
    values: list[tuple[tf.Tensor, tf.Tensor]], shares: list[tf.Tensor]
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Return each value's mean over all replicas, and this replica's deviation from it.

    Means are taken relative to one rounded mean, c: the differences need digits of their own.

    Args:
        values: Each an unevaluated sum high + low.
        shares: This replica's weight in the mean of each value; over all replicas they add up to 1.

    Distribution:
        As `sum_over_replicas`.
    """
    centers = sum_over_replicas(
        [share * high for share, (high, _) in zip(shares, values, strict=True)]
    )
    offsets = [(high - c) + low for (high, low), c in zip(values, centers, strict=True)]
    means = sum_over_replicas(
        [share * offset for share, offset in zip(shares, offsets, strict=True)]
    )
    return (
        [c + mean for c, mean in zip(centers, means, strict=True)],
        [offset - mean for offset, mean in zip(offsets, means, strict=True)],
    )


def _reduce(strategy: tf.distribute.Strategy, *values: Any) -> list[Any]:
    pairs = [(value, value) for value in values]
    return strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, pairs)


class Untracked:
    """Items that belong to the model, and so not into a `tf.train.Checkpoint` of ours."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = list(items)

    def __iter__(self) -> Iterator[Any]:
        """Go through the items."""
        return iter(self._items)


class ReplicaFunction:
    """A function without arguments that runs on every replica, traced once.

    It is one graph, made when it is first called. (A `tf.function` would do the same, but takes the
    fifth instance of a class for the fifth retracing and warns of it: in five-fold
    cross-validation, say.)

    Args:
        function: What each replica is to do.
        strategy: The `tf.distribute.Strategy` whose replicas do it.

    Distribution:
        Call it in cross-replica context, on every worker.
    """

    def __init__(self, function: Callable[[], None], strategy: tf.distribute.Strategy) -> None:
        self._function = tf.function(lambda: strategy.run(function), autograph=False)
        self._graph: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Run it."""
        if self._graph is None:
            self._graph = self._function.get_concrete_function()
        self._graph()
