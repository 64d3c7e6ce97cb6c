"""HTTP serving that every process shares: uvicorn without signal handlers, on a socket of our own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn

_BACKLOG = 2048


class Server(uvicorn.Server):
    """Uvicorn that leaves signals to its process: an HTTP server has to answer while the process drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, because asyncio switches Nagle's delay off only for sockets that say they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
