"""Ports of this machine for TensorFlow's servers, which no other program can take before them."""

import contextlib
import os
import socket

# A server shares its port with the socket that keeps it only if told to; also in child processes.
os.environ["TF_GRPC_REUSE_PORT"] = "1"


@contextlib.contextmanager
def kept_ports(n):
    """Addresses of n ports that no other program gets while this is open."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            s.bind(("127.0.0.1", 0))
        yield ["{}:{}".format(*s.getsockname()) for s in sockets]
