"""Compile what swa_dist runs on TPU cores with the TPU's own compiler, and check what it says."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(
    TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="-1",
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", KERAS_BACKEND="tensorflow",
    TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3",
)  # fmt: skip

from scripts.bench.report import provenance, put, table
from scripts.tpu import programs
from scripts.tpu.compiler import Compiled, Compiler
from scripts.tpu.recording import Program, Recorder

RESULTS = Path(__file__).parents[1] / "results" / "tpu.md"
PACKAGES = ("tensorflow-cpu", "keras", "tf_keras", "jax", "libtpu")
_SLACK = 4096  # bytes: what a program returns besides, such as the list of its outputs

# Words that are all in a program's name, what must hold of it, and that in words.
CHECKS: list[tuple[tuple[str, ...], Callable[[Compiled], bool], str]] = [
    (("DeviceAverage",), lambda c: c.all_reduces == 0, "no all-reduce"),
    (("DeviceAverage.update",), lambda c: c.outputs - c.in_place <= _SLACK, "in place"),
    (("DeviceAverage._copy",), lambda c: c.outputs - c.in_place <= _SLACK, "in place"),
    (("DeviceAverage._swap",), lambda c: c.outputs - c.in_place <= _SLACK, "in place"),
    # Assertions are dropped on a TPU: while the average is in the model, this keeps it there.
    (("DeviceAverage._copy",), lambda c: c.conditionals > 0, "under a condition"),
    (
        ("ResNet-50", "DeviceAverage"),
        lambda c: c.temporary < 0.2 * c.outputs,
        "temporary memory below 20 % of what is written",
    ),
    (("_pool_replica",), lambda c: c.all_reduces <= 4, "at most 4 all-reduces"),
    (("ForwardPass.__init__.forward",), lambda c: c.all_reduces == 0, "no all-reduce"),
    # tf_keras sums its loss, and synchronized layers have one each: those are not ours.
    # Those of the gradients, of tf_keras's loss, and of synchronized layers.
    (
        ("Keras 3, snapshot_freq", "averaged_train_step"),
        lambda c: c.all_reduces <= 1,
        "none of ours",
    ),
    (("Keras 3, BN pass", "_step"), lambda c: c.all_reduces == 0, "no all-reduce"),
    (("tf_keras, BN pass", "_step"), lambda c: c.all_reduces <= 1, "no all-reduce of ours"),
    (("Keras 3, synchronized, BN pass", "_step"), lambda c: c.all_reduces <= 2, "none of ours"),
    (("tf_keras, synchronized, BN pass", "_step"), lambda c: c.all_reduces <= 3, "none of ours"),
]


def main() -> None:
    """Record, compile, check, and write the table."""
    parser = argparse.ArgumentParser(prog="./scripts/compile-for-tpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part; writes no table")
    parser.add_argument("--self-test", action="store_true", help="what must not compile")
    parser.add_argument("--topology", default="v5e:2x2", help="cores (default: %(default)s)")
    options = parser.parse_args()
    start, recorder = time.perf_counter(), Recorder()
    if options.self_test:
        programs.must_not_compile(recorder)
    else:
        with recorder.open():
            for record in programs.all_programs(recorder, options.quick):
                record()
    compiler = Compiler(options.topology)
    print(f"{len(recorder.programs)} programs for {compiler.target}", flush=True)
    compiled = {p.name: compile_one(compiler, p) for p in numbered(recorder.programs)}
    if options.self_test:
        wrong = [name for name, found in compiled.items() if isinstance(found, Compiled)]
    else:
        wrong = [fault for name, found in compiled.items() for fault in faults(name, found)]
    rows = [row(name, found) for name, found in compiled.items() if isinstance(found, Compiled)]
    seconds = time.perf_counter() - start
    if not (options.quick or options.self_test or wrong):
        made = provenance("./scripts/compile-for-tpu", packages=PACKAGES)
        made += f" {len(rows)} programs, for {compiler.target}, in {seconds:.0f} seconds."
        put(RESULTS, "programs", made, table(HEADER, rows))
    print(*wrong or [f"All as it should be, in {seconds:.0f} seconds."], sep="\n")
    sys.exit(bool(wrong))


def numbered(recorded: list[Program]) -> list[Program]:
    """Number programs of one name, such as the steps of one execution."""
    seen: dict[str, int] = {}
    result = []
    for program in recorded:
        seen[program.name] = seen.get(program.name, 0) + 1
        again = f" ({seen[program.name]})" if seen[program.name] > 1 else ""
        result.append(program._replace(name=program.name + again))
    return result


def compile_one(compiler: Compiler, program: Program) -> Compiled | Exception:
    """Compile a program; return what the compiler says of it, be it an error."""
    try:
        if isinstance(program.hlo, Exception):
            raise program.hlo
        found = compiler.compile(program.hlo)
    except Exception as error:
        print(f"{program.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return error
    print(f"{program.name}: {found}", flush=True)
    return found


def faults(name: str, found: Compiled | Exception) -> list[str]:
    """Return what should hold of a program, and does not."""
    if isinstance(found, Exception):
        return [f"{name}: does not compile"]
    return [
        f"{name}: not {what}"
        for words, holds, what in CHECKS
        if all(word in name for word in words) and not holds(found)
    ]


HEADER = ["program", "outputs, MB", "in place, MB", "temporary, MB", "all-reduces", "conditions"]


def row(name: str, found: Compiled) -> list[str]:
    """Return a program's row of the table."""
    sizes = [f"{size / 1e6:.3f}" for size in (found.outputs, found.in_place, found.temporary)]
    return [name, *sizes, str(found.all_reduces), str(found.conditionals)]


if __name__ == "__main__":
    main()
