"""What the suite changes in TensorFlow's settings, and why. Results do not depend on it.

`SWA_TEST_SETTINGS=default ./scripts/test` runs without: all is as users have it, and takes longer.
"""

import contextlib
import functools
import gc
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

AS_USERS_HAVE_IT = os.environ.get("SWA_TEST_SETTINGS") == "default"

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Keras imports them where they are installed, which takes a third as long as all else. What needs
# one imports it before this module, or removes it from `sys.modules`.
HIDDEN_FROM_KERAS = [] if AS_USERS_HAVE_IT else ["matplotlib", "sklearn"]
for module in HIDDEN_FROM_KERAS:
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]
if not AS_USERS_HAVE_IT and not os.environ.get("CI"):
    # It rewrites every graph, and every operation without one, for kernels that pay off on larger
    # tensors than these: tests take four fifths of the time without it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf  # noqa: E402
from tensorflow.python.data.ops import multi_device_iterator_ops  # noqa: E402
from tensorflow.python.data.ops.dataset_ops import DatasetV2  # noqa: E402
from tensorflow.python.framework import ops  # noqa: E402
from tensorflow.python.ops import gen_dataset_ops  # noqa: E402
from tensorflow.python.util import tf_stack  # noqa: E402


def apply() -> None:
    """Change what holds for a whole process: one that runs tests, or is started by one."""
    if AS_USERS_HAVE_IT:
        return
    gc.disable()  # `collect_garbage` does it, at better times
    # What TensorFlow calls on each dataset of which it makes an iterator. An iterator that is
    # dropped waits for its autotuning thread, which may sleep on for a minute (seen with TensorFlow
    # 2.21), and Keras 3 drops one in each epoch. `Options` have no public default.
    DatasetV2._apply_debug_options = _without_autotuning
    multi_device_iterator_ops._PerDeviceGenerator = _PerDeviceGenerator
    multi_device_iterator_ops._ReincarnatedPerDeviceGenerator = lambda generator, _: generator
    # Which lines of Python made an operation is for error messages, and takes a tenth of a test.
    # All operations get the lines of the first.
    tf_stack.extract_stack = functools.cache(tf_stack.extract_stack)
    optimize_graphs(False)


_tests = itertools.count()


def collect_garbage() -> None:
    """Collect what the last tests have left: its graphs take megabytes a `fit`."""
    if AS_USERS_HAVE_IT:
        gc.collect()
        return
    number = next(_tests)
    if number % 16 == 0:
        _forget_custom_gradients()
        gc.collect()
    if number == 0:
        gc.freeze()  # modules, through which each collection would look


def _forget_custom_gradients() -> None:
    """Remove what TensorFlow would keep for as long as a process lives, with all of its graph.

    It registers the gradient of each `tf.custom_gradient` in a graph under a name of its own, and
    each `fit` has some. Private for want of a public name; checked with TensorFlow 2.16 and 2.21.
    """
    registered = ops.gradient_registry._registry
    for name in [name for name in registered if name.startswith("CustomGradient-")]:
        del registered[name]


@contextlib.contextmanager
def optimized_graphs() -> Iterator[None]:
    """TensorFlow's graph optimization on, as users have it.

    Without it tests take five sixths of the time, as their graphs run a few times only. It is on
    where sums and statistics must be exact: what it rewrites may round in other places.
    """
    optimize_graphs(True)
    yield
    optimize_graphs(AS_USERS_HAVE_IT)


def optimize_graphs(on: bool) -> None:
    """Switch TensorFlow's graph optimization."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not on})


def _without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    # `apply_default_optimizations` stays on: `tests.helpers.data.batched` says what it prevents.
    options.autotune.enabled = False
    return dataset.with_options(options)


class _PerDeviceGenerator(DatasetV2):
    """What an iterator over several devices reads on one of them, traced once for equal data.

    TensorFlow's own traces six functions for each device and iterator, and Keras 3 makes two
    iterators an epoch: with two replicas that takes twice as long as all else in a short `fit`.
    Here they are traced once, and get the handles of other iterators as arguments. Private for want
    of a public name; checked with TensorFlow 2.16 and 2.21.
    """

    _original = multi_device_iterator_ops._PerDeviceGenerator
    _traced: ClassVar[dict[Any, tuple]] = {}
    _tracing = threading.Lock()

    def __init__(
        self, shard_num, resource, incarnation_id, source_device, element_spec, **is_anonymous
    ) -> None:
        self._name, self._element_spec = f"device_generator_{shard_num}", element_spec
        roles = {id(incarnation_id): 0, id(source_device): 1, id(resource): 2}
        device = tf.constant(0).device
        key = (shard_num, device, str(source_device.numpy()), repr(element_spec))
        if key not in self._traced:
            arguments = shard_num, resource, incarnation_id, source_device, element_spec
            with self._tracing:
                multi_device_iterator_ops._PerDeviceGenerator = self._original  # it asks for itself
                first = self._original(*arguments, **is_anonymous)
                multi_device_iterator_ops._PerDeviceGenerator = type(self)
            self._traced[key] = tuple(
                (name, getattr(first, f"_{name}_func"), [roles.get(id(arg), 3) for arg in captured])
                for name in ("init", "next", "finalize")
                for captured in [getattr(first, f"_{name}_captured_args")]
            )
        handle = gen_dataset_ops.multi_device_iterator_to_string_handle(resource)
        present = [incarnation_id, source_device, resource, handle]
        functions = {f"{name}_func": function for name, function, _ in self._traced[key]}
        inputs = [[present[role] for role in roles] for *_, roles in self._traced[key]]
        variant = gen_dataset_ops.generator_dataset(*inputs, **functions, **self._flat_structure)
        super().__init__(variant)

    def _inputs(self) -> list:
        return []

    @property
    def element_spec(self) -> Any:
        return self._element_spec
