"""The HTTP server around :class:`router.app.App`: uvicorn, quiet, with OpenAI-shaped parse errors."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from braid.errors import BadRequest
from braid.settings import RouterSettings

_BACKLOG = 2048


class Protocol(H11Protocol):
    """HTTP/1.1 that answers what it can't parse with OpenAI's error body."""

    def send_400_response(self, msg: str) -> None:
        body = msgspec.json.encode(BadRequest("This is not a valid HTTP request.").body())
        headers = [("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(body))))
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            output = self.conn.send(event)
            if output:
                self.transport.write(output)
        self.transport.close()


class Server(uvicorn.Server):
    """Uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(settings: RouterSettings) -> socket.socket:
    """A socket bound to the settings' host and port; raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named, because asyncio switches Nagle's delay off only for sockets that say they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def make_server(app: Any) -> Server:
    """A server of ``app``; serve it with ``serve(sockets=[listen(settings)])``."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config)
