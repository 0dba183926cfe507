"""Train functions of a model that run its own training step in changed surroundings."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

Shadow = tuple[Any, str, Any]
_MISSING = object()

# The second is tf_keras's, which shows it to TensorBoard.
_NAMES = ("train_function", "train_tf_function")


class TrainFunction:
    """A train function of `model` that runs in changed surroundings.

    It is built by the model's own `make_train_function` and takes and returns what that one's
    does. The surroundings are changed only while it is built and while it runs, tracing included:
    with each return, and each exception, all is as it was. They are changed outside `strategy.run`,
    whose replicas are threads that would interleave.

    Args:
        model: A compiled Keras model. It keeps the train function that it has.
        surroundings: Returns a context manager that changes the surroundings while it is open.
    """

    def __init__(
        self, model: Any, surroundings: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._model = model
        self._surroundings = surroundings
        before = _train_functions(model)
        try:
            with surroundings():
                # Not force=True: a user's own make_train_function need not have it.
                vars(model)["train_function"] = None
                self._function: Callable = model.make_train_function() or model.train_function
            self._installed = {**_train_functions(model), "train_function": self}
        finally:
            vars(model).update(before)
        self._replaced: dict[str, Any] = {}

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step on the iterator's next batches."""
        with self._surroundings():
            return self._function(iterator)

    def __getattr__(self, name: str) -> Any:
        # What other callbacks ask a train function for, such as the graph that TensorBoard draws.
        if name == "_function":  # not there yet
            raise AttributeError(name)
        return getattr(self._function, name)

    def install(self) -> None:
        """Become what the model trains with."""
        self._replaced = _train_functions(self._model)
        vars(self._model).update(self._installed)

    def uninstall(self) -> None:
        """Give the model back what it trained with, unless it has got another one since."""
        if self._model.train_function is self:
            vars(self._model).update(self._replaced)


def _train_functions(model: Any) -> dict[str, Any]:
    return {name: vars(model)[name] for name in _NAMES if name in vars(model)}


@contextlib.contextmanager
def before_training(model: Any, undo: Callable[[], None]) -> Iterator[None]:
    """Have `undo` called when a model is about to train, while open; `undo` closes this.

    A `fit` that an exception has ended tells nobody. Both Kerases call `make_train_function` before
    anything else when a model is about to train.
    """
    with shadowed([_preceded(model, "make_train_function", undo)]):
        yield


@contextlib.contextmanager
def before_writing(
    model: Any, variables: Iterable[tf.Variable], undo: Callable[[], None]
) -> Iterator[None]:
    """Have `undo` called when a model's variables are about to be written; `undo` closes this.

    Args:
        model: The model.
        variables: Those of its variables of which it is.
        undo: What is to be done before.
    """

    def write(variable: tf.Variable, assign: Callable[[], Any]) -> Any:
        # A graph that is being traced is not to hold what is done once. In replica context it
        # cannot be done at all.
        if tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy():
            with tf.init_scope():
                undo()
        return assign()

    # tf_keras restores a checkpoint past `assign`.
    loading = [_preceded(model, name, undo) for name in ("set_weights", "load_weights")]
    with shadowed([*loading, *writing(variables, write)]):
        yield


def writing(
    variables: Iterable[tf.Variable], write: Callable[[tf.Variable, Callable[[], Any]], Any]
) -> list[Shadow]:
    """Return shadows under which `write(variable, assign)` is called in place of each `assign()`.

    Args:
        variables: TensorFlow variables.
        write: Called with a variable and what was to be done to it.
    """

    def shadow(variable: tf.Variable, name: str) -> Shadow:
        assign = getattr(variable, name)

        @tf.autograph.experimental.do_not_convert
        def instead(*args: Any, **kwargs: Any) -> Any:
            return write(variable, functools.partial(assign, *args, **kwargs))

        return variable, name, instead

    names = ("assign", "assign_add", "assign_sub")
    return [shadow(variable, name) for variable in variables for name in names]


def _preceded(model: Any, name: str, undo: Callable[[], None]) -> Shadow:
    def method(*args: Any, **kwargs: Any) -> Any:
        undo()
        return getattr(model, name)(*args, **kwargs)

    return model, name, method


@contextlib.contextmanager
def shadowed(shadows: Iterable[Shadow]) -> Iterator[None]:
    """Shadow attributes of objects while open.

    Args:
        shadows: (object, name, value) for each attribute that is to be another one. A value
            shadows what the object's class defines, and is not tracked by Keras.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, name, value in shadows:
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
