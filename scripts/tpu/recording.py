"""Record the programs that a TPU's cores would run.

A real `TPUStrategy` is made whose devices are logical CPUs. Its `tpu.replicate`, which would
compile the program of the cores, is a stand-in that traces that same program in TensorFlow's own
context for a core, so that sums over replicas become all-reduces, and makes HLO of it. The program
then runs on one CPU without the sums, so that everything goes on. TPU variables, Keras's `fit` and
swa_dist are the real ones.

Private names of TensorFlow are used here, and nowhere else; checked with 2.21.0.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python import pywrap_tfe
from tensorflow.python.distribute import tpu_strategy
from tensorflow.python.tpu import tpu_replication
from tensorflow.python.tpu.ops import tpu_ops
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

REPLICAS = 4
_CPUS = [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(REPLICAS)]


class Program(NamedTuple):
    """What a core would run.

    Attributes:
        name: What was done, and the function that does it.
        hlo: A serialized HloModuleProto, or the error with which it could not be made.
    """

    name: str
    hlo: bytes | Exception


class Recorder:
    """Records programs under a `TPUStrategy`.

    Attributes:
        strategy: The strategy.
        programs: What was recorded.
        stage: What is being done, for the names of the programs.
        batches: Sizes of a core's batch with which programs are lowered whose batch has no static
            size.
    """

    def __init__(self) -> None:
        cpu = tf.config.list_physical_devices("CPU")[0]
        cores = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
        tf.config.set_logical_device_configuration(cpu, cores)
        self.strategy = tf.distribute.TPUStrategy(_Resolver())
        extended = self.strategy.extended
        extended._tpu_devices[:, 0] = _CPUS
        extended._host_device = _CPUS[0]
        extended._device_input_worker_devices = {_CPUS[0]: _CPUS}
        extended._host_input_worker_devices = {_CPUS[0]: [_CPUS[0]] * REPLICAS}
        self.strategy._enable_packed_variable_in_eager_mode = False
        run = self.strategy.run
        # Keras 3 hands it a `tf.function`; its graph has to be traced in the core's context.
        self.strategy.run = lambda f, *a, **k: run(getattr(f, "python_function", f), *a, **k)
        self.programs: list[Program] = []
        self.stage = ""
        self.batches: list[int] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Record while open."""
        original = tpu_strategy.tpu.replicate
        tpu_strategy.tpu.replicate = self._replicate
        try:
            yield
        finally:
            tpu_strategy.tpu.replicate = original

    def record(self, name: str, function: Callable[[], Any]) -> None:
        """Record a function without inputs as it is."""
        compiled = tf.function(function, jit_compile=True, autograph=False)
        self.programs.append(Program(name, _lower(compiled, [])))

    def _replicate(self, computation: Callable, inputs: Any, **_: Any) -> Any:
        name = f"{self.stage}: {_name_of(computation)}"
        self.programs += [
            Program(name if size is None else f"{name}, batches of {size}", hlo)
            for size, hlo in self._hlo(computation, inputs[0])
        ]
        function, specs, tensors = _as_function(computation, inputs[0], all_reduce=False)
        with tf.device(_CPUS[0]):
            out = function.get_concrete_function(*specs)(*tensors)
        return [[] if out is None else tf.nest.flatten(out)] * REPLICAS

    def _hlo(self, computation: Callable, of_core: Any) -> Iterator[tuple[int | None, Any]]:
        function, specs, _ = _as_function(computation, of_core, all_reduce=True)
        is_static = all(spec.shape.is_fully_defined() for spec in specs)
        # Now: later, or elsewhere, it would be traced without what surrounds it here.
        for size in [None] if is_static else self.batches:
            shapes = [[size if n is None else n for n in spec.shape] for spec in specs]
            sized = [tf.TensorSpec(s, t.dtype) for s, t in zip(shapes, specs, strict=True)]
            with tf.init_scope():
                yield size, _lower(function, sized)


