"""KV transfer of simulated workers: the messages of ``kvtransfer``'s control lane, and counted bytes.

:class:`Producer` and :class:`Consumer` are what the services use; :mod:`braid.sim.moved` has others of the
same shape, over the real ends. Here a producer announces blocks and sends none, and a consumer waits as long
as they would have taken: latency + bytes / bandwidth, from the moment the last one was announced; transfers
of one producer to several workers share its bandwidth.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from braid.keys import apply_curve_client, apply_curve_server
from kvtransfer import wire as kv
from kvtransfer.lease import Lease, LeaseTable, Subscriber

log = logging.getLogger("braid.sim")

TRANSPORT = "counted"
TICK_S = 0.25
"""Period in which leases are looked after."""
ALIVE_S = 2.0
"""Period in which waiting loads, and those that will come, extend their leases."""


class LoadFailed(Exception):
    """KV did not come; the message is a short reason."""


class Refused(Exception):
    """A lease was not granted; the message says why."""


class Producer(Protocol):
    """The prefill worker's end. What is staged is held until every reader has it, or ``lease_s``."""

    endpoint: str

    async def open(self, message: kv.Open, links: list[bytes]) -> None:
        """Reserve staging and tell the subscribers what will come. ``links``: of each block of the prompt.

        Raises:
            Refused: it is too large, or was closed before there was room.
        """

    def stage(self, key: kv.Key, first: int, last: int) -> None:
        """Blocks ``[first, last)`` are computed. They come in order."""

    def close(self, key: kv.Key, reason: str) -> None:
        """End a lease. Idempotent."""

    def stats(self) -> kv.Stats: ...

    async def stop(self) -> None: ...


