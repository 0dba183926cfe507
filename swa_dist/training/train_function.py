"""Train functions that run a model's own training step under patches."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from swa_dist.protocols import Model

# The second is tf_keras's, for TensorBoard.
_NAMES = ("train_function", "train_tf_function")


class TrainFunction:
    """A train function of a model that runs under patches.

    The model's own `make_train_function` builds it. The patches are open only while it is built and
    while it runs, tracing included, as `fit` has no `finally` that could undo them. They are opened
    outside `strategy.run`, whose replicas are threads that would interleave.

    Args:
        model: A compiled Keras model. It keeps the train function that it has.
        open_patches: Returns a context manager under which the training step is to run.
    """

    def __init__(
        self, model: Model, open_patches: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._model = model
        self._open_patches = open_patches
        before = _train_functions(model)
        try:
            with open_patches():
                # Not force=True: a user's own make_train_function need not have it.
                vars(model)["train_function"] = None
                self._function: Callable = model.make_train_function() or model.train_function
            self._installed = {**_train_functions(model), "train_function": self}
        finally:
            vars(model).update(before)
        self._replaced: dict[str, Any] = {}

    def __call__(self, iterator: Any) -> Any:
        """Run one execution of the training step on the iterator's next batches."""
        with self._open_patches():
            return self._function(iterator)

    def __getattr__(self, name: str) -> Any:
        # Other callbacks use a train function's attributes, as TensorBoard does to draw its graph.
        if name == "_function":  # not built yet
            raise AttributeError(name)
        return getattr(self._function, name)

    def install(self) -> None:
        """Become the model's train function."""
        self._replaced = _train_functions(self._model)
        vars(self._model).update(self._installed)

    def uninstall(self) -> None:
        """Give the model its earlier train function back, unless it has got another one since."""
        if self._model.train_function is self:
            vars(self._model).update(self._replaced)


def _train_functions(model: Model) -> dict[str, Any]:
    return {name: vars(model)[name] for name in _NAMES if name in vars(model)}
