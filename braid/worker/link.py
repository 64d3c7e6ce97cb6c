"""The worker's end of the link to the router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from braid import wire
from braid.keys import SEALED_BYTES, apply_curve_client
from braid.liveness import is_connected, watch_connection
from braid.log import GROUP

log = logging.getLogger("braid.worker")


BODY_BYTES = 8 * 1024 * 1024
"""Most body bytes of one message: the router's socket ends the connection over a frame that is too large."""


class Service(Protocol):
    """What a server does with dispatches. ``start`` returns at once; the service sends exactly one
    terminal message for each, also after ``cancel``."""

    def start(self, message: wire.Prefill | wire.Decode) -> None: ...

    def cancel(self, message: wire.Cancel) -> None:
        """Idempotent; an unknown ref is ignored."""

    def lost(self, message: wire.Lost) -> None:
        """A ticket's producer is lost; an unknown ref is ignored."""

    def first(self, message: wire.First) -> None:
        """A producer has drawn the first token; an unknown ref is ignored."""

    def forget(self, message: wire.Forget) -> None:
        """Nothing goes on from these kept samples; unknown names are ignored."""

    def cancel_all(self, reason: str) -> None:
        """The router is gone: stop everything, nobody waits for it."""

    def beat(self) -> wire.Beat: ...


class WorkerLink:
    """Keeps the worker registered and carries messages both ways.

    Messages sent within one turn of the event loop leave as one multipart message, so the tokens that
    a scheduling step gave to all samples travel together. Heartbeats run both ways (:mod:`braid.liveness`);
    when the connection is lost, or no ``Ping`` came for ``hang_s``, the router is gone and all its work is
    stopped.
    """

    def __init__(
        self,
        endpoint: str,
        hello: wire.Hello,
        service: Service,
        *,
        heartbeat_s: float,
        misses: int,
        hang_s: float,
        keys_dir: Path | None = None,
        context: zmq.asyncio.Context | None = None,
    ) -> None:
        """``context``: one that several links share, and whose end is the caller's."""
        self._hello = wire.encode(hello)
        self._service = service
        self._heartbeat_s = heartbeat_s
        self._hang_s = hang_s
        self._own = context is None
        self._context = context or zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME + SEALED_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        watch_connection(self._socket, heartbeat_s, misses)
        apply_curve_client(self._socket, keys_dir)
        self._socket.connect(endpoint)
        self._outbox: list[wire.FromWorker] = []
        self._wake = asyncio.Event()
        self._router: int | None = None
        self._heard = 0.0
        self.draining = False

    @property
    def registered(self) -> bool:
        """Whether a router has welcomed this worker and is alive."""
        return self._router is not None

    def send(self, message: wire.FromWorker) -> None:
        """Queue a message for this turn's batch. Body bytes of the same dispatch are joined, and large ones
        cut."""
        if isinstance(message, wire.Body):
            while len(message.data) > BODY_BYTES:
                self._queue_body(wire.Body(message.ref, message.data[:BODY_BYTES]))
                message = msgspec.structs.replace(message, data=message.data[BODY_BYTES:])
            self._queue_body(message)
        else:
            self._outbox.append(message)
        self._wake.set()

    def _queue_body(self, message: wire.Body) -> None:
        last = self._outbox[-1] if self._outbox else None
        if (
            isinstance(last, wire.Body)
            and last.ref == message.ref
            and len(last.data) + len(message.data) <= BODY_BYTES
        ):
            self._outbox[-1] = msgspec.structs.replace(message, data=last.data + message.data)
        else:
            self._outbox.append(message)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for loop in (self._receive, self._flush, self._beat):
                tasks.create_task(loop())

    async def drain(self, idle: Callable[[], bool], limit_s: float) -> None:
        """Say ``Bye`` and wait until nothing runs, at most ``limit_s`` seconds."""
        self.draining = True
        self.send(wire.Bye())
        until = time.monotonic() + limit_s
        while not idle() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self._socket.close()
        if self._own:
            self._context.term()

    async def _flush(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # the rest of this turn joins the batch
            self._wake.clear()
            batch, self._outbox = self._outbox, []
            if batch:
                await self._socket.send_multipart(list(map(_frame, batch)))

    async def _beat(self) -> None:
        while True:
            if self._router is not None:
                if not is_connected(self._socket):
                    self._router_gone("disconnected")
                elif time.monotonic() - self._heard > self._hang_s:
                    self._router_gone("silent")
                else:
                    self.send(self._service.beat())
            if self._router is None and not self.draining:
                await self._socket.send(self._hello)
            await asyncio.sleep(self._heartbeat_s)

    async def _receive(self) -> None:
        while True:
            for frame in await self._socket.recv_multipart():
                try:
                    self._handle(wire.decode_to_worker(frame))
                except wire.WireError as error:
                    log.warning("malformed_message", extra={"detail": str(error)})

    def _handle(self, message: wire.ToWorker) -> None:
        self._heard = time.monotonic()
        match message:
            case wire.Welcome(router) | wire.Ping(router):
                self._meet(router, isinstance(message, wire.Welcome))
            case wire.Prefill() | wire.Decode():
                if self._router is None:
                    # Sent before this worker was paused or cut off; the router has given it up since.
                    log.warning("stale_dispatch", extra={"ref": message.ref})
                else:
                    self._start(message)
            case wire.Cancel():
                self._service.cancel(message)
            case wire.Lost():
                self._service.lost(message)
            case wire.First():
                self._service.first(message)
            case wire.Forget():
                self._service.forget(message)

    def _start(self, message: wire.Prefill | wire.Decode) -> None:
        """Start a dispatch; what it and the tasks it makes log has the group's id."""
        token = GROUP.set(message.group)
        try:
            ticket = message.ticket.id.hex() if message.ticket else None
            log.info(
                "dispatch", extra={"request_id": message.request_id, "ref": message.ref, "ticket": ticket}
            )
            self._service.start(message)
        finally:
            GROUP.reset(token)

    def _meet(self, router: int, welcome: bool) -> None:
        if self._router == router:
            return
        if self._router is not None:
            self._router_gone("restarted")
        if welcome:
            self._router = router
            log.info("registered", extra={"router": router})

    def _router_gone(self, how: str) -> None:
        log.warning("router_gone", extra={"how": how})
        self._router = None
        self._outbox.clear()
        self._service.cancel_all("router_gone")


def _frame(message: wire.FromWorker) -> bytes:
    """A message as the router takes it: of a sample that is too large it is told so."""
    frame = wire.encode(message)
    if len(frame) <= wire.MAX_FRAME or not isinstance(message, wire.Sample):
        return frame
    why = f"its answer is over {wire.MAX_FRAME} bytes: ask for fewer tokens or log-probabilities"
    log.warning("sample_too_large", extra={"ref": message.ref, "bytes": len(frame)})
    return wire.encode(wire.Sample(message.ref, message.index, "failed", tokens=message.tokens, error=why))


async def keep_calling(call: Callable[[], Awaitable[None]], period_s: float) -> None:
    """Call forever, ``period_s`` after the last call ended; failures are logged."""
    while True:
        try:
            await call()
        except Exception:
            log.exception("periodic_call_failed")
        await asyncio.sleep(period_s)
