"""Train functions of a model that run its own training step in changed surroundings."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Shadow = tuple[Any, str, Any]

# The second is tf_keras's, which shows it to TensorBoard.
_NAMES = ("train_function", "train_tf_function")


class TrainFunction:
    """A train function of `model` that runs while some attributes are shadowed.

    It is built by the model's own `make_train_function` and takes and returns what that one's
    does. The shadows are in place only while it is built and while it runs, tracing included: with
    each return, and each exception, all is as it was. They lie outside `strategy.run`, whose
    replicas are threads that would interleave.

    Args:
        model: A compiled Keras model. It keeps the train function that it has.
        shadows: (object, name, value) for each attribute that is to be another one. A value
            shadows what the object's class defines, and is not tracked by Keras.
    """

    def __init__(self, model: Any, shadows: Sequence[Shadow]) -> None:
        self._model = model
        self._shadows = list(shadows)
        before = _train_functions(model)
        try:
            with shadowed(self._shadows):
                # Not force=True: a user's own make_train_function need not have it.
                vars(model)["train_function"] = None
                self._function: Callable = model.make_train_function() or model.train_function
            self._installed = {**_train_functions(model), "train_function": self}
        finally:
            vars(model).update(before)
        self._replaced: dict[str, Any] = {}

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step on the iterator's next batches."""
        with shadowed(self._shadows):
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
def shadowed(shadows: Sequence[Shadow]) -> Iterator[None]:
    """Shadow attributes of objects, and own ones of classes, and uncover them on leaving."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in shadows:
            if isinstance(owner, type):
                stack.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, value)
                continue
            attributes: dict[str, Any] = owner.__dict__  # past Keras's __setattr__, which tracks
            if name in attributes:
                stack.callback(attributes.__setitem__, name, attributes[name])
            else:
                stack.callback(attributes.pop, name)
            attributes[name] = value
        yield
