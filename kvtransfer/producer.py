"""The producer's end: holds staged KV blocks and serves them to consumers."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import torch
import zmq

from braid.keys import SEALED_BYTES, apply_curve_server
from kvtransfer import wire
from kvtransfer.arena import Arena
from kvtransfer.digest import Digests, digest
from kvtransfer.fence import Fence, Waiter
from kvtransfer.lease import Lease, LeaseTable, Subscriber
from kvtransfer.loop import Loop
from kvtransfer.plan import pieces
from kvtransfer.sockets import set_heartbeat
from kvtransfer.transport import (
    Meets,
    Parcel,
    Piece,
    ProducerSide,
    ProducerTransport,
    Sender,
    Unavailable,
)
from kvtransfer.transport.zmq import ZmqSender

log = logging.getLogger("braid.kvtransfer")

MAX_EARLY = 4096
"""Subscriptions held for keys that are not open yet; more are refused."""
MAX_SUBSCRIPTIONS = 4096
"""Subscriptions of a session that have not ended; more are refused."""
WINDOW_BYTES = 64 * 1024 * 1024
"""Payload on its way to one consumer; more waits in staging until the consumer acknowledges."""
MAX_DEADLINE_S = 600.0
"""Longest a subscription may hold memory; one that asks for more is refused."""
SILENCE_S = 1.0
"""A consumer not heard of for this long is asked whether it is there (by sending it something)."""

IDLE_S = 60.0
"""The same, for one that waits for nothing: so a session does not outlast its consumer for good."""

GIVE_BACK_S = 60.0
"""Staging that nothing used for this long loses its pages, but for what lies below something used."""
GIVE_BACK_BYTES = 16 * 1024 * 1024
"""That much of it a tick: a few milliseconds."""

Fill = Callable[[range, torch.Tensor], Fence | None]
"""Writes blocks, numbered from the first one handed over, into ``[layers, count, heads, row_bytes]``."""


@dataclass(slots=True)
class _Session:
    """One connected consumer. ``queue``: parcels that wait for the window; ``told``: when it was last looked
    after."""

    address: bytes
    consumer: bytes
    number: int
    name: str
    sender: Sender
    queue: deque[Parcel] = field(default_factory=deque)
    unacked: int = 0
    heard: float = 0.0
    told: float = 0.0
    subscriptions: dict[int, wire.Key] = field(default_factory=dict)


class Producer:
    """Holds finished blocks of prompts in host memory and streams them to subscribers.

    All methods but :meth:`stage` are called by who holds ``loop``. A piece's memory is used again only when
    its lease has closed and every subscription has ended or passed its deadline (:mod:`kvtransfer.lease`).

    Args:
        loop: thread that will own the socket.
        bind: ZMQ endpoint; ``tcp://127.0.0.1:*`` picks a free port.
        epoch: of this engine; subscriptions to another are refused as ``stale_epoch``.
        shapes: of this rank's groups, as blocks travel.
        arena: the memory blocks are staged in; the producer closes it.
        lease_s: see :class:`~kvtransfer.lease.LeaseTable`.
        emit: receives ``Opened``, ``Closed``.
        transports: makes those this producer has.
        piece_bytes: largest parcel (one block at least), but for a single subscriber whose transport likes
            them larger.
        codec: names how ``fill`` encodes rows ("" for not at all); ``shapes`` are those of encoded ones.
        keys_dir: the cluster's CURVE keys (:mod:`braid.keys`), None for none; who owns the context ends its
            authenticator.

    Raises:
        ValueError: a block is larger than a payload may be.
        OSError: it can't be served there.
    """

    def __init__(
        self,
        loop: Loop,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        bind: str,
        epoch: int,
        shapes: Sequence[wire.Shape],
        arena: Arena,
        lease_s: float,
        emit: Callable[[wire.Event], None],
        transports: Callable[[ProducerSide], Sequence[ProducerTransport]],
        piece_bytes: int,
        digests: Digests,
        codec: str = "",
        keys_dir: Path | None = None,
    ) -> None:
        largest = max(shape.block_bytes for shape in shapes)
        if largest > wire.MAX_PAYLOAD:
            raise ValueError(
                f"a block of {largest} bytes is over the {wire.MAX_PAYLOAD} that can be sent at a time: "
                "choose a smaller block size"
            )
        self._loop = loop
        self._epoch = epoch
        self._shapes = tuple(shapes)
        self._emit = emit
        self._arena = arena
        self._memory = torch.frombuffer(arena.memory, dtype=torch.uint8)
        self._piece_bytes = piece_bytes
        self._digests = digests
        self._codec = codec
        self.table: LeaseTable[Piece] = LeaseTable(
            arena.allocate, arena.free, arena.capacity, lease_s, time.monotonic
        )
        self._lock = threading.Lock()  # a lease's end against a thread that begins to fill it
        self._waiter = Waiter(loop, "braid-kv-fence")
        self._sessions: dict[bytes, _Session] = {}
        self._give_back_at = time.monotonic() + GIVE_BACK_S
        self._departed: dict[bytes, _Session] = {}  # ended, and their memory may still be read
        self._socket = self._bind(context, bind, keys_dir)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._transports = {t.name: t for t in transports(ProducerSide(loop, self._socket, arena))}
        loop.add(self._socket, self._receive)
        loop.every_tick(self._tick)

    @staticmethod
    def _bind(context: zmq.Context[zmq.Socket[bytes]], bind: str, keys_dir: Path | None) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE + SEALED_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the window
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a consumer that is gone is an error
        set_heartbeat(socket)
        if keys_dir is not None:
            apply_curve_server(socket, keys_dir)
        try:
            socket.bind(bind)
        except zmq.ZMQError as error:
            socket.close()
            why = os.strerror(error.errno or 0)
            raise OSError(f"KV can't be served on {bind} ({why}): choose another with --kv-bind") from None
        return socket

    def close(self) -> None:
        """Let go of transports and memory; after the loop has stopped."""
        self._waiter.stop()
        for session in self._sessions.values():
            session.sender.close()
        for transport in self._transports.values():
            transport.close()
        self._arena.close()

    # --- leases ---

    def open(self, message: wire.Open) -> None:
        """Reserve staging; answered by ``Opened`` when there is room, or ``Closed`` if refused."""
        manifest = wire.Manifest(
            0, self._epoch, message.tokens, message.chain, message.fingerprint, self._shapes, self._codec
        )
        spans = {span.group: span for span in message.spans}
        try:
            if len(spans) < len(message.spans):
                raise ValueError(f"a group is named twice: {message.spans}")
            nbytes = sum(self._bytes_of(span) for span in message.spans)
            self.table.open(Lease(message.key, manifest, spans, nbytes, message.subscribers))
        except ValueError as error:
            for subscriber in self.table.refuse(message.key):
                self._tell(subscriber, wire.Refused(subscriber.id[1], "refused"))
            self._emit(wire.Closed(message.key, str(error)))
            return
        if self.table.waiting[message.key].spent:  # all that wanted it have left before
            self.end(message.key, "done")
        else:
            self._grant()

    def _bytes_of(self, span: wire.Want) -> int:
        """Staging that blocks take. Raises ValueError for blocks that can't be."""
        if not 0 <= span.group < len(self._shapes) or span.first < 0 or span.count < 0:
            raise ValueError(f"this cache has no such blocks: {span}")
        return span.count * self._shapes[span.group].block_bytes

    def stage(self, key: wire.Key, group: int, first: int, count: int, fill: Fill) -> bool:
        """Copy blocks ``[first, first + count)`` of a group into the lease and hand them on; from any thread.

        What ``fill`` raises is raised, and ends the lease as ``copy_failed``.

        ``fill`` is called here, once a piece; blocks are sent as soon as its fence has passed. Blocks of a
        group come in order, each once. Returns whether the lease is still there.

        Raises:
            ValueError: blocks that are not in the lease, or do not follow the last; ends it just so.
        """
        with self._lock:
            lease = self.table.held.get(key)
            if lease is None:
                return False
            lease.writers += 1
        lease.early = lease.sent
        well = False
        try:
            self._follow(lease, group, first, count)
            block_bytes = self._shapes[group].block_bytes
            piece_bytes = min(self._piece_bytes * lease.stretch, wire.MAX_PAYLOAD // 2)
            for run in pieces(0, count, block_bytes, piece_bytes):
                piece = self._piece(lease, group, first + run.start, len(run))
                fence = fill(run, piece.rows)
                if fence is None:
                    self._loop.call_soon(partial(self._publish, lease, piece))
                else:
                    with self._lock:
                        lease.writers += 1
                    meanwhile = piece.wrap if lease.wrapped else _nothing
                    self._waiter.after(fence, partial(self._written, lease, piece), meanwhile)
            well = True
            return True
        finally:
            with self._lock:
                lease.writers -= 1
            if not well:  # what follows would have a gap before it
                self._loop.call_soon(partial(self._spoil, lease))

    def _follow(self, lease: Lease[Piece], group: int, first: int, count: int) -> None:
        """These blocks are staged now. Raises ValueError if they can't be."""
        span = lease.spans.get(group)
        if span is None or not span.first <= first <= first + count <= span.first + span.count:
            raise ValueError(
                f"blocks [{first}, {first + count}) of group {group} are not in the lease's {span}"
            )
        with self._lock:
            expected = lease.staged.get(group, span.first)
            if first != expected:
                raise ValueError(f"block {first} of group {group} does not follow: {expected} is the next")
            lease.staged[group] = first + count

    def _piece(self, lease: Lease[Piece], group: int, first: int, count: int) -> Piece:
        """The place of blocks in a lease's memory: groups one after the other, blocks in order."""
        span, shape = lease.spans[group], self._shapes[group]
        before = sum(s.count * self._shapes[g].block_bytes for g, s in lease.spans.items() if g < group)
        at = lease.at + before + (first - span.first) * shape.block_bytes
        end, layout = at + count * shape.block_bytes, (shape.layers, count, shape.heads, shape.row_bytes)
        rows = self._memory[at:end].view(layout)
        return Piece(group, first, count, at, rows, layout, self._arena.memory[at:end])

    def _written(self, lease: Lease[Piece], piece: Piece, well: bool) -> None:
        with self._lock:
            lease.writers -= 1
        if well:
            self._publish(lease, piece)
        else:
            self._spoil(lease)

    def _spoil(self, lease: Lease[Piece]) -> None:
        """Some of its blocks could not be copied."""
        if self.table.held.get(lease.key) is lease:
            self.end(lease.key, "copy_failed")

    def _publish(self, lease: Lease[Piece], piece: Piece) -> None:
        if self.table.held.get(lease.key) is not lease:  # it has ended; the key may be another's by now
            return
        try:
            self.table.publish(lease.key, piece)
        except ValueError as error:  # a fence was overtaken by copies without one
            log.error("kv_blocks_overtaken", extra={"ticket": lease.key.id.hex(), "detail": str(error)})
            self._spoil(lease)
            return
        piece.digest = self._digests.of(piece.rows)
        for subscriber in list(lease.subscribers.values()):
            self._feed(lease, subscriber)

    def end(self, key: wire.Key, reason: str) -> None:
        """End a lease; subscribers that still wait are refused with ``reason``. Idempotent."""
        with self._lock:
            lease = self.table.close(key, reason)
        if lease is None:
            return
        for subscriber in list(lease.subscribers.values()):  # one that is gone is forgotten meanwhile
            if not subscriber.ended:
                self._drop_queued(*subscriber.id)
                self._tell(subscriber, wire.Refused(subscriber.id[1], reason))
        self._emit(wire.Closed(key, reason, lease.sent, lease.early))
        self._grant()

    def stats(self) -> wire.Stats:
        """What is held now."""
        table = self.table
        return wire.Stats(table.reserved, len(table.held), len(table.waiting) + table.awaited)

    def _grant(self) -> None:
        with self._lock:
            self.table.reclaim()
            granted = self.table.grant()
        for lease in granted:
            self._emit(wire.Opened(lease.key))
            for subscriber in list(lease.subscribers.values()):
                self._start(lease, subscriber)

    # --- subscriptions ---

    def _start(self, lease: Lease[Piece], subscriber: Subscriber) -> None:
        """Attest what will be sent, and send what is there."""
        session = self._sessions.get(subscriber.id[0])
        if session is None or subscriber.ended:
            return
        if not self._serves(lease, subscriber):
            log.warning("kv_bad_blocks", extra={"peer": session.name, "security": True})
            self.table.end_subscriber(lease.key, subscriber.id)
            self._tell(subscriber, wire.Refused(subscriber.id[1], "bad_blocks"))
            return
        lease.stretch = session.sender.stretch if len(lease.subscribers) == 1 else 1
        lease.wrapped |= session.sender.wraps
        self._tell(subscriber, msgspec.structs.replace(lease.manifest, sub=subscriber.id[1]))
        self._feed(lease, subscriber)

    def _serves(self, lease: Lease[Piece], subscriber: Subscriber) -> bool:
        """Whether everything wanted is in the lease."""
        for group, want in subscriber.wants.items():
            span = lease.spans.get(group)
            if span is None or want.count < 1:
                return False
            if want.first < span.first or want.first + want.count > span.first + span.count:
                return False
            if not 0 <= subscriber.heads[0] < subscriber.heads[1] <= self._shapes[group].heads:
                return False
        return True

    def _feed(self, lease: Lease[Piece], subscriber: Subscriber) -> None:
        """Queue the published pieces that this subscription lacks."""
        session = self._sessions.get(subscriber.id[0])
        if session is None or subscriber.ended or subscriber.id[1] not in session.subscriptions:
            return
        for piece, skip, count in lease.next_parcels(subscriber):
            session.queue.append(Parcel(subscriber.id[1], piece, skip, count, subscriber.heads))
        self._pump(session)

    def _pump(self, session: _Session) -> None:
        """Send what the window allows."""
        while session.queue and session.unacked < WINDOW_BYTES:
            parcel = session.queue.popleft()
            session.unacked += parcel.nbytes
            self._count(session, parcel)
            whole = parcel.whole or not parcel.piece.digest
            try:
                session.sender.send(parcel, parcel.piece.digest if whole else digest(parcel.rows))
            except zmq.ZMQError as error:
                self._gone(session, error)
                return

    def _count(self, session: _Session, parcel: Parcel) -> None:
        lease = self.table.held.get(session.subscriptions[parcel.sub])
        if lease is not None:
            lease.sent += parcel.nbytes

    def _tell(self, subscriber: Subscriber, message: wire.Data) -> None:
        session = self._sessions.get(subscriber.id[0])
        if session is not None:
            self._send(session, message)

    def _send(self, session: _Session, message: wire.Data) -> None:
        try:
            self._socket.send_multipart([session.address, wire.encode(message)])
        except zmq.ZMQError as error:
            self._gone(session, error)

    def _gone(self, session: _Session, error: zmq.ZMQError) -> None:
        """A consumer's connection is lost: so are its subscriptions. It comes back with a new session."""
        if error.errno != errno.EHOSTUNREACH:
            log.error("kv_send_failed", extra={"peer": session.name, "detail": str(error)})
        if self._sessions.get(session.consumer) is session:
            del self._sessions[session.consumer]
            self._end_session(session)
            self._grant()

    def _end_session(self, session: _Session) -> None:
        session.queue.clear()
        session.sender.close()
        self._forget(session)

    def _forget(self, session: _Session) -> None:
        """Its subscriptions hold memory no longer; not yet, if it may still read."""
        reads_on = session.sender.outlives
        with self._lock:
            self.table.forget_consumer(session.consumer, reads_on)
        if reads_on:
            self._departed[session.consumer] = session
        else:
            self._departed.pop(session.consumer, None)

    # --- messages ---

    def _receive(self) -> None:
        for _ in range(256):
            try:
                address, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for frame in frames:
                try:
                    self._handle(address, wire.decode_data(frame))
                except wire.KvWireError as error:
                    log.warning("kv_malformed_message", extra={"detail": str(error)})

    def _handle(self, address: bytes, message: wire.Data) -> None:
        match message:
            case wire.Hello():
                self._hello(address, message)
                return
            case wire.Lane(consumer, number):
                self._lane(address, consumer, number)
                return
        session = self._session_at(address)
        if session is None:
            self._reply(address, wire.Refused(0, "no_session"))
            return
        session.heard = time.monotonic()
        match message:
            case wire.Subscribe():
                self._subscribe(session, message)
            case wire.Ack(number, nbytes):
                if number == session.number:
                    session.unacked = max(0, session.unacked - max(0, nbytes))
                    self._pump(session)
            case wire.Done(key, sub) | wire.Drop(key, sub):
                self._ended(session, key, sub)
            case wire.Alive(keys):
                for key in keys:
                    self.table.alive(key)
            case wire.Rendezvous(number, name, value):
                if number == session.number and isinstance(session.sender, Meets):
                    session.sender.told(name, value)
            case _:
                log.warning("kv_unexpected_message", extra={"kind": type(message).__name__})

    def _sessions_at(self, address: bytes, last: _Session | None) -> list[_Session]:
        """Those that a new one takes the place of: the consumer's ``last``, and any of the connection's."""
        found = [s for s in self._sessions.values() if s.address == address and s is not last]
        return found if last is None else [last, *found]

    def _session_at(self, address: bytes) -> _Session | None:
        return next((s for s in self._sessions.values() if s.address == address), None)

    def _reply(self, address: bytes, message: wire.Data) -> None:
        try:
            self._socket.send_multipart([address, wire.encode(message)])
        except zmq.ZMQError:
            log.info("kv_consumer_left")

    def _hello(self, address: bytes, hello: wire.Hello) -> None:
        """Begin a session with the first transport that works for both; it replaces the consumer's last."""
        last = self._sessions.get(hello.consumer)
        if last is not None and last.number >= hello.session:
            self._reply(address, wire.Refused(0, "stale_session"))
            return
        for name, offer in hello.offers:
            transport = self._transports.get(name)
            if transport is None:
                continue
            try:
                sender, data = transport.accept(hello, offer, address)
            except (Unavailable, OSError, RuntimeError) as error:  # no thread can be started, say
                log.info("kv_transport_unavailable", extra={"transport": name, "detail": str(error)})
                continue
            for other in self._sessions_at(address, last):
                self._sessions.pop(other.consumer, None)
                self._end_session(other)
            with self._lock:  # who starts over has closed what it read
                self.table.forget_consumer(hello.consumer, reads_on=False)
            self._departed.pop(hello.consumer, None)
            session = _Session(address, hello.consumer, hello.session, hello.name, sender)
            session.heard = time.monotonic()
            self._sessions[hello.consumer] = session
            self._send(session, wire.Welcome(hello.session, name, data))
            return
        self._reply(address, wire.Refused(0, "no_transport"))

    def _lane(self, address: bytes, consumer: bytes, number: int) -> None:
        session = self._sessions.get(consumer)
        if session is not None and session.number == number and isinstance(session.sender, ZmqSender):
            session.sender.add_lane(address)

    def _subscribe(self, session: _Session, message: wire.Subscribe) -> None:
        if not 0 <= message.deadline_s <= MAX_DEADLINE_S:
            return self._send(session, wire.Refused(message.sub, "bad_deadline"))
        if message.epoch != self._epoch:
            log.warning("kv_stale_epoch", extra={"peer": session.name, "security": True})
            return self._send(session, wire.Refused(message.sub, "stale_epoch"))
        if (reason := self.table.ended.get(message.key)) is not None:
            log.info("kv_subscription_late", extra={"peer": session.name, "reason": reason})
            return self._send(session, wire.Refused(message.sub, reason))
        groups = len({want.group for want in message.wants})
        if not groups == len(message.wants) <= len(self._shapes):
            log.warning("kv_bad_blocks", extra={"peer": session.name, "security": True})
            return self._send(session, wire.Refused(message.sub, "bad_blocks"))
        early = not self.table.knows(message.key)
        if (early and self.table.early_subscribers >= MAX_EARLY) or (
            len(session.subscriptions) >= MAX_SUBSCRIPTIONS
        ):
            return self._send(session, wire.Refused(message.sub, "overloaded"))
        if message.sub in session.subscriptions:
            log.warning("kv_subscription_repeated", extra={"peer": session.name})
            return None
        until = time.monotonic() + message.deadline_s
        wants = {want.group: want for want in message.wants}
        subscriber = Subscriber((session.consumer, message.sub), wants, message.heads, until)
        session.subscriptions[message.sub] = message.key
        lease = self.table.subscribe(message.key, subscriber)
        if lease is not None:
            self._start(lease, subscriber)
        return None

    def _ended(self, session: _Session, key: wire.Key, sub: int) -> None:
        known = session.subscriptions.get(sub)
        if known != key:  # of a session before; or forged: it would end one and forget another
            if known is not None:
                log.warning("kv_forged_end", extra={"peer": session.name, "security": True})
            return
        del session.subscriptions[sub]
        self._drop_queued(session.consumer, sub)
        if self.table.end_subscriber(key, (session.consumer, sub)):
            self.end(key, "done")
        elif self.table.closing:
            self._grant()

    def _drop_queued(self, consumer: bytes, sub: int) -> None:
        """What waits for the window lies in memory that may have another owner when the window moves on."""
        if (session := self._sessions.get(consumer)) is not None:
            session.queue = deque(parcel for parcel in session.queue if parcel.sub != sub)

    def _tick(self) -> None:
        expired, lapsed = self.table.overdue()
        for key in expired:
            log.warning("kv_lease_expired", extra={"ticket": key.id.hex()})
            self.end(key, "expired")
        for subscriber in lapsed:
            log.warning("kv_unknown_ticket", extra={"security": True})
            self._tell(subscriber, wire.Refused(subscriber.id[1], "unknown_ticket"))
        self._look_after_silent()
        for session in list(self._departed.values()):
            self._forget(session)
            if not self.table.reads(session.consumer):
                self._departed.pop(session.consumer, None)
        if self.table.closing:
            self._grant()
        self._give_back()

    def _give_back(self) -> None:
        if time.monotonic() >= self._give_back_at:
            self._give_back_at = time.monotonic() + GIVE_BACK_S
            self._arena.age()
        try:
            self._arena.give_back(GIVE_BACK_BYTES)
        except OSError as error:  # locked memory, say
            log.info("kv_staging_stays", extra={"detail": str(error)})
            self._arena.hold_pages()

    def _look_after_silent(self) -> None:
        """Send something to consumers that wait in silence: ZMQ knows whether they are still connected."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            limit = SILENCE_S if session.subscriptions else IDLE_S
            if now - max(session.heard, session.told) > limit:
                session.told = now
                self._send(session, wire.Alive(()))


def _nothing() -> None:
    """There is nothing to do."""