class Consumer(Protocol):
    """The decode worker's end."""

    async def load(self, spec: kv.Load, links: list[bytes]) -> kv.Loaded:
        """Bring a prompt's blocks into these cache blocks. Cancelled: nothing is written any more when it
        raises. ``links``: what the blocks must turn out to hold.

        Raises:
            LoadFailed: they did not come.
        """

    def hold(self, message: kv.Hold) -> None:
        """Keep the lease of a prompt whose load will come later; or no longer, if no producer is named."""

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Announced blocks ``[first, last)`` of a group."""

    group: int
    first: int
    last: int


class CountedProducer:
    """A :class:`Producer` that announces blocks. Start it with :meth:`start`.

    Args:
        block_bytes: bytes of a block.
        staging_bytes: most bytes of all leases.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        *,
        bind: str,
        epoch: int,
        block_bytes: int,
        staging_bytes: int,
        lease_s: float,
        keys_dir: Path | None = None,
    ) -> None:
        self._epoch = epoch
        self._shapes = (kv.Shape(1, 1, block_bytes),)
        self._left = staging_bytes
        self._table: LeaseTable[Piece] = LeaseTable(
            self._allocate, self._free, staging_bytes, lease_s, time.monotonic
        )
        self._opening: dict[kv.Key, asyncio.Future[None]] = {}
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.sndhwm = 0
        self._socket.maxmsgsize = kv.MAX_MESSAGE
        apply_curve_server(self._socket, keys_dir)
        self._socket.bind(bind)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._tasks = [asyncio.create_task(run) for run in (self._receive(), self._tick())]

    def stats(self) -> kv.Stats:
        table = self._table
        return kv.Stats(table.reserved, len(table.held), len(table.waiting) + len(table.early))

    async def open(self, message: kv.Open, links: list[bytes]) -> None:
        manifest = kv.Manifest(
            0, self._epoch, message.tokens, message.chain, message.fingerprint, self._shapes
        )
        spans = {span.group: span for span in message.spans}
        nbytes = sum(span.count * self._shapes[span.group].block_bytes for span in message.spans)
        try:
            self._table.open(Lease(message.key, manifest, spans, nbytes, message.subscribers))
        except ValueError as error:
            raise Refused(str(error)) from None
        granted = self._opening[message.key] = asyncio.get_running_loop().create_future()
        try:
            self._grant()
            await granted
        finally:
            del self._opening[message.key]

    def stage(self, key: kv.Key, first: int, last: int) -> None:
        if first < last and (lease := self._table.publish(key, Piece(0, first, last))) is not None:
            for subscriber in lease.subscribers.values():
                self._feed(lease, subscriber)

    def close(self, key: kv.Key, reason: str) -> None:
        lease = self._table.close(key, reason)
        for subscriber in lease.subscribers.values() if lease is not None else ():
            if not subscriber.ended:
                self._say(subscriber.id[0], kv.Refused(subscriber.id[1], reason))
        if (opening := self._opening.get(key)) is not None and not opening.done():
            opening.set_exception(Refused(reason))
        self._reclaim()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._table.check_integrity()

    def _allocate(self, nbytes: int) -> int | None:
        if nbytes > self._left:
            return None
        self._left -= nbytes
        return 0

    def _free(self, at: int, nbytes: int) -> None:
        self._left += nbytes

    def _grant(self) -> None:
        for lease in self._table.grant():
            opening = self._opening.get(lease.key)
            if opening is not None and not opening.done():
                opening.set_result(None)
            for subscriber in lease.subscribers.values():
                self._begin(lease, subscriber)

    def _begin(self, lease: Lease[Piece], subscriber: Subscriber) -> None:
        manifest = lease.manifest
        told = kv.Manifest(
            subscriber.id[1],
            manifest.epoch,
            manifest.tokens,
            manifest.chain,
            manifest.fingerprint,
            manifest.shapes,
        )
        self._say(subscriber.id[0], told)
        self._feed(lease, subscriber)

    def _feed(self, lease: Lease[Piece], subscriber: Subscriber) -> None:
        if subscriber.ended:
            return
        for piece, skip, count in lease.next_parcels(subscriber):
            first = piece.first + skip
            nbytes = count * self._shapes[piece.group].block_bytes
            lease.sent += nbytes
            self._say(subscriber.id[0], kv.Blocks(subscriber.id[1], piece.group, first, count, nbytes))

    def _say(self, address: bytes, message: kv.Data) -> None:
        # Never full (sndhwm 0), so it leaves at once; to a consumer that is gone it does nothing.
        if not self._socket.closed:
            self._socket.send_multipart([address, kv.encode(message)])

    async def _receive(self) -> None:
        while True:
            address, *frames = await self._socket.recv_multipart()
            try:
                self._handle(address, kv.decode_data(b"".join(frames)))
            except kv.KvWireError as error:
                log.warning("kv_malformed_message", extra={"detail": str(error)})

    def _handle(self, address: bytes, message: kv.Data) -> None:
        match message:
            case kv.Hello(_, session, _, offers):
                if TRANSPORT in dict(offers):
                    self._say(address, kv.Welcome(session, TRANSPORT, b""))
                else:
                    self._say(address, kv.Refused(0, "no_transport"))
            case kv.Subscribe():
                self._subscribe(address, message)
            case kv.Done(key, sub) | kv.Drop(key, sub):
                if self._table.end_subscriber(key, (address, sub)):
                    self._table.close(key, "done")
                self._reclaim()
            case kv.Alive(keys):
                for key in keys:
                    self._table.alive(key)

    def _subscribe(self, address: bytes, message: kv.Subscribe) -> None:
        if message.epoch != self._epoch:
            self._say(address, kv.Refused(message.sub, "stale_epoch"))
            return
        if (reason := self._table.ended.get(message.key)) is not None:
            self._say(address, kv.Refused(message.sub, reason))
            return
        wants = {want.group: want for want in message.wants}
        until = time.monotonic() + message.deadline_s
        subscriber = Subscriber((address, message.sub), wants, message.heads, until)
        if (lease := self._table.subscribe(message.key, subscriber)) is not None:
            self._begin(lease, subscriber)

    def _reclaim(self) -> None:
        self._table.reclaim()
        self._grant()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            expired, lapsed = self._table.overdue()
            for key in expired:
                self.close(key, "expired")
            for subscriber in lapsed:
                self._say(subscriber.id[0], kv.Refused(subscriber.id[1], "unknown_key"))
            self._reclaim()


@dataclass(slots=True)
class _Load:
    """A load in flight. ``missing``: blocks not announced yet, by group."""

    spec: kv.Load
    ended: asyncio.Future[None]
    missing: dict[int, set[int]]
    manifest: kv.Manifest | None = None
    nbytes: int = 0
    first_at: float = 0.0


@dataclass(slots=True)
class _Peer:
    """A connection to a producer, and its loads by subscription. ``busy_until``: when what it sends to all
    workers of this process has left, on the event loop's clock."""

    socket: zmq.asyncio.Socket
    busy_until: float = 0.0
    task: asyncio.Task[None] | None = None
    loads: dict[int, _Load] = field(default_factory=dict)


