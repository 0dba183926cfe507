"""What differs between the two Kerases, in one place."""

import inspect
import sys
import warnings
from collections.abc import Iterator
from types import MethodType, ModuleType
from typing import Any

import tensorflow as tf

from swa_dist.bn_layer import BatchNormLayer
from swa_dist.optimizers import OptimizerLearningRate, StepOptimizers
from swa_dist.replicas import is_trained, tensorflow_variable

_IMPORTS = {"keras": "swa_dist.keras", "tf_keras": "swa_dist.tfkeras"}


class Flavour:
    """One Keras, and how to find in its models what SWA works on.

    Args:
        module: `keras` or `tf_keras`.

    Attributes:
        is_keras_3: Whether it is Keras 3.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.is_keras_3 = module.__name__ == "keras"
        optimizers = module.optimizers
        # Where `call` is, is the ancestor of all BN layers: in tf_keras of the synchronized one and
        # of version 1, too.
        self._batch_norm_base = next(
            c for c in module.layers.BatchNormalization.__mro__ if "call" in vars(c)
        )
        self._optimizer_types: Any = (optimizers.Optimizer,)
        self._schedule_type: Any = optimizers.schedules.LearningRateSchedule
        if not self.is_keras_3:
            self._optimizer_types += (optimizers.legacy.Optimizer, tf.compat.v1.train.Optimizer)

    @classmethod
    def of(cls, model: Any) -> "Flavour":
        """Return the flavour of a model. No Keras is imported for it: the model's is, already.

        Raises:
            TypeError: It is no model of a Keras that computes with TensorFlow.
        """
        for module in _imported():
            if isinstance(model, module.Model) and module.backend.backend() == "tensorflow":
                return cls(module)
        raise TypeError(
            "`model` must be a model of tf_keras, or of Keras 3 on its TensorFlow backend. "
            f"Received: {type(model).__module__}.{type(model).__qualname__}."
        )

    def progress_bar(self, target: int | None, verbose: int) -> Any:
        """Return a progress bar, as `fit` has it, of `target` steps; None: nobody knows."""
        return self._module.utils.Progbar(target, verbose=verbose)

    def check_model(self, model: Any) -> None:
        """Refuse a model of another Keras.

        Raises:
            TypeError: With the import that is right for it.
        """
        if isinstance(model, self._module.Model):
            return
        roots = {base.__module__.partition(".")[0] for base in type(model).__mro__}
        home = next((_IMPORTS[root] for root in _IMPORTS if root in roots), None)
        remedy = f" For this one, use `from {home} import SWA`." if home else ""
        raise TypeError(
            f"`{_IMPORTS[self._module.__name__]}.SWA` needs a model made with "
            f"`{self._module.__name__}`. Received: {type(model).__module__}."
            f"{type(model).__qualname__}.{remedy}"
        )

    def warn_of_several_workers(self) -> None:
        """Say so where this process is one of several workers that this Keras cannot train with."""
        if not self.is_keras_3:
            return
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        try:
            jobs = resolver.cluster_spec().as_dict()
        except (ValueError, TypeError, AttributeError):  # a strategy that needs it will say so
            return
        if len(jobs.get("chief", [])) + len(jobs.get("worker", [])) > 1:
            warnings.warn(
                "Keras 3 cannot train with several workers (seen with 3.15.1: `fit` under "
                "MultiWorkerMirroredStrategy fails before its first batch), and TF_CONFIG names "
                f"several. Received: {jobs}. Use tf_keras, and `from swa_dist.tfkeras import SWA`.",
                stacklevel=4,
            )

    def weight_names(self, model: Any) -> list[str]:
        """Return the names of the weights that are averaged, with those of their layers."""
        variables = model.trainable_variables
        return [getattr(v, "path", v.name) for v in variables if is_trained(v)]

    def untraced(self, model: Any) -> list[tuple[Any, str, Any]]:
        """Return shadows under which each method that is a `tf.function` runs as Python."""
        methods = [(layer, "call") for layer in _flatten_layers(model)] + [(model, "train_step")]
        shadows = []
        for owner, name in methods:
            if name in vars(owner):  # `layer.call = tf.function(layer.call)`: it is bound already
                python = getattr(vars(owner)[name], "python_function", None)
            else:
                function = inspect.getattr_static(type(owner), name)
                python = getattr(function, "python_function", None)
                python = python and MethodType(python, owner)
            if python:
                shadows.append((owner, name, python))
        return shadows

    def live_batch_norm(self, model: Any) -> list[BatchNormLayer]:
        """Return the BN layers that training would update, nested and wrapped ones included."""
        layers = self._trainable_batch_norm(model)
        return [self._batch_norm_layer(layer) for layer in layers if layer.built]

    def has_batch_norm(self, model: Any) -> bool:
        """Return whether a model has BN layers that training updates, or would once it is built."""
        return any(layer.built or not model.built for layer in self._trainable_batch_norm(model))

    def _trainable_batch_norm(self, model: Any) -> Iterator[Any]:
        for layer in _flatten_layers(model):
            if isinstance(layer, self._batch_norm_base) and layer.trainable:
                yield layer

    def last_batch(self, model: Any, first: int, named: int) -> int:
        """Return the last batch of an execution, which began with `first`.

        Callbacks are told of it under the name of its last batch, and by Keras 3.10 of its first.
        """
        return max(named, first + model.steps_per_execution - 1) if self.is_keras_3 else named

    def optimizers(self, model: Any) -> dict[str, Any]:
        """Return every optimizer that a model, or a model in it, was compiled with or holds.

        Each has the name of its attribute, after the name of a model within the model.
        """
        found: dict[int, tuple[str, Any]] = {}
        for layer in _flatten_layers(model):
            if isinstance(layer, self._module.Model):
                prefix = "" if layer is model else f"{layer.name}."
                # Names of people's own first: Keras has lists of what it tracks, too.
                for name, value in sorted(_flatten(vars(layer)), key=lambda v: v[0][0] == "_"):
                    # tf_keras compiles optimizers of TensorFlow 1 into a class without public name.
                    compiled = name == "optimizer" and hasattr(value, "apply_gradients")
                    if compiled or isinstance(value, self._optimizer_types):
                        found.setdefault(id(value), (prefix + name, value))
        named: dict[str, Any] = {}
        for name, optimizer in found.values():  # models may have one name
            named[name if name not in named else f"{name} ({len(named)})"] = optimizer
        return named

    def step_optimizers(self, model: Any) -> StepOptimizers:
        """Return the optimizers that a model's training step may use."""
        own = {"optimizer": getattr(model, "optimizer", None)}
        step = getattr(model.train_step, "__func__", model.train_step)
        is_kerass = getattr(step, "__module__", "").startswith(f"{self._module.__name__}.")
        optimizers = own if is_kerass else self.optimizers(model) or own
        return StepOptimizers(
            {name: OptimizerLearningRate(o, self._schedule_type) for name, o in optimizers.items()}
        )

    def updates(self, model: Any) -> int | None:
        """Return how often the model's optimizer has changed it.

        None if nobody counts, or if it does not change the model with every step.
        """
        optimizer = getattr(model, "optimizer", None)
        if hasattr(optimizer, "inner_optimizer") or getattr(
            optimizer, "gradient_accumulation_steps", None
        ):
            return None
        iterations = getattr(optimizer, "iterations", None)
        return None if iterations is None else int(tf.convert_to_tensor(iterations))

    def _batch_norm_layer(self, layer: Any) -> BatchNormLayer:
        renorm = None
        if getattr(layer, "renorm", False):
            renorm = tuple(
                tensorflow_variable(getattr(layer, name))
                for name in ("renorm_mean", "renorm_stddev", "moving_stddev")
            )
        spec = layer.input_spec
        channels = {axis % spec.ndim: size for axis, size in spec.axes.items()}
        return BatchNormLayer(
            layer,
            base=self._batch_norm_base,
            input_shape=tuple(channels.get(axis) for axis in range(spec.ndim)),
            mean=tensorflow_variable(layer.moving_mean),
            variance=tensorflow_variable(layer.moving_variance),
            epsilon=layer.epsilon,
            uses_mask=not getattr(layer, "fused", False),  # the fused kernel knows no mask
            renorm=renorm,
        )


def is_sequence(data: Any) -> bool:
    """Return whether data is a `PyDataset` or `Sequence` of a Keras that was imported."""
    return any(isinstance(data, module.utils.Sequence) for module in _imported())


def _imported() -> list[ModuleType]:
    """Return the Kerases that were imported, in full."""
    modules = [sys.modules.get(name) for name in _IMPORTS]
    return [module for module in modules if module and hasattr(module, "Model")]


def _flatten_layers(model: Any) -> Iterator[Any]:
    # No public name reaches layers in wrappers and in containers of a subclassed model under both
    # Kerases. Checked with Keras 3.15 and tf_keras 2.21.
    return model._flatten_layers()


def _flatten(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested dicts, lists and tuples, each with the path to it."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flatten(value, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(values, (list, tuple)):
        for i, value in enumerate(values):
            yield from _flatten(value, f"{name}[{i}]")
    else:
        yield name, values
