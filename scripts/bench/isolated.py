"""Call a function in a process of its own: with its own devices, its own Keras, its own versions.

TensorFlow's devices and what `tf.keras` is are settled once in a process, and its peak of memory
never falls.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KERAS_VERSIONS = {"Keras 3": False, "tf_keras": True}  # whether `tf.keras` is tf_keras

# tensorflow-addons ended with TensorFlow 2.15: `./scripts/benchmark` makes it an environment.
ADDONS = str(ROOT / ".venv-addons" / "bin" / "python")


class FailedError(Exception):
    """The function, or its process, failed: type and first line of the error."""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    legacy: bool = False,
    python: str = sys.executable,
    gpu: bool = False,
    **named: Any,
) -> Any:
    """Call a function of a module in another process, whose CPU is split into 4 virtual ones.

    Arguments and result travel as JSON.

    Args:
        function: What to call.
        *arguments: Its arguments.
        legacy: Whether `tf.keras` is tf_keras.
        python: The interpreter, and so the environment.
        gpu: Whether it sees GPUs, too.
        **named: More arguments of the function.

    Raises:
        FailedError: It raised, or its process ended early.
    """
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", TF_FORCE_GPU_ALLOW_GROWTH="true")
    environment["TF_USE_LEGACY_KERAS"] = "1" if legacy else "0"
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    module = function.__module__
    if module == "__main__":
        module = str(sys.modules[module].__spec__.name)  # type: ignore[union-attr]
    command = [python, "-m", __name__, module, function.__name__, json.dumps([arguments, named])]
    if not Path(python).exists():
        raise FailedError("there is no environment for it")
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip() or "no message").splitlines()[-1]
        raise FailedError(f"ended with {process.returncode}: {last}")
    answer = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise FailedError(answer["error"])
    return answer["value"]


def main(module: str, name: str, arguments: str) -> None:
    """Do what `call` asks for, in the process that it has started."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 4,
    )
    positional, named = json.loads(arguments)
    try:
        answer = {"value": getattr(import_module(module), name)(*positional, **named)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        # Keras puts the traceback of the graph's function before the reason.
        line = lines[-1 if lines[0].startswith("in user code") else 0]
        answer = {"error": f"{type(error).__name__}: {line.strip()[:200]}"}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
