"""Add batches to a layer's moments, in a function that layers and replicas share."""

from collections.abc import Callable

import tensorflow as tf

from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.batch_norm.moments import combine, moments_of


class SharedAccumulate:
    """Combine a layer's moments with those of its inputs, as one operation of a graph.

    The operation calls a graph function that is traced once for all layers and replicas whose
    inputs agree in shape and dtype. The function has neither variables nor a device of its own. It
    is not inlined: to optimize and place its 60 operations anew for each layer and replica would
    take about as long as to trace the training step.
    """

    def __init__(self) -> None:
        self._functions: dict[tuple, Callable[..., tf.Tensor]] = {}

    def __call__(
        self, layer: BatchNormLayer, before: tf.Tensor, inputs: tf.Tensor, mask: tf.Tensor | None
    ) -> tf.Tensor:
        """Return the moments after a call of a layer.

        Args:
            layer: The layer.
            before: Its moments until now.
            inputs: What it is called with.
            mask: The mask that it is called with, if any.
        """
        inputs = tf.stop_gradient(inputs)
        arguments = [before, inputs]
        if mask is not None and layer.uses_mask:
            arguments.append(tf.convert_to_tensor(mask))
        specs = [tf.TensorSpec(argument.shape, argument.dtype) for argument in arguments]
        if tf.executing_eagerly():  # one trace for batches of any size
            specs[1] = tf.TensorSpec(layer.input_shape, inputs.dtype)
        key = (layer.input_shape, *specs)
        if key not in self._functions:

            def accumulate(
                before: tf.Tensor, inputs: tf.Tensor, mask: tf.Tensor | None = None
            ) -> tf.Tensor:
                inputs = tf.cast(inputs, before.dtype)
                return combine(before, moments_of(inputs, layer.input_shape, mask))

            # Not within the graph or the replica that is traced at present.
            with tf.init_scope():
                function = tf.function(
                    accumulate, autograph=False, experimental_attributes={"_noinline": True}
                )
                self._functions[key] = function.get_concrete_function(*specs)
        return self._functions[key](*arguments)
