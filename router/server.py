"""The HTTP server around :class:`router.app.App`: uvicorn, quiet, with OpenAI-shaped parse errors."""

from __future__ import annotations

from typing import Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from braid.errors import BadRequest
from braid.http import Server


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


def make_server(app: Any) -> Server:
    """A server of ``app``; serve it with ``serve(sockets=[listen(host, port)])``."""
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
