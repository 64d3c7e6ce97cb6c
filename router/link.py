"""The router's end of the ZMQ link to its workers.

:class:`Link` owns the socket and the table of dispatches. A dispatch is opened by a request, receives
messages in the request's :class:`Inbox`, and leaves the table with its terminal message, with its
worker, or after a cancel that was never answered.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from braid import wire
from braid.errors import ClientGone
from braid.keys import SEALED_BYTES, apply_curve_server, stop_authenticator
from braid.liveness import watch_connection
from braid.settings import RouterSettings
from router.metrics import Metrics
from router.registry import HelloRefused, Registry, Worker

log = logging.getLogger("braid.router.link")

CANCEL_GRACE_S = 10.0
"""Time a worker has to answer a cancel before its dispatch is dropped from the table."""
INBOX_BYTES = 16 * 1024 * 1024
"""Most bytes a request may hold for a client that reads slowly."""
NOBODY = 0
"""No router's epoch: a ``Ping`` with it tells a worker that it is not registered (any more), so that it
stops its work and says ``Hello`` at once."""
_FAIR = 64
"""Messages handled before the event loop gets its turn."""


class SlowReader(ClientGone):
    """The client did not read what was sent to it in time."""

    label = "slow_reader"


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker that the request uses is gone."""

    worker: Worker
    reason: str


@dataclass(slots=True, eq=False)
class Dispatch:
    """One ``Prefill`` or ``Decode`` at a worker. ``inbox`` is None once nobody listens."""

    ref: int
    worker: Worker
    cost: int
    inbox: Inbox | None
    owner: Any
    single: bool = False
    ended: bool = False
    abandoned_at: float = 0.0


Event = tuple[Dispatch, wire.FromWorker] | Gone


class Inbox:
    """What a request's workers say, in order of arrival. One reader.

    It holds a bounded number of body bytes (and one message more). Past that the reader is too slow: what
    comes is dropped and :meth:`get` raises."""

    def __init__(self, limit: float = INBOX_BYTES) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0
        self._limit = limit
        self._overflown = False
        self._wake: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._overflown = self._overflown or self._bytes > self._limit
        if not self._overflown:
            self._events.append(event)
            self._bytes += _weight(event)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def gone(self, worker: Worker, reason: str) -> None:
        """A :data:`router.registry.Watcher`."""
        self.put(Gone(worker, reason))

    async def get(self, until: float) -> Event | None:
        """The next event, or None when the loop's clock reaches ``until`` first.

        Raises:
            SlowReader: more had come than the inbox holds.
        """
        if self._overflown:
            raise SlowReader("The client reads too slowly.")
        if not self._events:
            loop = asyncio.get_running_loop()
            self._wake = loop.create_future()
            timer = loop.call_at(until, _resolve, self._wake)
            try:
                await self._wake
            finally:
                timer.cancel()
                self._wake = None
        if not self._events:
            return None
        event = self._events.popleft()
        self._bytes -= _weight(event)
        return event


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _weight(event: Event) -> int:
    if isinstance(event, Gone):
        return 0
    message = event[1]
    return len(message.data) if isinstance(message, wire.Body) else 0


