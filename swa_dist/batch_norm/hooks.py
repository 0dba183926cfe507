"""Hooks that observe the inputs of batch normalization layers, wherever a model calls them."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from swa_dist.batch_norm.layer import BatchNormLayer

# Called with a layer's inputs, its mask and `training`, whenever it runs in training mode.
Observer = Callable[[tf.Tensor, tf.Tensor | None, Any], None]

# For each class that is observed: the observers of its layers, by the layers' `id`, and the class's
# own `call`. Several models may be in their BN pass at once, in threads of a program.
_OBSERVERS: dict[type, list[dict[int, Observer]]] = {}
_ORIGINALS: dict[type, Callable] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def observe_layers(observers: Iterable[tuple[BatchNormLayer, Observer]]) -> Iterator[None]:
    """Observe layers while open, in everything that is traced or run meanwhile.

    The patch is on their classes, as a subclass may pass other inputs on to its ancestor than it
    gets. A layer is patched itself only if it has its class's `call` as an attribute, which hides
    the class's: tf_keras leaves one behind when it saves a SavedModel.

    Args:
        observers: Layers, each with its observer.
    """
    observers = list(observers)
    by_id = {id(layer.keras_layer): observer for layer, observer in observers}
    with contextlib.ExitStack() as stack:
        for base in {layer.base for layer, _ in observers}:
            stack.enter_context(_observed_class(base, by_id))
        for layer, _ in observers:
            attributes = vars(layer.keras_layer)
            hiding = getattr(attributes.get("call"), "__func__", None)
            if hiding is not None and hiding is _ORIGINALS.get(layer.base):
                stack.callback(attributes.__setitem__, "call", attributes.pop("call"))
        yield


@contextlib.contextmanager
def _observed_class(base: type, observers: dict[int, Observer]) -> Iterator[None]:
    with _LOCK:
        if base not in _OBSERVERS:
            _OBSERVERS[base] = []
            _ORIGINALS[base] = vars(base)["call"]
            base.call = _observed_call(base)  # type: ignore[attr-defined]
        _OBSERVERS[base].append(observers)
    try:
        yield
    finally:
        with _LOCK:
            _OBSERVERS[base] = [o for o in _OBSERVERS[base] if o is not observers]
            if not _OBSERVERS[base]:
                base.call = _ORIGINALS.pop(base)  # type: ignore[attr-defined]
                del _OBSERVERS[base]


def _observed_call(base: type) -> Callable:
    original = _ORIGINALS[base]

    # The signature stays visible: Keras looks for `training` and `mask` in it.
    @functools.wraps(original)
    @tf.autograph.experimental.do_not_convert
    def call(self, inputs, training=None, mask=None):  # type: ignore[no-untyped-def]
        if tf.is_tensor(training) or training:
            for observers in _OBSERVERS.get(base, ()):
                if id(self) in observers:
                    observers[id(self)](inputs, mask, training)
        return original(self, inputs, training=training, mask=mask)

    return call
