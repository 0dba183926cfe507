"""Train functions of a model that run its own training step in changed surroundings."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Shadow = tuple[Any, str, Any]


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
        self._shadows = list(shadows)
        with contextlib.ExitStack() as stack:
            for name in ("train_function", "train_tf_function"):
                if name in vars(model):
                    stack.callback(vars(model).__setitem__, name, vars(model)[name])
            stack.enter_context(shadowed(self._shadows))
            # Not force=True: a user's own make_train_function need not have it.
            vars(model)["train_function"] = None
            self._function: Callable = model.make_train_function() or model.train_function

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step on the iterator's next batches."""
        with shadowed(self._shadows):
            return self._function(iterator)


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
