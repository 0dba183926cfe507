"""Call a function in a process of its own: with its own devices, its own Keras, its own versions.

TensorFlow's devices and what `tf.keras` is are settled once in a process, and its peak of memory
never falls.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# tensorflow-addons ended with TensorFlow 2.15: `./scripts/benchmark` makes it an environment.
ADDONS = ROOT / ".venv-addons" / "bin" / "python"


class FailedError(Exception):
    """The function, or its process, did not get through: the first line of the error."""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    replicas: int = 1,
    legacy: bool = False,
    python: str | os.PathLike = sys.executable,
    gpu: bool = False,
) -> Any:
    """Call a function of a module in another process.

    Args:
        function: What to call; it finds TensorFlow's CPU split.
        *arguments: What JSON takes.
        replicas: How many virtual CPUs there are.
        legacy: Whether `tf.keras` is tf_keras.
        python: The interpreter, and so the environment.
        gpu: Whether it sees GPUs, too.

    Returns:
        What it returns, as it comes out of JSON.

    Raises:
        FailedError: It raised, or its process ended without a word.
    """
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", TF_FORCE_GPU_ALLOW_GROWTH="true")
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.pop("TF_USE_LEGACY_KERAS", None)
    if legacy:
        environment["TF_USE_LEGACY_KERAS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [
            *(os.fspath(python), "-m", __name__, _home(function), function.__name__),
            *(json.dumps(arguments), str(replicas), str(answer)),
        ]
        try:
            process = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise FailedError(f"there is no environment for it: {error.strerror}") from error
        if not answer.exists():
            lines = process.stderr.strip().splitlines() or ["no word"]
            raise FailedError(f"ended with {process.returncode}: {lines[-1]}")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise FailedError(result["error"])
    return result["value"]


def _home(function: Callable[..., Any]) -> str:
    """Return the name under which another process can import a function's module."""
    if function.__module__ != "__main__":
        return function.__module__
    return str(sys.modules["__main__"].__spec__.name)  # type: ignore[union-attr]


def describe(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Keras puts the traceback of the graph's function before the reason.
    if lines and lines[0].startswith("in user code"):
        lines = [lines[-1]]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def main(module: str, name: str, arguments: str, replicas: str, answer: str) -> None:
    """Do what `call` asks for, in the process that it has started."""
    try:
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * int(replicas),
        )
        value = getattr(import_module(module), name)(*json.loads(arguments))
        result = {"value": value}
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = {"error": describe(error)}
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
