"""The consumer's end: pulls blocks from producers into this engine's paged cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from braid.keys import apply_curve_client
from kvtransfer import wire
from kvtransfer.loop import Loop
from kvtransfer.paged import PagedCache

log = logging.getLogger("braid.kvtransfer")

ALIVE_S = 2.0
"""Period in which waiting loads extend their leases."""
IDLE_S = 300.0
"""A connection without loads is closed after this long."""


class _Refusal(Exception):
    """The producer's side of a load is not what was asked for; the load fails with this reason."""


@dataclass(slots=True)
class _Load:
    """A load in flight. ``next`` is the first block not yet written."""

    spec: wire.Load
    started: float
    deadline: float
    next: int
    first_at: float = 0.0
    manifest: bool = False
    nbytes: int = 0

    @property
    def last(self) -> int:
        return self.spec.first + len(self.spec.block_ids)


@dataclass(slots=True)
class _Peer:
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    idle_since: float


class Consumer:
    """Runs loads: subscribe, verify the manifest, write blocks as they come, acknowledge.

    Runs on ``loop``. Only this class writes the blocks of a load, and only between ``load`` and the
    event that ends it (``Loaded`` or ``Failed``, exactly one). A load fails on: a manifest that does
    not match what the server expects, a refusal, a lost connection, its deadline, or ``unload``.
    """

    def __init__(
        self,
        loop: Loop,
        context: zmq.Context[zmq.Socket[bytes]],
        cache: PagedCache,
        *,
        name: str,
        emit: Callable[[wire.Event], None],
        keys_dir: Path | None = None,
    ) -> None:
        self._loop = loop
        self._context = context
        self._cache = cache
        self._name = name
        self._emit = emit
        self._keys_dir = keys_dir
        self._loads: dict[wire.Key, _Load] = {}
        self._peers: dict[str, _Peer] = {}
        self._alive_due = 0.0
        loop.every_tick(self._tick)

    def load(self, spec: wire.Load) -> None:
        """Start a load. A key in flight is refused with ``Failed`` (``duplicate``)."""
        if spec.key in self._loads or not self._in_range(spec):
            self._emit(wire.Failed(spec.key, "duplicate" if spec.key in self._loads else "bad_blocks"))
            return
        now = time.monotonic()
        self._loads[spec.key] = _Load(spec, now, now + spec.deadline_s, spec.first)
        peer = self._peer(spec.endpoint)
        self._send(peer, wire.Subscribe(spec.key, spec.epoch, self._name, spec.first))

    def unload(self, key: wire.Key, reason: str) -> None:
        """Stop a load. Answered by ``Failed`` in any case: after it, nothing writes for this key."""
        if key in self._loads:
            self._fail(key, reason)
        else:
            self._emit(wire.Failed(key, reason))

    def stats(self) -> wire.Stats:
        """What is in flight now."""
        return wire.Stats(loads=len(self._loads))

    def _in_range(self, spec: wire.Load) -> bool:
        return all(0 < block < self._cache.blocks for block in spec.block_ids)

    def _peer(self, endpoint: str) -> _Peer:
        if (peer := self._peers.get(endpoint)) is None:
            socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 64)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            if self._keys_dir is not None:
                apply_curve_client(socket, self._keys_dir)
            monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            socket.connect(endpoint)
            peer = self._peers[endpoint] = _Peer(socket, monitor, time.monotonic())
            self._loop.add(socket, lambda: self._receive(endpoint))
            self._loop.add(monitor, lambda: self._disconnected(endpoint))
        peer.idle_since = time.monotonic()
        return peer

    def _send(self, peer: _Peer, message: wire.Data) -> None:
        try:
            peer.socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("kv_peer_send_queue_full")

    def _receive(self, endpoint: str) -> None:
        peer = self._peers[endpoint]
        for _ in range(64):
            try:
                frames = peer.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._handle(endpoint, wire.decode_data(frames[0].bytes), frames[1:])
            except wire.KvWireError as error:
                log.warning("kv_malformed_message", extra={"detail": str(error), "peer": endpoint})

    def _handle(self, endpoint: str, message: wire.Data, payload: list[zmq.Frame]) -> None:
        if not isinstance(message, wire.Manifest | wire.Blocks | wire.Refused):
            raise wire.KvWireError(f"unexpected {type(message).__name__}")
        load = self._loads.get(message.key)
        if load is None or load.spec.endpoint != endpoint:
            return  # late: the load has ended, or it is not this producer's
        try:
            match message:
                case wire.Manifest():
                    self._check(load.spec, message)
                    load.manifest = True
                    self._finish_if_complete(load)
                case wire.Blocks():
                    self._write(load, message, payload)
                    self._finish_if_complete(load)
                case wire.Refused(_, reason):
                    raise _Refusal(reason)
        except _Refusal as refusal:
            self._fail(message.key, str(refusal))

    def _check(self, spec: wire.Load, manifest: wire.Manifest) -> None:
        """The producer attests what it will send; anything else than what we asked for is refused."""
        expected = {
            "stale_epoch": manifest.epoch == spec.epoch,
            "fingerprint": manifest.fingerprint == spec.fingerprint,
            "layout": manifest.block_bytes == self._cache.block_bytes,
            "prompt_mismatch": manifest.tokens == spec.tokens and manifest.chain == spec.chain,
        }
        for reason, holds in expected.items():
            if not holds:
                log.error("kv_manifest_refused", extra={"reason": reason, "security": True})
                raise _Refusal(reason)

    def _write(self, load: _Load, message: wire.Blocks, payload: list[zmq.Frame]) -> None:
        if not load.manifest or message.first != load.next or message.first + message.count > load.last:
            raise _Refusal("out_of_range")
        if len(payload) != 1 or message.count < 1:
            raise _Refusal("malformed")
        at = message.first - load.spec.first
        data = payload[0].buffer
        try:
            self._cache.scatter(load.spec.block_ids[at : at + message.count], data)
        except ValueError as error:
            raise _Refusal("wrong_length") from error
        load.first_at = load.first_at or time.monotonic()
        load.next += message.count
        load.nbytes += len(data)

    def _finish_if_complete(self, load: _Load) -> None:
        if not load.manifest or load.next < load.last:
            return
        spec, now = load.spec, time.monotonic()
        del self._loads[spec.key]
        self._send(self._peer(spec.endpoint), wire.Done(spec.key))
        first_at = load.first_at or now
        self._emit(
            wire.Loaded(spec.key, load.nbytes, len(spec.block_ids), first_at - load.started, now - first_at)
        )

    def _fail(self, key: wire.Key, reason: str) -> None:
        load = self._loads.pop(key)
        self._send(self._peer(load.spec.endpoint), wire.Drop(key))
        self._emit(wire.Failed(key, reason))

    def _disconnected(self, endpoint: str) -> None:
        recv_monitor_message(self._peers[endpoint].monitor)
        for key in [k for k, load in self._loads.items() if load.spec.endpoint == endpoint]:
            self._fail(key, "disconnected")

    def _tick(self) -> None:
        now = time.monotonic()
        for key in [k for k, load in self._loads.items() if load.deadline <= now]:
            self._fail(key, "timeout")
        if now >= self._alive_due:
            self._alive_due = now + ALIVE_S
            self._keep_alive()
        busy = {load.spec.endpoint for load in self._loads.values()}
        for endpoint, peer in list(self._peers.items()):
            if endpoint not in busy and now - peer.idle_since > IDLE_S:
                self._hang_up(endpoint, peer)

    def _keep_alive(self) -> None:
        waiting: dict[str, list[wire.Key]] = {}
        for key, load in self._loads.items():
            waiting.setdefault(load.spec.endpoint, []).append(key)
        for endpoint, keys in waiting.items():
            self._send(self._peer(endpoint), wire.Alive(tuple(keys)))

    def _hang_up(self, endpoint: str, peer: _Peer) -> None:
        peer.socket.disable_monitor()
        self._loop.remove(peer.monitor)
        self._loop.remove(peer.socket)
        del self._peers[endpoint]
