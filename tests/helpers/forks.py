"""Programs in processes of their own that need not import TensorFlow and Keras, as that takes long.

They are forks of a process that has imported them, and has used neither.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.helpers.processes import FOREVER, ROOT


class Fork:
    """A program that runs in a fork.

    Args:
        source: Its text.
        environment: Environment variables besides those of this process.
    """

    def __init__(self, source: str, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        server = _server()
        assert server.stdin
        request = {"source": source, "environment": environment, "folder": self._folder.name}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()

    def result(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; return its exit code and what it has written."""
        folder, started = Path(self._folder.name), time.monotonic()
        while not (folder / "code").exists():
            assert _server().poll() is None
            if time.monotonic() - started > FOREVER:
                raise TimeoutError(f"A program hangs: {(folder / 'stderr').read_text()[-4000:]}")
            time.sleep(0.02)
        texts = [(folder / name).read_text() for name in ("code", "stdout", "stderr")]
        self._folder.cleanup()
        return subprocess.CompletedProcess((), int(texts[0]), *texts[1:])


@functools.cache
def _server() -> subprocess.Popen:
    """Return the process that forks; with this one it ends, and so does what still runs of it."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", __name__]
    server = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(server.wait)
    atexit.register(os.killpg, server.pid, signal.SIGKILL)  # the last that is registered is first
    return server


def _serve(requests: Iterable[str]) -> dict[str, Any] | None:
    """Fork for each request. Returns it in the fork that is to run it, None when there are none."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies of keepers
    for line in requests:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request: dict[str, Any] = json.loads(line)
        program = os.fork()
        if not program:
            return request
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        folder = Path(request["folder"])
        (folder / "code.part").write_text(str(code))
        (folder / "code.part").rename(folder / "code")
        os._exit(0)
    return None


def _run(request: dict[str, Any]) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    os.environ.update(request["environment"])
    try:
        exec(request["source"], {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    import tests.helpers.kit  # noqa: F401 - both Keras versions

    if asked := _serve(sys.stdin):
        _run(asked)
