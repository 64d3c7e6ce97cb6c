"""A TCP proxy on loopback that does to a connection what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

CHUNK = 16 * 1024
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close send RST."""


@dataclass(slots=True)
class Faults:
    """What happens to bytes on their way from the producer to the consumer.

    Attributes:
        delay_s: each chunk comes so much later.
        rate: bytes a second, 0 for no limit.
        cut_after: the connection is reset after this many bytes; used up by the first that gets there.
        cut_only: number of the connection that ``cut_after`` is meant for; 0 for any.
        corrupt_at: offset of a byte of each connection that is inverted.
        blackhole: nothing comes, either way, though the connection stays open.
    """

    delay_s: float = 0.0
    rate: int = 0
    cut_after: int | None = None
    cut_only: int = 0
    corrupt_at: int | None = None
    blackhole: bool = False


@dataclass(eq=False, slots=True)
class _Link:
    """One connection through the proxy: to the consumer (near) and to the producer (far)."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    number: int
    bytes: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def reset(self) -> None:
        for writer in (self.near, self.far):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class Proxy:
    """Listens on ``host`` (at ``port``, 0 for any) and passes connections on to ``target`` (an endpoint).

    Attributes:
        faults: may be changed at any time.
        accepted: connections so far.
        down: bytes passed to the consumer so far.
    """

    def __init__(self, target: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.faults = Faults()
        self.accepted = 0
        self.down = 0
        self._target = int(target.rpartition(":")[2])
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-proxy", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, host, port))
        self._host, self._port = self._server.sockets[0].getsockname()[:2]

    @property
    def endpoint(self) -> str:
        return f"tcp://{self._host}:{self._port}"

    def reset(self) -> None:
        """Reset every connection; new ones are let in."""
        self._do(self._reset)

    def half_close(self) -> None:
        """Say to every consumer that nothing more will come."""

        def end() -> None:
            for link in self._links:
                link.near.write_eof()

        self._do(end)

    def refuse(self) -> None:
        """Listen no more, and reset what there is."""

        def stop() -> None:
            self._server.close()
            self._reset()

        self._do(stop)

    def close(self) -> None:
        self.refuse()

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _do(self, call: Callable[[], object]) -> None:
        async def run() -> None:
            call()

        self._run(run())

    def _reset(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _accept(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.accepted += 1
        number = self.accepted
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            near.transport.abort()
            return
        link = _Link(near, far, number)
        self._links.add(link)
        try:
            ups = asyncio.create_task(self._pump(reader, far, link, down=False))
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._pump(far_reader, near, link, down=True)
            ups.cancel()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await ups
        finally:
            self._links.discard(link)
            near.transport.abort()
            far.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link, *, down: bool
    ) -> None:
        while data := await reader.read(CHUNK):
            while self.faults.blackhole:
                await asyncio.sleep(0.01)
            if down:
                data = await self._suffer(data, link)
            writer.write(data)
            await writer.drain()
            link.bytes[down] += len(data)
            self.down += len(data) if down else 0
            if down and link.bytes[down] >= self._cut(link):
                self.faults.cut_after = None
                await asyncio.sleep(0.02)  # what was written is on its way
                link.reset()
                return
        if down:
            writer.transport.abort()

    def _cut(self, link: _Link) -> int:
        """After how many bytes a connection is reset."""
        meant = self.faults.cut_only in (0, link.number)
        return self.faults.cut_after if meant and self.faults.cut_after is not None else 2**63

    async def _suffer(self, data: bytes, link: _Link) -> bytes:
        faults, at = self.faults, link.bytes[True]
        await asyncio.sleep(faults.delay_s + (len(data) / faults.rate if faults.rate else 0))
        data = data[: max(0, self._cut(link) - at)]
        if faults.corrupt_at is not None and at <= faults.corrupt_at < at + len(data):
            where = faults.corrupt_at - at
            data = data[:where] + bytes([data[where] ^ 0xFF]) + data[where + 1 :]
        return data
