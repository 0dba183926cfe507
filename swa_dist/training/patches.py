"""Patches of a model: attributes replaced for a while, and hooks before it trains or is written."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from swa_dist.protocols import Model

Patch = tuple[Any, str, Any]
_MISSING = object()


@contextlib.contextmanager
def before_training(model: Model, undo: Callable[[], None]) -> Iterator[None]:
    """Have `undo` called when a model is about to train, while open; `undo` must close this.

    No hook is called when an exception ends a `fit`. But Keras 3 and tf_keras call
    `make_train_function` before anything else when a model is about to train.
    """
    with patched([_preceded(model, "make_train_function", undo)]):
        yield


@contextlib.contextmanager
def before_writing(
    model: Model, variables: Iterable[tf.Variable], undo: Callable[[], None]
) -> Iterator[None]:
    """Have `undo` called when variables of a model are about to be written; it must close this.

    Args:
        model: The model.
        variables: The variables.
        undo: What is to be done before they are written.
    """

    def write(variable: tf.Variable, assign: Callable[[], Any]) -> Any:
        # `undo` must not become part of a graph that is being traced. In replica context it
        # cannot be called.
        if tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy():
            with tf.init_scope():
                undo()
        return assign()

    # tf_keras restores a checkpoint past `assign`.
    loading = [_preceded(model, name, undo) for name in ("set_weights", "load_weights")]
    with patched([*loading, *writing(variables, write)]):
        yield


def writing(
    variables: Iterable[tf.Variable], write: Callable[[tf.Variable, Callable[[], Any]], Any]
) -> list[Patch]:
    """Return patches under which each assignment to a variable becomes `write(variable, assign)`.

    Args:
        variables: TensorFlow variables.
        write: Called with a variable, and a function that makes the assignment.
    """

    def patch(variable: tf.Variable, name: str) -> Patch:
        assign = getattr(variable, name)

        @tf.autograph.experimental.do_not_convert
        def instead(*args: Any, **kwargs: Any) -> Any:
            return write(variable, functools.partial(assign, *args, **kwargs))

        return variable, name, instead

    names = ("assign", "assign_add", "assign_sub")
    return [patch(variable, name) for variable in variables for name in names]


def _preceded(model: Model, name: str, undo: Callable[[], None]) -> Patch:
    def method(*args: Any, **kwargs: Any) -> Any:
        undo()
        return getattr(model, name)(*args, **kwargs)

    return model, name, method


@contextlib.contextmanager
def patched(patches: Iterable[Patch]) -> Iterator[None]:
    """Patch attributes of objects while open.

    Args:
        patches: (object, name, value) for each attribute. The value hides what the object's class
            defines, and Keras does not track it.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, name, value in patches:
            attributes: dict[str, Any] = owner.__dict__  # past Keras's __setattr__, which tracks
            before.append((attributes, name, attributes.get(name, _MISSING)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is _MISSING:
                attributes.pop(name, None)
            else:
                attributes[name] = value
