"""What differs between Keras 3 and tf_keras."""

import inspect
import sys
import warnings
from collections.abc import Iterator
from types import MethodType, ModuleType
from typing import Any

import tensorflow as tf

from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.model_checks import is_differentiable, tensorflow_variable, trainable_variables
from swa_dist.plan import messages
from swa_dist.plan.messages import SWAWarning
from swa_dist.protocols import Model
from swa_dist.training.optimizers import OptimizerLearningRate, StepOptimizers

_IMPORTS = {"keras": "swa_dist.keras", "tf_keras": "swa_dist.tfkeras"}


class KerasAPI:
    """One Keras version, and how to find in its models what SWA works on.

    Args:
        module: `keras` or `tf_keras`.

    Attributes:
        is_keras_3: Whether it is Keras 3.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.is_keras_3 = module.__name__ == "keras"
        optimizers = module.optimizers
        # The class that defines `call` is the ancestor of all BN layers: in tf_keras of the
        # synchronized one and of version 1, too.
        self._batch_norm_base = next(
            c for c in module.layers.BatchNormalization.__mro__ if "call" in vars(c)
        )
        self._optimizer_types: Any = (optimizers.Optimizer,)
        self._schedule_type: Any = optimizers.schedules.LearningRateSchedule
        if not self.is_keras_3:
            self._optimizer_types += (optimizers.legacy.Optimizer, tf.compat.v1.train.Optimizer)

    @classmethod
    def of(cls, model: Model) -> "KerasAPI":
        """Return the Keras version of a model. None is imported: the model's own has been.

        Raises:
            TypeError: It is not a model of tf_keras, or of Keras 3 on TensorFlow.
        """
        for module in _imported():
            if isinstance(model, module.Model) and module.backend.backend() == "tensorflow":
                return cls(module)
        raise TypeError(
            "`model` must be a model of tf_keras, or of Keras 3 on its TensorFlow backend. "
            f"Received: {type(model).__module__}.{type(model).__qualname__}."
        )

    def progress_bar(self, target: int | None, verbose: int) -> Any:
        """Return a progress bar like that of `fit`, of `target` steps; None: it is unknown."""
        return self._module.utils.Progbar(target, verbose=verbose)

    def check_model(self, model: Model) -> None:
        """Refuse a model of the other Keras version.

        Raises:
            TypeError: With the import that suits it.
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
        """Warn if this process is one of several workers with which this version cannot train."""
        if not self.is_keras_3:
            return
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        try:
            jobs = resolver.cluster_spec().as_dict()
        except (ValueError, TypeError, AttributeError):  # a strategy that needs it will say so
            return
        if len(jobs.get("chief", [])) + len(jobs.get("worker", [])) > 1:
            warnings.warn(messages.several_workers(jobs), SWAWarning, stacklevel=4)

    def weight_names(self, model: Model) -> list[str]:
        """Return the names of the weights that are averaged, with the names of their layers."""
        variables = model.trainable_variables
        return [getattr(v, "path", v.name) for v in variables if is_differentiable(v)]

    def untraced(self, model: Model) -> list[tuple[Any, str, Any]]:
        """Return patches under which each method that is a `tf.function` runs as Python."""
        methods = [(layer, "call") for layer in _flatten_layers(model)] + [(model, "train_step")]
        patches = []
        for owner, name in methods:
            if name in vars(owner):  # `layer.call = tf.function(layer.call)`: bound already
                python = getattr(vars(owner)[name], "python_function", None)
            else:
                function = inspect.getattr_static(type(owner), name)
                python = getattr(function, "python_function", None)
                python = python and MethodType(python, owner)
            if python:
                patches.append((owner, name, python))
        return patches

    def trainable_batch_norm(self, model: Model) -> list[BatchNormLayer]:
        """Return the built BN layers that training updates, nested and wrapped ones included."""
        layers = self._find_trainable_batch_norm(model)
        return [self._batch_norm_layer(layer) for layer in layers if layer.built]

    def has_batch_norm(self, model: Model) -> bool:
        """Return whether a model has BN layers that training updates, or would once it is built."""
        # Some models say that they are built before they are.
        is_built = model.built and bool(model.variables)
        return any(layer.built or not is_built for layer in self._find_trainable_batch_norm(model))

    def has_all_weights(self, model: Model) -> bool:
        """Return whether a model and all layers in it are built."""
        return all(layer.built for layer in _flatten_layers(model))

    def _find_trainable_batch_norm(self, model: Model) -> Iterator[Any]:
        for layer in _flatten_layers(model):
            if isinstance(layer, self._batch_norm_base) and layer.trainable:
                yield layer

    def steps_per_execution(self, model: Any, known: int | None = None) -> int:
        """Return how many training steps one call of the train function runs.

        Args:
            model: The model.
            known: What this was at an earlier step of the epoch. It is returned, without a read
                from the device, unless tf_keras tunes it ("auto").
        """
        if known is not None and not getattr(model, "autotune_steps_per_execution", False):
            return known
        return int(tf.convert_to_tensor(model.steps_per_execution))

    def optimizers(self, model: Model) -> dict[str, Any]:
        """Return every optimizer that a model, or a model in it, was compiled with or holds.

        Each has the name of its attribute, after the name of a model within the model.
        """
        return {name: optimizer for name, (_, optimizer) in self._optimizers(model).items()}

    def _optimizers(self, model: Model) -> dict[str, tuple[Any, Any]]:
        """Return the models that have optimizers, each with its optimizer, by its name."""
        found: dict[int, tuple[str, Any, Any]] = {}
        for layer in _flatten_layers(model):
            if isinstance(layer, self._module.Model):
                prefix = "" if layer is model else f"{layer.name}."
                # Public names first: Keras keeps lists of what it tracks, too.
                for name, value in sorted(_flatten(vars(layer)), key=lambda v: v[0][0] == "_"):
                    # tf_keras wraps optimizers of TensorFlow 1 in a class without public name.
                    compiled = name == "optimizer" and hasattr(value, "apply_gradients")
                    if compiled or isinstance(value, self._optimizer_types):
                        found.setdefault(id(value), (prefix + name, layer, value))
        named: dict[str, tuple[Any, Any]] = {}
        for name, *owned in found.values():  # several models may have the same name
            named[name if name not in named else f"{name} ({len(named)})"] = tuple(owned)
        return named

    def step_optimizers(self, model: Model) -> StepOptimizers:
        """Return the optimizers that a model's training step may use."""
        optimizer = getattr(model, "optimizer", None)
        own = {} if optimizer is None else {"optimizer": (model, optimizer)}
        optimizers = own if self._has_default_step(model) else self._optimizers(model) or own
        rates = {
            n: OptimizerLearningRate(o, self._schedule_type) for n, (_, o) in optimizers.items()
        }
        frozen = {
            name
            for name, (owner, _) in optimizers.items()
            if owner.built and not trainable_variables(owner)
        }
        return StepOptimizers(rates, frozen)

    def without_gradients(self, model: Model) -> list[tuple[Any, str, Any]]:
        """Return patches under which Keras's own training step does not compute gradients.

        There are none for a training step of the user's, which may work with the gradients.
        """
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or not self._has_default_step(model):
            return []
        if self.is_keras_3:  # which scales the loss only to take its gradients
            return [(optimizer, "scale_loss", tf.stop_gradient)]
        return [(optimizer, "minimize", _do_nothing)]

    def _has_default_step(self, model: Model) -> bool:
        """Return whether a model's training step is that of its Keras version."""
        step = getattr(model.train_step, "__func__", model.train_step)
        return getattr(step, "__module__", "").startswith(f"{self._module.__name__}.")

    def update_count(self, model: Model) -> int | None:
        """Return how many steps the model's optimizer has made.

        None if it does not count them, or does not change the model with every step.
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
            uses_mask=not getattr(layer, "fused", False),  # the fused kernel ignores masks
            renorm=renorm,
        )


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def is_sequence(data: Any) -> bool:
    """Return whether data is a `PyDataset` or `Sequence` of a Keras version that was imported."""
    return any(isinstance(data, module.utils.Sequence) for module in _imported())


def _imported() -> list[ModuleType]:
    """Return the Keras versions that have been imported, and are ready."""
    modules = [sys.modules.get(name) for name in _IMPORTS]
    return [module for module in modules if module and hasattr(module, "Model")]


def _flatten_layers(model: Any) -> Iterator[Any]:
    # No public name reaches layers in wrappers, and in containers of a subclassed model, in both
    # versions. Checked with Keras 3.10 and 3.15, tf_keras 2.16 and 2.21.
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
