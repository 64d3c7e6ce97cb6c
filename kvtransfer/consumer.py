"""The consumer's end: pulls blocks from producers into this engine's paged cache."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from braid.keys import SEALED_BYTES, apply_curve_client
from kvtransfer import wire
from kvtransfer.cache import Cache
from kvtransfer.codec import Codec
from kvtransfer.digest import digest
from kvtransfer.fence import Waiter
from kvtransfer.loads import Load, Part
from kvtransfer.loop import Loop
from kvtransfer.rows import as_tensor
from kvtransfer.sockets import receive_frames, set_heartbeat
from kvtransfer.target import Target
from kvtransfer.transport import ConsumerSide, ConsumerTransport, Meets, Receiver, Unavailable

log = logging.getLogger("braid.kvtransfer")

ALIVE_S = 2.0
"""Period in which waiting loads, and those that will come, extend their leases."""
IDLE_S = 300.0
"""A connection without loads is closed after this long."""
CONNECT_S = 5.0
"""A producer that can't be reached for this long fails the loads that wait for it."""
RESUME_S = 1.0
"""The same, for one that was connected before."""
MAX_RETRIES = 3
"""Times a load is resumed after a connection of its broke."""
ACK_BYTES = 16 * 1024 * 1024
"""Payload after which the producer's window is moved on; a fraction of its size."""

EARLY_BYTES = 64 * 1024 * 1024 + wire.MAX_PAYLOAD
"""Payload of a load that is kept before its manifest has come: as much as may be on its way, a producer's
window and the parcel that crosses it."""

Socket = zmq.Socket[bytes]
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class _Refusal(Exception):
    """The producer's side of a load is not what was asked for; the load fails with this reason."""


@dataclass(slots=True)
class _Peer:
    """A connection to a producer. ``up``: a session is agreed. ``trouble_at``: since when there is none.
    ``lost``: ZMQ does not connect it again by itself."""

    endpoint: str
    socket: Socket
    monitor: Socket
    idle_since: float
    trouble_at: float
    session: int = 0
    up: bool = False
    known: bool = False
    lost: bool = False
    transport: str = ""
    receiver: Receiver | None = None
    unusable: set[str] = field(default_factory=set)
    unacked: int = 0