def _as_function(computation: Callable, of_core: Any, all_reduce: bool) -> tuple[Any, Any, Any]:
    """Return the program of one core as a function of its tensors, their specs, and the tensors."""
    flat = tf.nest.flatten(of_core, expand_composites=True)
    tensors = [t for t in flat if tf.is_tensor(t)]

    def body(*given: tf.Tensor) -> list[tf.Tensor]:
        rest = iter(given)
        filled = [next(rest) if tf.is_tensor(t) else t for t in flat]
        core = tf.nest.pack_sequence_as(of_core, filled, expand_composites=True)
        context, originals = _OneCore(), (tpu_ops.cross_replica_sum, tpu_ops.all_to_all)
        # XLA knows CrossReplicaSum for TPUs only; both become the same all-reduce.
        tpu_ops.cross_replica_sum = _all_reduce if all_reduce else lambda x, *_, **__: REPLICAS * x
        # For variables of Keras's that have one value for all, such as the iterations.
        tpu_ops.all_to_all = lambda values, *_, **__: values
        context.Enter()
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()  # `init_scope` has stopped it
        try:
            out = computation(*core)
        finally:
            pywrap_tfe.TFE_Py_TapeSetStopOnThread()
            context.Exit()
            tpu_ops.cross_replica_sum, tpu_ops.all_to_all = originals
        kept = (o for o in tf.nest.flatten(out) if not isinstance(o, tf.Operation))
        return [o for o in kept if o is not None]

    with tf.init_scope():
        function = tf.function(body, jit_compile=all_reduce, autograph=False)
    return function, [tf.TensorSpec(t.shape, t.dtype) for t in tensors], tensors


def _lower(function: Any, specs: list[tf.TensorSpec]) -> bytes | Exception:
    try:
        return function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")
    except Exception as error:
        return error


def _all_reduce(x: tf.Tensor, *_: Any, **__: Any) -> tf.Tensor:
    kinds = tpu_strategy._DTYPES_SUPPORTED_BY_CROSS_REPLICA_SUM
    assert x.dtype in kinds, f"A TPU has no all-reduce of {x.dtype.name}."
    groups = [list(range(REPLICAS))]
    return gen_xla_ops.xla_all_reduce(
        x, group_assignment=groups, reduce_op="Add", mode="CrossReplica"
    )


def _name_of(computation: Callable) -> str:
    cells = dict(zip(computation.__code__.co_freevars, computation.__closure__ or (), strict=True))
    function = cells["fn"].cell_contents
    while inner := (
        getattr(function, "_original_func", None)
        or getattr(function, "python_function", None)
        or getattr(function, "__wrapped__", None)
    ):
        function = inner
    owner = getattr(function, "__self__", None)
    function = getattr(owner, "_function", function)  # that of a `ReplicaFunction`
    return getattr(function, "__qualname__", str(function)).replace("<locals>.", "")


class _Resolver(tf.distribute.cluster_resolver.ClusterResolver):
    def get_tpu_system_metadata(self) -> TPUSystemMetadata:
        task = "/job:localhost/replica:0/task:0"
        return TPUSystemMetadata(
            num_cores=REPLICAS,
            num_hosts=1,
            num_of_cores_per_host=REPLICAS,
            topology=None,
            devices=[
                tf.config.LogicalDevice(f"{task}/device:TPU:{i}", "TPU") for i in range(REPLICAS)
            ],
        )

    def master(self, *_: Any, **__: Any) -> str:
        return ""

    def cluster_spec(self) -> Any:
        return tf.train.ClusterSpec({})

    def num_accelerators(self, *_: Any, **__: Any) -> dict[str, int]:
        return {"TPU": REPLICAS}


class _OneCore(tpu_replication.TPUReplicateContext):
    """The context in which TensorFlow builds a core's program, less the rewriting of the graph."""

    def __init__(self) -> None:
        super().__init__("cluster", REPLICAS, None)

    def get_replicated_var_handle(
        self, name: str, handle_id: Any, values: Any, *_: Any, **__: Any
    ) -> Any:
        with tf.init_scope():
            return values[0].handle

    def AddOp(self, op: Any) -> None:  # noqa: N802
        pass

    def AddValue(self, value: Any) -> Any:  # noqa: N802
        return value

    def AddInnerOp(self, op: Any) -> None:  # noqa: N802
        pass
