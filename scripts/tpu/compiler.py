"""The TPU's compiler, libtpu's, through JAX's client for compiling without a device.

Private names of JAX are used here, and nowhere else; checked with jax and jaxlib 0.12.0.1 and
libtpu 0.0.50.1.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import _jax, xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies


class Compiled(NamedTuple):
    """What the compiler says of a program, for one core; sizes in bytes.

    Attributes:
        outputs: Size of what it returns, or writes into variables.
        in_place: Size of those outputs that share memory with an input.
        temporary: Size of other memory.
        all_reduces: Sums over cores.
        conditionals: Branches.
    """

    outputs: int
    in_place: int
    temporary: int
    all_reduces: int
    conditionals: int


class Compiler:
    """Compiles HLO for cores that are not there.

    Args:
        topology: Name of the cores' topology, such as "v5e:2x2".
    """

    def __init__(self, topology: str) -> None:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        self._devices = description.devices
        self._client = self._devices[0].client

    @property
    def target(self) -> str:
        """What it compiles for."""
        return f"{len(self._devices)} cores of a {self._devices[0].device_kind}"

    def compile(self, hlo: bytes) -> Compiled:
        """Compile a serialized HloModuleProto, as TensorFlow makes it.

        Raises:
            Exception: The compiler's, which has no class of its own.
        """
        text = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))
        # All that no StableHLO client takes. A reshape to the same shape is the identity, too.
        copy = r"mhlo\.copy (%\S+) : (tensor<[^ ]*>)"
        text = re.sub(copy, r"stablehlo.reshape \1 : (\2) -> \2", text)
        replicas = len(self._devices)
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = replicas, 1
        assignment = np.arange(replicas).reshape(replicas, 1)
        options.device_assignment = xla_client.DeviceAssignment.create(assignment)
        with jax_mlir.make_ir_context():
            module = ir.Module.parse(text)
            _alias(module)
            devices = xla_client.DeviceList(tuple(self._devices))
            executable = self._client.compile(module, devices, options)
        memory, compiled = executable.get_compiled_memory_stats(), executable.hlo_modules()[0]

        def count(operation: str) -> int:
            pattern = rf"^ .*[}})] {operation}(?:-start)?\("
            return len(re.findall(pattern, compiled.to_string(), re.MULTILINE))

        return Compiled(
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            count("all-reduce"),
            count("conditional"),
        )


def _alias(module: Any) -> None:
    """Say that variables are updated in place as JAX says it, instead of as HLO does."""
    attributes, aliases = module.operation.attributes, {}
    if "mhlo.input_output_alias" in attributes:
        for alias in map(str, attributes["mhlo.input_output_alias"]):
            output = re.search(r"output_index = array<i64(?:: (\d+))?>", alias)
            parameter = re.search(r"parameter_number = (\d+)", alias)
            assert output is not None
            assert parameter is not None
            aliases[int(parameter[1])] = int(output[1] or 0)
    main = next(o for o in module.body.operations if o.attributes["sym_name"].value == "main")
    i32 = ir.IntegerType.get_signless(32)
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [
            ir.DictAttr.get(
                {"tf.aliasing_output": ir.IntegerAttr.get(i32, aliases[i])} if i in aliases else {}
            )
            for i in range(len(main.arguments))
        ]
    )
    for name in [getattr(a, "name", a) for a in attributes]:
        if name.startswith("mhlo."):
            del attributes[name]