class Link:
    """Sends to and receives from the workers, keeps the registry true, and owns the dispatch table."""

    def __init__(self, settings: RouterSettings, registry: Registry, metrics: Metrics) -> None:
        self.epoch = secrets.randbits(63) | 1
        self.endpoint = ""
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._refs = itertools.count(secrets.randbits(62))
        self._table: dict[int, Dispatch] = {}
        self._outbox: dict[Worker, list[bytes]] = {}
        self._flushing = False
        self._tasks: list[asyncio.Task[None]] = []
        registry.lost.append(self._on_lost)

    async def start(self) -> None:
        """Bind and begin to serve.

        Raises:
            OSError: the endpoint can't be bound.
            ValueError: the keys can't be read.
        """
        self._loop = asyncio.get_running_loop()
        self._context = zmq.asyncio.Context()
        sock = self._socket = self._context.socket(zmq.ROUTER)
        sock.linger = 0
        sock.maxmsgsize = wire.MAX_FRAME + SEALED_BYTES
        sock.router_mandatory = 1
        sock.router_handover = 1
        watch_connection(sock, self._settings.heartbeat_s, self._settings.heartbeat_misses)
        apply_curve_server(sock, self._settings.keys_dir)
        try:
            sock.bind(self._settings.link)
        except zmq.ZMQError as error:
            self._close()
            raise OSError(f"cannot bind {self._settings.link}: {error.strerror}") from None
        self.endpoint = sock.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._heartbeat())]

    async def stop(self) -> None:
        """Cancel what workers still run, then close the socket. Idempotent."""
        if not self._tasks:
            return
        for dispatch in list(self._table.values()):
            self.abandon(dispatch)
        self._flush()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close()

    def send(self, worker: Worker, message: wire.ToWorker) -> None:
        """Queue a message; all that one loop tick queues for a worker leaves as one batch.

        To a worker that is gone it does nothing."""
        if worker.gone:
            return
        self._outbox.setdefault(worker, []).append(wire.encode(message))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def open(self, worker: Worker, cost: int, inbox: Inbox, owner: Any, single: bool = False) -> Dispatch:
        """Enter a dispatch into the table and count ``cost`` slots of its worker until it ends."""
        dispatch = Dispatch(next(self._refs), worker, cost, inbox, owner, single)
        self._table[dispatch.ref] = dispatch
        worker.inflight += cost
        if single:
            worker.newcomers += 1
            worker.single_at = time.monotonic()
        return dispatch

    def abandon(self, dispatch: Dispatch) -> None:
        """Cancel a dispatch and stop listening to it. Idempotent, also after its end."""
        dispatch.inbox = None
        if dispatch.ended or dispatch.abandoned_at:
            return
        dispatch.abandoned_at = time.monotonic()
        self.send(dispatch.worker, wire.Cancel(dispatch.ref))

    def open_refs(self) -> list[int]:
        """Dispatches that have not ended."""
        return sorted(self._table)

    def check_integrity(self, idle: bool = False) -> None:
        """Assert that the table and the workers' counts agree; when ``idle``, that it is empty."""
        costs: dict[Worker, int] = {}
        for ref, dispatch in self._table.items():
            assert dispatch.ref == ref
            assert not dispatch.ended
            assert not dispatch.worker.gone
            costs[dispatch.worker] = costs.get(dispatch.worker, 0) + dispatch.cost
        for worker in self._registry.all():
            assert worker.inflight == costs.get(worker, 0), (worker.name, worker.inflight)
        assert not idle or not self._table, sorted(self._table)

    def _flush(self) -> None:
        self._flushing = False
        outbox, self._outbox = self._outbox, {}
        for worker, frames in outbox.items():
            if worker.gone:
                continue
            self._send_frames(worker.identity, frames)

    def _send_frames(self, identity: bytes, frames: list[bytes]) -> None:
        sent = asyncio.ensure_future(self._socket.send_multipart([identity, *frames]))
        sent.add_done_callback(functools.partial(self._sent, identity))

    def _sent(self, identity: bytes, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or not isinstance(future.exception(), zmq.ZMQError):
            return
        worker = self._registry.get(identity)
        if worker is not None:
            self._registry.lose(worker, "disconnected")

    async def _receive(self) -> None:
        handled = 0
        while True:
            identity, *frames = await self._socket.recv_multipart()
            for frame in frames:
                self._handle_frame(identity, frame)
            handled += 1
            if handled % _FAIR == 0:
                await asyncio.sleep(0)

    def _handle_frame(self, identity: bytes, frame: bytes) -> None:
        try:
            message = wire.decode_from_worker(frame)
        except wire.WireError:
            self._drop("malformed")
            log.warning("malformed frame dropped", extra={"bytes": len(frame)})
            return
        if isinstance(message, wire.Hello):
            self._hello(identity, message)
            return
        worker = self._registry.get(identity)
        if worker is None:
            self._drop("stranger")
            self._send_frames(identity, [wire.encode(wire.Ping(NOBODY))])
            return
        worker.seen, worker.spoke = time.monotonic(), True
        if isinstance(message, wire.Beat):
            worker.beat, worker.newcomers = message, 0
        elif isinstance(message, wire.Bye):
            worker.draining = True
            log.info("worker drains", extra={"worker": worker.name})
        else:
            self._deliver(worker, message)

    def _hello(self, identity: bytes, hello: wire.Hello) -> None:
        now = time.monotonic()
        try:
            worker = self._registry.hello(identity, hello, now, 2 * self._settings.heartbeat_s)
        except HelloRefused as error:
            self._drop("hello")
            log.warning("worker refused", extra={"worker": hello.worker[:64], "reason": str(error)})
            return
        if worker.since == now:
            log.info("worker joined", extra={"worker": worker.name, "role": hello.role})
        self.send(worker, wire.Welcome(self.epoch, self._settings.heartbeat_s))

    def _deliver(
        self,
        worker: Worker,
        message: wire.First | wire.PrefillDone | wire.Head | wire.Body | wire.Sample | wire.GroupDone,
    ) -> None:
        dispatch = self._table.get(message.ref)
        if dispatch is None or dispatch.worker is not worker:
            self._drop("unknown_ref")
            return
        if _is_terminal(message):
            self._end(dispatch)
        if dispatch.inbox is not None:
            dispatch.inbox.put((dispatch, message))

    def _close(self) -> None:
        self._socket.close(linger=200)
        stop_authenticator(self._context)
        self._context.term()

    def _end(self, dispatch: Dispatch) -> None:
        dispatch.ended = True
        dispatch.worker.inflight -= dispatch.cost
        if dispatch.single:
            dispatch.worker.single_at = time.monotonic()
        del self._table[dispatch.ref]

    def _on_lost(self, worker: Worker, reason: str) -> None:
        log.warning("worker gone", extra={"worker": worker.name, "reason": reason})
        self._metrics.workers_lost.labels(worker.hello.role, reason).inc()
        for dispatch in [d for d in self._table.values() if d.worker is worker]:
            self._end(dispatch)

    async def _heartbeat(self) -> None:
        interval = self._settings.heartbeat_s
        due = time.monotonic() + interval
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            for worker in self._registry.all():
                self.send(worker, wire.Ping(self.epoch))  # fails where the connection is lost
            # After a stall of our own, the workers' beats still wait in the socket.
            if now - due < interval:
                self._registry.hush(now - interval * self._settings.heartbeat_misses)
                self._registry.expire(now - self._settings.hang_s)
            self._reap(now - CANCEL_GRACE_S)
            due = now + interval

    def _reap(self, before: float) -> None:
        for dispatch in [d for d in self._table.values() if 0 < d.abandoned_at < before]:
            self._metrics.cancels_unanswered.inc()
            log.warning("cancel unanswered", extra={"worker": dispatch.worker.name, "ref": dispatch.ref})
            self._end(dispatch)

    def _drop(self, reason: str) -> None:
        self._metrics.frames_dropped.labels(reason).inc()


def _is_terminal(message: wire.FromWorker) -> bool:
    return isinstance(message, wire.PrefillDone | wire.GroupDone) or (
        isinstance(message, wire.Body) and message.end
    )
