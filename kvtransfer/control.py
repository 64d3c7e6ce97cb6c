"""How a server process commands the transfer ends inside its engine's worker processes (ZMQ over ipc).

Each rank's end connects a DEALER to the server's ROUTER with its rank as the identity and says
``Ready``; then commands flow one way and events the other, in order. The socket's folder is private
to the server (mode 0700).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from kvtransfer import wire
from kvtransfer.loop import Loop

log = logging.getLogger("braid.kvtransfer")


class ControlClient:
    """The rank's side, on the rank's :class:`~kvtransfer.loop.Loop`."""

    def __init__(
        self,
        loop: Loop,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        rank: int,
        on_command: Callable[[wire.Command], None],
    ) -> None:
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, rank.to_bytes(4, "big"))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._on_command = on_command
        loop.add(self._socket, self._receive)

    def emit(self, event: wire.Event) -> None:
        """Send an event; runs on the loop (or before it starts)."""
        self._socket.send(wire.encode(event))

    def _receive(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_command(wire.decode_command(frame))


class ControlServer:
    """The server's side, on its asyncio loop.

    A command goes to every rank, and :meth:`request` waits until every rank has answered. An answer is
    matched by its key; per key and kind of answer one request at a time.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # a ROUTER throws away what is over it
        self._socket.bind(endpoint)
        self.ranks: dict[bytes, wire.Ready] = {}
        self._waiting: dict[object, _Answers] = {}
        self._changed = asyncio.Event()
        self._asking = asyncio.Lock()
        self._task = asyncio.create_task(self._receive())

    async def wait_ready(self, ranks: int) -> list[wire.Ready]:
        """Wait until this many ranks have said ``Ready``; in rank order."""
        while len(self.ranks) < ranks:
            self._changed.clear()
            await self._changed.wait()
        return self.in_order

    @property
    def in_order(self) -> list[wire.Ready]:
        """What the ranks have said of themselves, in rank order."""
        return [self.ranks[i] for i in sorted(self.ranks)]

    async def send(self, commands: list[wire.Command]) -> None:
        """Send one command a rank, in rank order."""
        for identity, command in zip(sorted(self.ranks), commands, strict=True):
            await self._socket.send_multipart([identity, wire.encode(command)])

    async def broadcast(self, command: wire.Command) -> None:
        """Send the same command to every rank."""
        await self.send([command] * len(self.ranks))

    def expect(self, key: object) -> asyncio.Future[list[wire.Event]]:
        """A future of every rank's next event for ``key`` (see :func:`_key_of`).

        Raises:
            ValueError: somebody waits for it already.
        """
        if (known := self._waiting.get(key)) is not None and not known.future.done():
            raise ValueError(f"{key} is waited for already")
        answers = _Answers(len(self.ranks))
        self._waiting[key] = answers
        return answers.future

    def forget(self, key: object) -> None:
        """Stop expecting; idempotent."""
        self._waiting.pop(key, None)

    async def stats(self) -> wire.Stats:
        """Sum over the ranks. May be called concurrently."""
        async with self._asking:
            future = self.expect("stats")
            await self.broadcast(wire.Stat())
            events = [event for event in await future if isinstance(event, wire.Stats)]
        return wire.Stats(
            sum(e.staging_bytes for e in events),
            sum(e.leases for e in events),
            sum(e.pending for e in events),
            sum(e.loads for e in events),
        )

    def close(self) -> None:
        """Close the socket; what is still expected is cancelled."""
        self._task.cancel()
        for answers in self._waiting.values():
            answers.future.cancel()
        self._socket.close()
        self._context.destroy(linger=0)

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                event = wire.decode_event(b"".join(frames))
            except wire.KvWireError as error:
                log.error("kv_malformed_event", extra={"detail": str(error)})
                continue
            if isinstance(event, wire.Ready):
                self.ranks[identity] = event
                self._changed.set()
                continue
            key = _key_of(event)
            answers = self._waiting.get(key)
            if answers is not None and answers.add(identity, event):
                del self._waiting[key]


class _Answers:
    """Collects one event of every rank."""

    def __init__(self, ranks: int) -> None:
        self.future: asyncio.Future[list[wire.Event]] = asyncio.get_running_loop().create_future()
        self._ranks = ranks
        self._events: dict[bytes, wire.Event] = {}

    def add(self, identity: bytes, event: wire.Event) -> bool:
        """Returns whether all have answered."""
        self._events[identity] = event
        if len(self._events) < self._ranks:
            return False
        if not self.future.done():
            self.future.set_result([self._events[i] for i in sorted(self._events)])
        return True


def _key_of(event: wire.Event) -> object:
    """What a request waits for: ``("open", key)``, ``("closed", key)``, ``("load", key)``, ``"stats"``."""
    match event:
        case wire.Opened(key):
            return "open", key
        case wire.Closed(key, _):
            return "closed", key
        case wire.Loaded(key) | wire.Failed(key, _):
            return "load", key
        case wire.Stats():
            return "stats"
    raise ValueError(f"unexpected event {type(event).__name__}")
