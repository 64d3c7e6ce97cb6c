"""The producer's end: serves staged KV blocks to consumers over a ZMQ ROUTER socket."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zmq

from braid.keys import apply_curve_server
from kvtransfer import wire
from kvtransfer.lease import Lease, LeaseTable, Subscriber
from kvtransfer.loop import Loop

log = logging.getLogger("braid.kvtransfer")

MAX_EARLY = 4096
"""Subscriptions held for keys that are not open yet; more are refused."""


class Producer:
    """Holds finished blocks of prompts in host memory and streams them to subscribers.

    All methods but :meth:`publish` run on ``loop``; ``publish`` may be called from any thread and
    hands the tensor over (the caller does not touch it again). A piece's memory lives until the lease
    has ended and ZMQ has sent it.

    Args:
        loop: thread that will own the socket.
        bind: ZMQ endpoint; ``tcp://127.0.0.1:*`` picks a free port.
        epoch: of this engine; subscriptions to another are refused as ``stale_epoch``.
        block_bytes: of one block over all layers of this rank.
        capacity, lease_s: see :class:`~kvtransfer.lease.LeaseTable`.
        emit: receives ``Opened``, ``Closed``.
    """

    def __init__(
        self,
        loop: Loop,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        bind: str,
        epoch: int,
        block_bytes: int,
        capacity: int,
        lease_s: float,
        emit: Callable[[wire.Event], None],
        keys_dir: Path | None = None,
    ) -> None:
        self._loop = loop
        self._epoch = epoch
        self._block_bytes = block_bytes
        self._emit = emit
        self.table: LeaseTable[torch.Tensor] = LeaseTable(capacity, lease_s, time.monotonic)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if keys_dir is not None:
            apply_curve_server(self._socket, keys_dir)
        self._socket.bind(bind)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        loop.add(self._socket, self._receive)
        loop.every_tick(self._tick)

    def open(self, message: wire.Open) -> None:
        """Reserve staging; answered by ``Opened`` when there is room, or ``Closed`` if refused."""
        manifest = wire.Manifest(
            message.key,
            self._epoch,
            message.tokens,
            message.chain,
            message.fingerprint,
            self._block_bytes,
        )
        nbytes = message.blocks * self._block_bytes
        try:
            self.table.open(Lease(manifest, message.blocks, nbytes, message.subscribers))
        except ValueError as error:
            self._emit(wire.Closed(message.key, str(error)))
            return
        self._grant()

    def publish(self, key: wire.Key, first: int, piece: torch.Tensor) -> None:
        """Hand over blocks ``[first, first + piece.shape[1])``, in order, from any thread."""
        self._loop.call_soon(lambda: self._publish(key, first, piece))

    def close(self, key: wire.Key, reason: str) -> None:
        """End a lease; subscribers that still wait are refused with ``reason``. Idempotent."""
        lease = self.table.close(key)
        if lease is None:
            return
        for subscriber in lease.subscribers.values():
            if not subscriber.done:
                self._send(subscriber.address, wire.Refused(key, reason))
        self._emit(wire.Closed(key, reason))
        self._grant()

    def stats(self) -> wire.Stats:
        """What is held now."""
        table = self.table
        return wire.Stats(table.reserved, len(table.held), len(table.waiting) + len(table.early))

    def _grant(self) -> None:
        for lease in self.table.grant():
            self._emit(wire.Opened(lease.manifest.key))
            for subscriber in lease.subscribers.values():
                self._send(subscriber.address, lease.manifest)

    def _publish(self, key: wire.Key, first: int, piece: torch.Tensor) -> None:
        lease = self.table.publish(key, first, piece.shape[1], piece)
        if lease is None:
            return
        for subscriber in lease.subscribers.values():
            self._feed(key, lease, subscriber)

    def _feed(self, key: wire.Key, lease: Lease[torch.Tensor], subscriber: Subscriber) -> None:
        """Send the published pieces that this subscriber lacks."""
        if subscriber.done:
            return
        for first, count, piece in lease.pieces:
            start = max(first, subscriber.have, subscriber.sent)
            if start >= first + count:
                continue
            part = piece if start == first else piece[:, start - first :].contiguous()
            payload = memoryview(part.numpy()).cast("B")
            head = wire.encode(wire.Blocks(key, start, part.shape[1]))
            self._socket.send_multipart([subscriber.address, head, payload], copy=False)
            subscriber.sent = first + count

    def _send(self, address: bytes, message: wire.Data) -> None:
        self._socket.send_multipart([address, wire.encode(message)])

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
            case wire.Subscribe():
                self._subscribe(address, message)
            case wire.Done(key) | wire.Drop(key):
                if self.table.end_subscriber(key, address):
                    self.close(key, "done")
            case wire.Alive(keys):
                for key in keys:
                    self.table.alive(key)
            case _:
                log.warning("kv_unexpected_message", extra={"kind": type(message).__name__})

    def _subscribe(self, address: bytes, message: wire.Subscribe) -> None:
        if message.epoch != self._epoch:
            log.warning("kv_stale_epoch", extra={"subscriber": message.subscriber, "security": True})
            return self._send(address, wire.Refused(message.key, "stale_epoch"))
        if not self.table.knows(message.key) and len(self.table.early) >= MAX_EARLY:
            return self._send(address, wire.Refused(message.key, "overloaded"))
        subscriber = Subscriber(address, max(0, message.have))
        lease = self.table.subscribe(message.key, subscriber)
        if lease is not None:
            self._send(address, lease.manifest)
            self._feed(message.key, lease, subscriber)

    def _tick(self) -> None:
        expired, lapsed = self.table.overdue()
        for key in expired:
            log.warning("kv_lease_expired", extra={"ticket": key.id.hex()})
            self.close(key, "expired")
        for key, subscribers in lapsed:
            for subscriber in subscribers:
                self._send(subscriber.address, wire.Refused(key, "unknown_ticket"))
