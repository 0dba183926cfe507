"""Programs that tests start, and ports for them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Seconds after which a program that a test has started is taken to hang. So many that a slow and
# busy machine cannot make them pass: the longest has taken 9 minutes on one.
FOREVER = 2 * 3600

# A server shares its port with the socket that keeps it only if told to; also in child processes.
os.environ["TF_GRPC_REUSE_PORT"] = "1"

ROOT = Path(__file__).parents[2]


def run_python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository; its exit code, and what it writes, are the result."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": FOREVER, **options},
        check=False,
    )


@contextlib.contextmanager
def kept_ports(n: int) -> Iterator[list[str]]:
    """Addresses of n ports that no other program gets while this is open."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            s.bind(("127.0.0.1", 0))
        yield ["{}:{}".format(*s.getsockname()) for s in sockets]
