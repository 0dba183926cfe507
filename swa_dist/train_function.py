"""Train functions of a model that run its own training step in changed surroundings."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

Shadow = tuple[Any, str, Any]

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
    """Have `undo` called by whoever is about to train a model, while open; `undo` closes this.

    A `fit` that an exception has ended tells nobody. Both Kerases call `make_train_function` before
    anything else when a model is about to train.
    """

    def make_train_function(*args: Any, **kwargs: Any) -> Any:
        undo()
        return model.make_train_function(*args, **kwargs)

    with shadowed([(model, "make_train_function", make_train_function)]):
        yield


@contextlib.contextmanager
def shadowed(shadows: Iterable[Shadow]) -> Iterator[None]:
    """Shadow attributes of objects while open.

    Args:
        shadows: (object, name, value) for each attribute that is to be another one. A value
            shadows what the object's class defines, and is not tracked by Keras.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in shadows:
            attributes: dict[str, Any] = owner.__dict__  # past Keras's __setattr__, which tracks
            if name in attributes:
                stack.callback(attributes.__setitem__, name, attributes[name])
            else:
                stack.callback(attributes.pop, name)
            attributes[name] = value
        yield
