"""An HTTP server on loopback that answers by script, and knows what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

Answer = Callable[[Any], Awaitable[bytes | None]]
"""The raw reply to a payload; None: the connection is closed without one."""


@dataclass(frozen=True)
class Asked:
    line: str
    headers: Mapping[str, str]
    payload: Any


def http(body: bytes | str | Any, status: int = 200, **headers: str) -> bytes:
    """A reply; what is neither bytes nor text is sent as JSON."""
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


def always(reply: bytes | None) -> Answer:
    async def answer(payload: Any) -> bytes | None:
        return reply

    return answer


async def never(payload: Any) -> bytes | None:
    """An :data:`Answer` that does not come."""
    await asyncio.get_running_loop().create_future()
    return None


class Web:
    """A server while it is entered; ``asked`` is in the order of arrival."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[Asked] = []
        self.running = 0
        self.most_running = 0
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/check"

    async def __aenter__(self) -> Web:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._one(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # the server ends; asyncio would log the handler's cancellation
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        payload = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.asked.append(Asked(line, headers, payload))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            reply = await self._answer(payload)
        finally:
            self.running -= 1
        if reply is None:
            return False
        writer.write(reply)
        await writer.drain()
        return True