class CountedConsumer:
    """A :class:`Consumer` of announced blocks; one serves any number of workers of a process.

    Args:
        latency_s: of a transfer.
        bandwidth: bytes a second of a producer's link.
        time_scale: seconds that a simulated second takes.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        *,
        latency_s: float,
        bandwidth: float,
        time_scale: float = 1.0,
        keys_dir: Path | None = None,
    ) -> None:
        self._context = context
        self._latency_s = latency_s
        self._bandwidth = bandwidth
        self._time_scale = time_scale
        self._keys_dir = keys_dir
        self._id = secrets.token_bytes(16)
        self._subs = itertools.count(1)
        self._peers: dict[str, _Peer] = {}
        self._holds: dict[kv.Key, tuple[str, ...]] = {}
        self._alive = asyncio.create_task(self._keep_alive())

    async def load(self, spec: kv.Load, links: list[bytes]) -> kv.Loaded:
        started = time.monotonic()
        source = spec.sources[0]
        peer, sub = self._peer(source.endpoint), next(self._subs)
        ended = asyncio.get_running_loop().create_future()
        load = peer.loads[sub] = _Load(
            spec, ended, {s.group: set(range(s.first, s.first + len(s.block_ids))) for s in spec.spans}
        )
        wants = tuple(kv.Want(s.group, s.first, len(s.block_ids)) for s in spec.spans)
        said: kv.Done | kv.Drop = kv.Drop(spec.key, sub)
        try:
            heads = source.first, source.last
            _say(peer, kv.Subscribe(spec.key, sub, source.epoch, wants, heads, spec.deadline_s))
            async with asyncio.timeout(spec.deadline_s):
                await ended
                await asyncio.sleep(self._payload_s(peer, load.nbytes))
            said = kv.Done(spec.key, sub)
        except TimeoutError:
            raise LoadFailed("timeout") from None
        finally:
            del peer.loads[sub]
            _say(peer, said)
        blocks = sum(len(span.block_ids) for span in spec.spans)
        wait_s, wire_s = load.first_at - started, time.monotonic() - load.first_at
        return kv.Loaded(spec.key, load.nbytes, blocks, wait_s, wire_s, 0.0, TRANSPORT, 0)

    def hold(self, message: kv.Hold) -> None:
        if message.endpoints:
            self._holds[message.key] = message.endpoints
        else:
            self._holds.pop(message.key, None)

    async def stop(self) -> None:
        self._alive.cancel()
        tasks = [self._alive, *(peer.task for peer in self._peers.values() if peer.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for peer in self._peers.values():
            peer.socket.close()

    def _payload_s(self, peer: _Peer, nbytes: int) -> float:
        """Seconds until these bytes are here: transfers leave a producer's link one after the other."""
        now = asyncio.get_running_loop().time()
        peer.busy_until = max(now, peer.busy_until) + nbytes / self._bandwidth * self._time_scale
        return peer.busy_until - now + self._latency_s * self._time_scale

    def _peer(self, endpoint: str) -> _Peer:
        peer = self._peers.get(endpoint)
        if peer is None:
            socket = self._context.socket(zmq.DEALER)
            socket.linger = 200
            socket.sndhwm = 0
            socket.maxmsgsize = kv.MAX_MESSAGE
            apply_curve_client(socket, self._keys_dir)
            socket.connect(endpoint)
            peer = self._peers[endpoint] = _Peer(socket)
            peer.task = asyncio.create_task(self._receive(peer))
            _say(peer, kv.Hello(self._id, 1, "sim", ((TRANSPORT, b""),)))
        return peer

    async def _receive(self, peer: _Peer) -> None:
        while True:
            frame = await peer.socket.recv()
            try:
                message = kv.decode_data(frame)
            except kv.KvWireError as error:
                log.warning("kv_malformed_message", extra={"detail": str(error)})
                continue
            if isinstance(message, kv.Manifest | kv.Blocks | kv.Refused):
                load = peer.loads.get(message.sub)
                if load is not None and not load.ended.done():
                    _advance(load, message)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_S)
            for endpoint in {endpoint for endpoints in self._holds.values() for endpoint in endpoints}:
                self._peer(endpoint)
            for endpoint, peer in self._peers.items():
                loads = [load.spec.key for load in peer.loads.values()]
                holds = [key for key, endpoints in self._holds.items() if endpoint in endpoints]
                if loads or holds:
                    _say(peer, kv.Alive((*loads, *holds)))


def _say(peer: _Peer, message: kv.Data) -> None:
    """Never full (sndhwm 0), so it leaves in order of the calls."""
    if not peer.socket.closed:
        peer.socket.send(kv.encode(message))


def _advance(load: _Load, message: kv.Manifest | kv.Blocks | kv.Refused) -> None:
    match message:
        case kv.Refused():
            load.ended.set_exception(LoadFailed(message.reason))
            return
        case kv.Manifest():
            if why := _mismatch(load.spec, message):
                load.ended.set_exception(LoadFailed(why))
                return
            load.manifest = message
        case kv.Blocks():
            load.first_at = load.first_at or time.monotonic()
            load.nbytes += message.nbytes
            load.missing[message.group].difference_update(range(message.first, message.first + message.count))
    if load.manifest is not None and not any(load.missing.values()):
        load.ended.set_result(None)


def _mismatch(spec: kv.Load, manifest: kv.Manifest) -> str:
    for name in ("fingerprint", "tokens", "chain"):
        if getattr(manifest, name) != getattr(spec, name):
            return f"{name}_differs"
    return ""
