"""Calls vLLM's OpenAI application in process.

Going through the application keeps what vLLM's layer does with a request (validation, rendering,
tools, parsers, error shapes) exactly as it is, and streams, which an HTTP client library over ASGI
would buffer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

Start = Callable[[int, list[tuple[str, str]]], None]
Chunk = Callable[[bytes], None]

_GRACE_S = 5.0
"""Time the application has to end after a disconnect before it is cancelled."""


async def post(
    app: Any, target: str, body: bytes, headers: Iterable[tuple[str, str]], on_start: Start, on_chunk: Chunk
) -> None:
    """POST ``body`` to ``target``; returns when the response is complete.

    Cancelling the call ends the request as a client's disconnect does: vLLM runs a handler in a task of
    its own, which only a disconnect reaches.
    """
    path, _, query = target.partition("?")
    sent = False
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if gone.is_set():
            return  # what the application makes of a disconnect is nobody's answer
        if message["type"] == "http.response.start":
            on_start(message["status"], [(k.decode(), v.decode()) for k, v in message["headers"]])
        elif message["type"] == "http.response.body" and message.get("body"):
            on_chunk(message["body"])

    own = [("content-type", "application/json"), ("content-length", str(len(body)))]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in (*headers, *own)],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
    call = asyncio.ensure_future(app(scope, receive, send))
    try:
        await asyncio.shield(call)
    except asyncio.CancelledError:
        gone.set()
        await asyncio.wait([call], timeout=_GRACE_S)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        raise