class Consumer:
    """Runs loads: subscribe, verify the manifest, write blocks as they come, acknowledge.

    Runs on ``loop``. Only this class writes the blocks of a load, and only between ``load`` and the
    event that ends it (``Loaded`` or ``Failed``, exactly one, unless the loop stops before). A load fails
    on: a manifest that does not match what the server expects, a refusal, a digest that does not match, a
    connection lost more often than it is resumed, its deadline, or ``unload``.

    Args:
        cache: where blocks go.
        transports: makes those this consumer has, in order of preference.
        codecs: encodings this consumer takes, by name.
        keys_dir: as a producer's.
    """

    def __init__(
        self,
        loop: Loop,
        context: zmq.Context[Socket],
        cache: Cache,
        *,
        name: str,
        emit: Callable[[wire.Event], None],
        transports: Callable[[ConsumerSide], Sequence[ConsumerTransport]],
        codecs: Mapping[str, Codec] | None = None,
        keys_dir: Path | None = None,
    ) -> None:
        self._loop = loop
        self._context = context
        self._cache = cache
        self._name = name
        self._emit = emit
        self._codecs = dict(codecs or {})
        self._keys_dir = keys_dir
        self._id = secrets.token_bytes(16)
        side = ConsumerSide(loop, self._id_at, self._lane, self._say)
        self._transports = {t.name: t for t in transports(side)}
        self._waiter = Waiter(loop, "braid-kv-fence")
        self._sessions = itertools.count(1)
        self._subs = itertools.count(1)
        self._loads: dict[wire.Key, Load] = {}
        self._holds: dict[wire.Key, tuple[str, ...]] = {}
        self._parts: dict[int, Part] = {}
        self._peers: dict[str, _Peer] = {}
        self._alive_due = 0.0
        loop.every_tick(self._tick)

    def load(self, spec: wire.Load) -> None:
        """Start a load. A key in flight is refused with ``Failed`` (``duplicate``)."""
        if spec.key in self._loads or not self._in_range(spec):
            self._emit(wire.Failed(spec.key, "duplicate" if spec.key in self._loads else "bad_blocks"))
            return
        now = time.monotonic()
        load = Load(spec, now, now + spec.deadline_s)
        self._loads[spec.key] = load
        for source in spec.sources:
            missing = {s.group: set(range(s.first, s.first + len(s.block_ids))) for s in spec.spans}
            load.parts.append(Part(load, source, missing, self._targets(spec, source)))
        for part in load.parts:
            peer = self._reach(part.source.endpoint)
            if peer is None:
                self._fail(load, "unreachable")
                return
            if peer.up:
                self._subscribe(peer, part)

    def _targets(self, spec: wire.Load, source: wire.Source) -> dict[int, tuple[int, Target]]:
        heads = source.last - source.first
        return {
            span.group: (span.first, Target(self._cache, span.group, span.block_ids, heads, source.put))
            for span in spec.spans
        }

    def hold(self, message: wire.Hold) -> None:
        """Keep the lease of a prompt whose load will come later; or no longer, if no producer is named."""
        if message.endpoints:
            self._holds[message.key] = message.endpoints
        else:
            self._holds.pop(message.key, None)

    def unload(self, key: wire.Key, reason: str) -> None:
        """Stop a load. Answered by ``Failed`` in any case: after it, nothing writes for this key."""
        if (load := self._loads.get(key)) is not None:
            self._fail(load, reason)
        else:
            self._emit(wire.Failed(key, reason))

    def stats(self) -> wire.Stats:
        """What is in flight or held now."""
        return wire.Stats(loads=len(self._loads) + len(self._holds))

    def close(self) -> None:
        """Let go of the transports; after the loop has stopped."""
        self._waiter.stop()
        for peer in self._peers.values():
            if peer.receiver is not None:
                peer.receiver.close()
        for transport in self._transports.values():
            transport.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if subscriptions and loads do not match; on the loop."""
        for sub, part in self._parts.items():
            assert part.sub == sub
            assert self._loads.get(part.load.spec.key) is part.load
        for load in self._loads.values():
            assert not load.failed or load.writing > 0

    def _in_range(self, spec: wire.Load) -> bool:
        """Whether blocks and heads exist here, and no group is named twice; block 0 is never written."""
        shapes = self._cache.shapes
        once = len({span.group for span in spec.spans}) == len(spec.spans)
        return (
            bool(spec.sources)
            and once
            and all(
                0 <= span.group < len(shapes)
                and all(0 < block < self._cache.blocks for block in span.block_ids)
                and all(
                    0 <= s.first < s.last and 0 <= s.put <= shapes[span.group].heads - (s.last - s.first)
                    for s in spec.sources
                )
                for span in spec.spans
            )
        )

    # --- connections ---

    def _id_at(self, endpoint: str) -> bytes:
        """Of one a connection: a producer that has two endpoints would take the later for the first's next
        session."""
        return hashlib.blake2b(endpoint.encode(), key=self._id, digest_size=len(self._id)).digest()

    def _reach(self, endpoint: str) -> _Peer | None:
        """As :meth:`_peer`; None if no connection can be opened, as where descriptors have run out or keys
        can't be read."""
        try:
            return self._peer(endpoint)
        except (zmq.ZMQError, ValueError) as error:
            log.error("kv_connection_failed", extra={"peer": endpoint, "detail": str(error)})
            return None

    def _peer(self, endpoint: str) -> _Peer:
        now = time.monotonic()
        if (peer := self._peers.get(endpoint)) is None:
            socket = self._open(endpoint)
            try:
                monitor: Socket = socket.get_monitor_socket(_EVENTS)
            except zmq.ZMQError:
                socket.close(linger=0)
                raise
            try:
                socket.connect(endpoint)
            except zmq.ZMQError:
                socket.disable_monitor()
                monitor.close(linger=0)
                socket.close(linger=0)
                raise
            peer = self._peers[endpoint] = _Peer(endpoint, socket, monitor, now, now)
            self._loop.add(socket, lambda: self._receive(peer, socket))
            self._loop.add(monitor, lambda: self._monitored(peer))
        peer.idle_since = now
        return peer

    def _open(self, endpoint: str) -> Socket:
        socket: Socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD + SEALED_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 64)
        socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the loads; nobody asks again for what was not sent
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        set_heartbeat(socket)
        if self._keys_dir is not None:
            try:
                apply_curve_client(socket, self._keys_dir)
            except ValueError:
                socket.close(linger=0)
                raise
        return socket

    def _lane(self, endpoint: str) -> tuple[Socket, Callable[[], None]]:
        """A further connection of a session, and what closes it."""
        peer = self._peers[endpoint]
        session, socket = peer.session, self._open(endpoint)
        monitor: Socket = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._loop.add(socket, lambda: self._receive(peer, socket))
        self._loop.add(monitor, lambda: self._lane_lost(peer, session, monitor))
        socket.connect(endpoint)

        def close() -> None:
            if not socket.closed:  # by the loop's stop
                socket.disable_monitor()
            self._loop.remove(monitor)
            self._loop.remove(socket)

        return socket, close

    def _lane_lost(self, peer: _Peer, session: int, monitor: Socket) -> None:
        """What was on its way on this connection is lost: a new session asks for it again."""
        try:
            recv_monitor_message(monitor, zmq.NOBLOCK)
        except zmq.Again:
            return
        if peer.up and peer.session == session:
            self._greet(peer)

    def _say(self, endpoint: str, message: wire.Data) -> None:
        if (peer := self._peers.get(endpoint)) is not None:
            self._send(peer, message)

    def _monitored(self, peer: _Peer) -> None:
        try:
            event = recv_monitor_message(peer.monitor, zmq.NOBLOCK)["event"]
        except zmq.Again:
            return
        # A retry follows every disconnection but that of a peer whose bytes were no ZMTP.
        peer.lost = event not in (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_CONNECT_RETRIED, zmq.EVENT_CLOSED)
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._greet(peer)
        elif event == zmq.EVENT_DISCONNECTED:
            self._down(peer)
            peer.unusable.clear()  # it may come back as another process
        elif event != zmq.EVENT_CONNECT_RETRIED and peer.known:  # it was there, and now nobody listens
            self._give_up(peer, "disconnected")

    def _greet(self, peer: _Peer) -> None:
        """Begin a session."""
        self._down(peer)
        peer.session = next(self._sessions)
        offers = []
        for name, transport in self._transports.items():
            if name not in peer.unusable:
                try:
                    offers.append((name, transport.offer()))
                except Unavailable as error:
                    log.info("kv_transport_unavailable", extra={"transport": name, "detail": str(error)})
        self._send(peer, wire.Hello(self._id_at(peer.endpoint), peer.session, self._name, tuple(offers)))

    def _down(self, peer: _Peer) -> None:
        """There is no session: its subscriptions are void, their loads are resumed in the next one."""
        if not peer.up:
            return
        peer.up, peer.trouble_at, peer.unacked = False, time.monotonic(), 0
        if peer.receiver is not None:
            peer.receiver.close()
            peer.receiver = None
        for load in self._loads_from(peer.endpoint):
            for part in load.parts:
                if part.source.endpoint == peer.endpoint and not part.complete:
                    self._parts.pop(part.sub, None)
                    part.sub, part.manifest, part.early_bytes = 0, None, 0
                    part.early.clear()
                    part.retries += 1
            if load.retries > MAX_RETRIES:
                self._fail(load, "disconnected")

    def _loads_from(self, endpoint: str) -> list[Load]:
        """Loads that still wait for something from a producer."""
        return [
            load
            for load in self._loads.values()
            if not load.failed
            and any(part.source.endpoint == endpoint and not part.complete for part in load.parts)
        ]

    def _give_up(self, peer: _Peer, reason: str) -> None:
        for load in self._loads_from(peer.endpoint):
            self._fail(load, reason)

    def _welcome(self, peer: _Peer, message: wire.Welcome) -> None:
        if message.session != peer.session or peer.up:
            return
        transport = self._transports.get(message.transport)
        try:
            if transport is None:
                raise Unavailable("not offered")
            peer.receiver = transport.open(
                message,
                peer.endpoint,
                lambda blocks, rows: self._deliver(peer, message.session, blocks, rows),
                lambda reason: self._broken(peer, message.session, reason),
            )
        except (Unavailable, OSError, RuntimeError, zmq.ZMQError) as error:  # no thread can be started, say
            log.info("kv_transport_unavailable", extra={"transport": message.transport, "detail": str(error)})
            peer.unusable.add(message.transport)
            self._greet(peer)
            return
        peer.up, peer.known, peer.transport = True, True, message.transport
        for load in self._loads_from(peer.endpoint):
            for part in load.parts:
                if part.source.endpoint == peer.endpoint and part.sub == 0:
                    self._subscribe(peer, part)

    def _broken(self, peer: _Peer, session: int, reason: str) -> None:
        """The transport failed under a session: go on without it."""
        if peer.up and peer.session == session:
            log.warning("kv_transport_broken", extra={"transport": peer.transport, "detail": reason})
            peer.unusable.add(peer.transport)
            self._greet(peer)

    def _send(self, peer: _Peer, message: wire.Data) -> None:
        try:
            peer.socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("kv_peer_send_queue_full", extra={"peer": peer.endpoint})

    # --- messages ---

    def _receive(self, peer: _Peer, socket: Socket) -> None:
        for _ in range(64):
            if socket.closed:
                return
            try:
                frames = receive_frames(socket)
            except zmq.Again:
                return
            try:
                self._handle(peer, wire.decode_data(frames[0].bytes), frames[1:])
            except wire.KvWireError as error:
                log.warning("kv_malformed_message", extra={"detail": str(error), "peer": peer.endpoint})

    def _handle(self, peer: _Peer, message: wire.Data, frames: list[zmq.Frame]) -> None:
        match message:
            case wire.Blocks():  # first, as what is looked at before costs time when it counts
                self._announced(peer, message, frames)
            case wire.Welcome():
                self._welcome(peer, message)
            case wire.Manifest() | wire.Refused() if message.sub in self._parts:
                part = self._parts[message.sub]
                if part.source.endpoint == peer.endpoint:
                    self._answered(peer, part, message)
            case wire.Refused(0, reason):
                self._refused(peer, reason)
            case wire.Rendezvous(session, name, value):
                if session == peer.session and isinstance(peer.receiver, Meets):
                    peer.receiver.told(name, value)
            case wire.Alive() | wire.Manifest() | wire.Refused():
                pass  # asks whether we are there; or late, for a load that has ended
            case _:
                raise wire.KvWireError(f"unexpected {type(message).__name__}")

    def _refused(self, peer: _Peer, reason: str) -> None:
        """The producer does not know this session, or has no transport for it."""
        if reason == "no_transport":
            log.error("kv_no_common_transport", extra={"peer": peer.endpoint})
            self._give_up(peer, reason)
            self._hang_up(peer)
        elif peer.up:
            self._greet(peer)

    def _answered(self, peer: _Peer, part: Part, message: wire.Manifest | wire.Refused) -> None:
        try:
            if isinstance(message, wire.Refused):
                raise _Refusal(message.reason)
            self._check(part, message)
        except _Refusal as refusal:
            self._fail(part.load, str(refusal))
            return
        part.manifest = message
        early, part.early, part.early_bytes = part.early, [], 0
        for blocks, frames in early:
            if self._parts.get(message.sub) is part:
                self._take(peer, part, blocks, frames)
            else:  # the load has ended or starts over
                self._pass_over(peer, blocks)
        self._finish_part(peer, part)
        self._finish(part.load)

    def _check(self, part: Part, manifest: wire.Manifest) -> None:
        """The producer attests what it will send; anything else than what we asked for is refused."""
        spec = part.load.spec
        expected = {
            "stale_epoch": manifest.epoch == part.source.epoch,
            "fingerprint": manifest.fingerprint == spec.fingerprint,
            "prompt_mismatch": manifest.tokens == spec.tokens and manifest.chain == spec.chain,
            "codec": not manifest.codec or manifest.codec in self._codecs,
            "layout": self._same_shapes(part, manifest),
        }
        for reason, holds in expected.items():
            if not holds:
                log.error("kv_manifest_refused", extra={"reason": reason, "security": True})
                raise _Refusal(reason)

    def _same_shapes(self, part: Part, manifest: wire.Manifest) -> bool:
        codec = self._codecs.get(manifest.codec)
        if len(manifest.shapes) != len(self._cache.shapes):
            return False
        try:
            rows = [codec.encoded_bytes(s.row_bytes) if codec else s.row_bytes for s in self._cache.shapes]
        except ValueError:  # rows of ours can't be encoded so
            return False
        return all(
            theirs.layers == ours.layers
            and theirs.row_bytes == row_bytes
            and part.source.last <= theirs.heads
            for theirs, ours, row_bytes in zip(manifest.shapes, self._cache.shapes, rows, strict=True)
        )

    def _announced(self, peer: _Peer, message: wire.Blocks, frames: list[zmq.Frame]) -> None:
        part = self._parts.get(message.sub)
        if part is None or part.source.endpoint != peer.endpoint:  # late: its load has ended
            self._pass_over(peer, message)
            return
        if part.manifest is None:
            part.early.append((message, frames))
            part.early_bytes += sum(len(frame) for frame in frames)
            if len(part.early) > sum(map(len, part.due.values())) or part.early_bytes > EARLY_BYTES:
                log.error("kv_blocks_refused", extra={"detail": "no manifest", "security": True})
                self._fail(part.load, "no_manifest")
        else:
            self._take(peer, part, message, frames)

    def _pass_over(self, peer: _Peer, message: wire.Blocks) -> None:
        """Leave a payload that nobody waits for, and let the producer's window move on."""
        if peer.receiver is not None and 0 <= message.nbytes <= wire.MAX_PAYLOAD:
            peer.receiver.skip(message)
            self._ack(peer, message.nbytes)

    def _take(self, peer: _Peer, part: Part, message: wire.Blocks, frames: list[zmq.Frame]) -> None:
        """Have the transport get a payload that is one of those wanted."""
        assert part.manifest is not None
        try:
            due, blocks = part.due.get(message.group, set()), _blocks(message)
            if not 0 < message.count <= len(due) or not due.issuperset(blocks):
                raise _Refusal("out_of_range")
            due.difference_update(blocks)
            if peer.receiver is not None:
                shape = part.manifest.shapes[message.group]
                peer.receiver.receive(message, shape, part.heads, frames)
        except (_Refusal, wire.KvWireError) as error:
            log.error("kv_blocks_refused", extra={"detail": str(error), "security": True})
            self._fail(part.load, str(error) if isinstance(error, _Refusal) else "wrong_length")

    def _deliver(self, peer: _Peer, session: int, message: wire.Blocks, rows: Any) -> None:
        """The payload is here: verify it, write it, count it."""
        if not peer.up or peer.session != session:
            return
        self._ack(peer, message.nbytes)
        part = self._parts.get(message.sub)
        if part is None or part.manifest is None:
            return
        load, now = part.load, time.monotonic()
        if now >= load.deadline:  # the producer may have used the memory again
            self._fail(load, "timeout")
            return
        if message.digest and digest(as_tensor(rows)) != message.digest:
            log.error("kv_digest_mismatch", extra={"ticket": load.spec.key.id.hex(), "security": True})
            self._fail(load, "corrupt")
            return
        first, target = part.targets[message.group]
        try:
            if part.manifest.codec:
                rows = self._codecs[part.manifest.codec].decode(as_tensor(rows))
            fence = target.write(message.first - first, message.count, rows)
        except Exception:  # such as a device without memory
            log.exception("kv_copy_failed", extra={"ticket": load.spec.key.id.hex()})
            self._fail(load, "copy_failed")
            return
        load.first_at = load.first_at or now
        load.nbytes += message.nbytes
        if fence is None:
            load.scatter_s += time.monotonic() - now
            self._wrote(peer, part, message)
        else:
            load.writing += 1
            self._waiter.after(fence, partial(self._fenced, peer, part, message, now))

    def _fenced(self, peer: _Peer, part: Part, message: wire.Blocks, since: float, well: bool) -> None:
        load = part.load
        load.writing -= 1
        load.scatter_s += time.monotonic() - since
        if load.failed:
            self._emit_failed(load)
        elif well:
            self._wrote(peer, part, message)
        else:
            self._fail(load, "copy_failed")

    def _wrote(self, peer: _Peer, part: Part, message: wire.Blocks) -> None:
        if time.monotonic() >= part.load.deadline:  # the producer may have used the memory meanwhile
            self._fail(part.load, "timeout")
            return
        part.missing[message.group].difference_update(_blocks(message))
        self._finish_part(peer, part)
        self._finish(part.load)

    def _ack(self, peer: _Peer, nbytes: int) -> None:
        peer.unacked += nbytes
        if peer.unacked >= ACK_BYTES:
            self._send(peer, wire.Ack(peer.session, peer.unacked))
            peer.unacked = 0

    # --- loads ---

    def _subscribe(self, peer: _Peer, part: Part) -> None:
        load = part.load
        part.sub = next(self._subs)
        self._parts[part.sub] = part
        wants = part.wants()
        part.due = {want.group: set(_blocks(want)) for want in wants}
        left = max(0.0, load.deadline - time.monotonic())
        self._send(peer, wire.Subscribe(load.spec.key, part.sub, part.source.epoch, wants, part.heads, left))

    def _finish_part(self, peer: _Peer, part: Part) -> None:
        if part.sub not in self._parts or not part.complete:
            return
        del self._parts[part.sub]
        part.load.transport = peer.transport
        self._finish(part.load)  # first, as somebody waits for it
        self._send(self._peer(part.source.endpoint), wire.Done(part.load.spec.key, part.sub))

    def _finish(self, load: Load) -> None:
        """End a load that has everything. A block may be on its way into the cache a second time."""
        known = self._loads.get(load.spec.key) is load
        if known and not load.failed and not load.writing and all(p.complete for p in load.parts):
            del self._loads[load.spec.key]
            now = time.monotonic()
            first_at = load.first_at or now
            blocks = sum(len(span.block_ids) for span in load.spec.spans)
            self._emit(
                wire.Loaded(
                    load.spec.key,
                    load.nbytes,
                    blocks,
                    first_at - load.started,
                    now - first_at,
                    load.scatter_s,
                    load.transport,
                    load.retries,
                )
            )

    def _fail(self, load: Load, reason: str) -> None:
        """End a load. While copies into the cache run, ``Failed`` waits for them."""
        if load.failed:
            return
        load.failed = reason
        for part in load.parts:
            if self._parts.pop(part.sub, None) is not None:
                peer = self._peer(part.source.endpoint)
                self._send(peer, wire.Drop(load.spec.key, part.sub))
                for message, _ in part.early:
                    self._pass_over(peer, message)
                part.early.clear()
        self._emit_failed(load)

    def _emit_failed(self, load: Load) -> None:
        if load.writing == 0:
            del self._loads[load.spec.key]
            self._emit(wire.Failed(load.spec.key, load.failed))

    def _tick(self) -> None:
        now = time.monotonic()
        for load in [load for load in self._loads.values() if load.deadline <= now]:
            self._fail(load, "timeout")
        if now >= self._alive_due:
            self._alive_due = now + ALIVE_S
            self._keep_alive()
        for peer in list(self._peers.values()):
            waiting = self._loads_from(peer.endpoint)
            patience = RESUME_S if peer.known else CONNECT_S
            overdue = [
                load
                for load in waiting
                if not peer.up and now - max(peer.trouble_at, load.started) > patience
            ]
            for load in overdue:
                self._fail(load, "disconnected" if peer.known else "unreachable")
            # Not to one that may be connected and yet begins no session: the next load tries it anew.
            if peer.lost or overdue or (not waiting and now - peer.idle_since > IDLE_S):
                self._hang_up(peer)
            if self._loads_from(peer.endpoint) and peer.endpoint not in self._peers:
                again = self._reach(peer.endpoint)
                if again is None:
                    self._give_up(peer, "unreachable")
                else:
                    again.known, again.trouble_at = peer.known, peer.trouble_at

    def _keep_alive(self) -> None:
        waiting: dict[str, list[wire.Key]] = {}
        for part in self._parts.values():
            waiting.setdefault(part.source.endpoint, []).append(part.load.spec.key)
        for key, endpoints in self._holds.items():
            for endpoint in endpoints:
                waiting.setdefault(endpoint, []).append(key)
        for endpoint, keys in waiting.items():
            if (peer := self._reach(endpoint)) is not None and peer.up:
                self._send(peer, wire.Alive(tuple(keys)))

    def _hang_up(self, peer: _Peer) -> None:
        self._down(peer)
        peer.socket.disable_monitor()
        self._loop.remove(peer.monitor)
        self._loop.remove(peer.socket)
        del self._peers[peer.endpoint]


def _blocks(message: wire.Blocks | wire.Want) -> range:
    return range(message.first, message.first + message.count)
