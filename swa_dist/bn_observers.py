"""Show what batch normalization layers are called with, wherever in a model they are called."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from swa_dist.bn_layer import BatchNormLayer

# Called with a layer's inputs, its mask and `training`, whenever it runs in training mode.
Observer = Callable[[tf.Tensor, tf.Tensor | None, Any], None]

# By class, the observers of its layers, by the layers' `id`, for as long as anything observes; and
# the class's own `call`. Several models may be in their BN pass at once, in threads of the user's.
_OBSERVERS: dict[type, list[dict[int, Observer]]] = {}
_ORIGINALS: dict[type, Callable] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def observed(observers: Iterable[tuple[BatchNormLayer, Observer]]) -> Iterator[None]:
    """Have each layer observed while open, in what is traced or run meanwhile.

    It is their classes that are taken over: a subclass may hand its ancestor other inputs than
    its own. A layer itself only where it has its class's `call` as an attribute, which hides it:
    tf_keras leaves one behind when it saves a SavedModel.

    Args:
        observers: Layers, each with its observer.
    """
    observers = list(observers)
    by_id = {id(layer.layer): observer for layer, observer in observers}
    with contextlib.ExitStack() as stack:
        for base in {layer.base for layer, _ in observers}:
            stack.enter_context(_observed_class(base, by_id))
        for layer, _ in observers:
            attributes = vars(layer.layer)
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

    # The signature stays visible: both Kerases look for `training` and `mask` in it.
    @functools.wraps(original)
    @tf.autograph.experimental.do_not_convert
    def call(self, inputs, training=None, mask=None):  # type: ignore[no-untyped-def]
        if tf.is_tensor(training) or training:
            for observers in _OBSERVERS.get(base, ()):
                if id(self) in observers:
                    observers[id(self)](inputs, mask, training)
        return original(self, inputs, training=training, mask=mask)

    return call
