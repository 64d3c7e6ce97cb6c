"""Payloads by NIXL over UCX: the consumer reads them out of the producer's staging itself.

Needs the package ``nixl``. Which links UCX uses is its own affair (``UCX_TLS``, ``UCX_NET_DEVICES``); unless
the environment names devices it is held to the loopback one. An agent's peers can read and write what it has
registered (the producer's staging, the consumer's receive buffers): it is for networks that are trusted.

NIXL's own progress thread would keep a core busy, so there is none. Each loop polls its agent, and only while
something is on its way: the consumer while it reads; the producer from a parcel's announcement until the
consumer has told it that the parcel is read, because over TCP the side that is read from must work too.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from kvtransfer import wire
from kvtransfer.transport import (
    Broken,
    ConsumerSide,
    Deliver,
    Parcel,
    ProducerSide,
    Socket,
    Unavailable,
    is_part,
)
from kvtransfer.transport.pool import Buffer, Pool

log = logging.getLogger("braid.kvtransfer")

IN_FLIGHT = 16 * 1024 * 1024
"""Payload that one session reads at a time (one parcel at least); the pool is shared by all."""
LINGER_S = 0.05
"""The consumer polls this much longer than it reads, so that its last notification leaves."""
STALL_S = 10.0
"""Without a notification for this long the producer polls at the loop's own pace."""
GRACE_S = 5.0
"""A read that goes on this long after its session has ended is given up, and so is its buffer."""


STUCK_S = 1.0
"""Period in which reads that were given up are looked at."""
_MAX_BYTES = 2**62
"""Offsets beyond are no addresses."""


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``metadata``: of the consumer's agent."""

    metadata: bytes


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``metadata``: of the producer's agent. ``base``: address of its staging, ``nbytes`` long."""

    metadata: bytes
    base: int
    nbytes: int


class Read(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Notification to the producer: one parcel of this session needs its help no more."""

    consumer: bytes
    session: int


class Agent:
    """A NIXL agent with one registered region. Not thread-safe.

    Attributes:
        problem: why there is none, else empty.
    """

    def __init__(self, memory: memoryview) -> None:
        self.problem = ""
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self.base = int(self._memory.data_ptr())
        self._peers: Counter[str] = Counter()
        try:
            self._agent: Any = _make_agent()
            self._registered = self._agent.register_memory([(self.base, len(self._memory), 0, "")], "DRAM")
            self.metadata: bytes = self._agent.get_agent_metadata()
        except ImportError:
            self.problem = "pip install nixl"
        except Exception as error:  # NIXL's errors have no common base
            self.problem = f"NIXL does not start here: {error!r}"

    def check(self) -> None:
        """Raise :class:`Unavailable` if there is none."""
        if self.problem:
            raise Unavailable(f"nixl: {self.problem}")

    def add(self, metadata: bytes) -> str:
        """Get to know a peer; returns its name. Each call is undone by one of :meth:`remove`."""
        try:
            name: str = self._agent.add_remote_agent(metadata).decode()
        except Exception as error:
            raise Unavailable(f"nixl: {error!r}") from None
        self._peers[name] += 1
        return name

    def remove(self, name: str) -> None:
        """One user less of a peer; without any, its connection is closed."""
        self._peers[name] -= 1
        if not self._peers[name]:
            del self._peers[name]
            with suppress(Exception):  # it may have gone by itself
                self._agent.remove_remote_agent(name)

    def read(self, peer: str, runs: Runs, base: int, at: int, tag: bytes) -> Any:
        """Begin to read a peer's ``runs``, relative to ``base``, into this region at ``at``, one after the
        other; then notify it with ``tag``."""
        local = _descriptors(self.base + at + np.arange(len(runs.at)) * runs.nbytes, runs.nbytes)
        remote = _descriptors(base + runs.at, runs.nbytes)
        handle = self._agent.initialize_xfer(
            "READ",
            self._agent.get_xfer_descs(local, "DRAM"),
            self._agent.get_xfer_descs(remote, "DRAM"),
            peer,
            tag,
        )
        self._agent.transfer(handle)
        return handle

    def state(self, handle: Any) -> str:
        """PROC, DONE, or what went wrong."""
        try:
            return str(self._agent.check_xfer_state(handle))
        except Exception as error:
            return repr(error)

    def release(self, handle: Any) -> None:
        with suppress(Exception):  # then it is kept until the agent ends
            self._agent.release_xfer_handle(handle)

    def notify(self, peer: str, tag: bytes) -> None:
        with suppress(Exception):  # it is gone
            self._agent.send_notif(peer, tag)

    def notifications(self) -> list[bytes]:
        """What peers have sent since; also does this side's part of their reads."""
        return [tag for tags in self._agent.get_new_notifs().values() for tag in tags]

    def close(self) -> None:
        self._agent = None


def _make_agent() -> Any:
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    api: Any = importlib.import_module("nixl._api")
    name = f"braid-{secrets.token_hex(8)}"

    def make(errors: str) -> Any:
        agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        agent.create_backend("UCX", {"ucx_error_handling_mode": errors})
        return agent

    try:
        return make("peer")
    except Exception:  # links that can't notice a peer's end, such as shared memory alone
        return make("none")


class NixlSender:
    """See :class:`kvtransfer.transport.Sender`.

    Attributes:
        unread: parcels announced and not yet read.
    """

    outlives = True
    stretch = 1
    wraps = False

    def __init__(self, transport: NixlProducer, address: bytes, id: Read, peer: str) -> None:
        self._transport = transport
        self._address = address
        self._id = id
        self.peer = peer
        self.unread = 0

    def send(self, parcel: Parcel, digest: int) -> None:
        piece = parcel.piece
        where = {"at": piece.at, "skip": parcel.skip, "of": piece.count, "heads": piece.shape[2]}
        message = parcel.header(**where, digest=digest)
        self._transport.socket.send_multipart([self._address, wire.encode(message)])
        self.unread += 1
        self._transport.sent()

    def close(self) -> None:
        self._transport.forget(self._id)


class NixlProducer:
    """See :class:`kvtransfer.transport.ProducerTransport`."""

    name = "nixl"

    def __init__(self, side: ProducerSide) -> None:
        self.socket: Socket = side.socket
        self._nbytes = len(side.arena.memory)
        self._agent = Agent(side.arena.memory)
        if not self._agent.problem:
            side.arena.hold_pages()  # registered with whatever network UCX finds
        self._senders: dict[Read, NixlSender] = {}
        self._news_at = 0.0
        side.loop.every_turn(self._poll)

    def accept(self, hello: wire.Hello, offer: bytes, address: bytes) -> tuple[NixlSender, bytes]:
        self._agent.check()
        peer = self._agent.add(_decode(offer, Offer).metadata)
        id = Read(hello.consumer, hello.session)
        sender = self._senders[id] = NixlSender(self, address, id, peer)
        terms = Terms(self._agent.metadata, self._agent.base, self._nbytes)
        return sender, msgspec.msgpack.encode(terms)

    def forget(self, id: Read) -> None:
        """A session has ended. Idempotent."""
        if (sender := self._senders.pop(id, None)) is not None:
            self._agent.remove(sender.peer)

    def sent(self) -> None:
        """A parcel has been announced."""
        self._news_at = time.monotonic()

    def close(self) -> None:
        for id in list(self._senders):
            self.forget(id)
        self._agent.close()

    def _poll(self) -> bool:
        if not any(sender.unread for sender in self._senders.values()):
            return False
        for tag in self._agent.notifications():
            with suppress(msgspec.DecodeError):
                sender = self._senders.get(msgspec.msgpack.decode(tag, type=Read))
                if sender is not None:
                    sender.unread = max(0, sender.unread - 1)
                    self._news_at = time.monotonic()
        return time.monotonic() - self._news_at < STALL_S


@dataclass(frozen=True, slots=True)
class Runs:
    """Pieces of memory of ``nbytes`` each, at the offsets ``at`` (an array)."""

    at: Any
    nbytes: int


@dataclass(slots=True, eq=False)
class _Transfer:
    """A read in flight. ``until``: when it is given up, once its session has ended."""

    receiver: NixlReceiver
    message: wire.Blocks
    rows: tuple[int, int, int, int]
    buffer: Buffer
    handle: Any
    until: float = 0.0


class NixlReceiver:
    """See :class:`kvtransfer.transport.Receiver`.

    Attributes:
        in_flight: bytes being read.
        spoiled: buffers of reads that failed; parts of them may be written until the peer is let go of.
    """

    def __init__(
        self,
        transport: NixlConsumer,
        terms: Terms,
        tag: bytes,
        peer: str,
        deliver: Deliver,
        broken: Broken,
    ) -> None:
        self._transport = transport
        self._terms = terms
        self._tag = tag
        self._deliver = deliver
        self._broken = broken
        self._waiting: deque[tuple[wire.Blocks, Runs, tuple[int, int, int, int]]] = deque()
        self.peer = peer
        self.in_flight = 0
        self.spoiled: list[Buffer] = []
        self.closed = False

    def receive(
        self, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int], frames: Sequence[zmq.Frame]
    ) -> None:
        runs = runs_of(self._terms.nbytes, message, shape, heads)
        rows = (shape.layers, message.count, heads[1] - heads[0], shape.row_bytes)
        self._waiting.append((message, runs, rows))
        self.pump()

    def skip(self, message: wire.Blocks) -> None:
        self._transport.agent.notify(self.peer, self._tag)
        self._transport.linger()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._waiting.clear()
            self._transport.left(self)

    def pump(self) -> None:
        """Begin to read what has room."""
        while self._waiting and not self.closed:
            message, runs, rows = self._waiting[0]
            if self.in_flight and self.in_flight + message.nbytes > IN_FLIGHT:
                return
            buffer = self._transport.pool.take(message.nbytes, self.pump)
            if buffer is None:
                if self._transport.stuck and not self._transport.transfers:
                    self.fail("reads of peers that stand still hold all buffers")
                return
            self._waiting.popleft()
            try:
                handle = self._transport.agent.read(self.peer, runs, self._terms.base, buffer.at, self._tag)
            except Exception as error:  # NIXL's errors have no common base
                self.spoiled.append(buffer)
                self.fail(repr(error))
                return
            self.in_flight += message.nbytes
            self._transport.transfers.append(_Transfer(self, message, rows, buffer, handle))

    def ended(self, transfer: _Transfer, state: str) -> None:
        """A read has: ``state`` is DONE or what went wrong."""
        self.in_flight -= transfer.message.nbytes
        if state != "DONE":
            self.spoiled.append(transfer.buffer)
            self.fail(state)
        if self.closed:
            return
        self.pump()
        self._deliver(transfer.message, transfer.buffer.data.view(transfer.rows))

    def fail(self, reason: str) -> None:
        """Nothing more comes."""
        if not self.closed:
            self.close()
            self._broken(f"nixl: {reason}")


class NixlConsumer:
    """See :class:`kvtransfer.transport.ConsumerTransport`.

    Attributes:
        transfers: reads in flight, also those whose session has ended: until they have too their buffers
            are not used again.
        stuck: of these the ones that were given up; looked at now and then, as their peer may go on.
    """

    name = "nixl"

    def __init__(self, side: ConsumerSide) -> None:
        self._consumer = side.consumer
        self.pool = Pool(side.loop)
        self.agent = Agent(self.pool.memory)
        self.transfers: list[_Transfer] = []
        self._leaving: list[NixlReceiver] = []
        self.stuck: list[_Transfer] = []
        self._linger_until = 0.0
        self._look_at = 0.0
        side.loop.every_turn(self._poll)

    def offer(self) -> bytes:
        self.agent.check()
        return msgspec.msgpack.encode(Offer(self.agent.metadata))

    def open(self, welcome: wire.Welcome, endpoint: str, deliver: Deliver, broken: Broken) -> NixlReceiver:
        self.agent.check()
        terms = _decode(welcome.data, Terms)
        peer = self.agent.add(terms.metadata)
        tag = msgspec.msgpack.encode(Read(self._consumer(endpoint), welcome.session))
        return NixlReceiver(self, terms, tag, peer, deliver, broken)

    def linger(self) -> None:
        """A notification is on its way."""
        self._linger_until = time.monotonic() + LINGER_S

    def left(self, receiver: NixlReceiver) -> None:
        """A session has ended; its peer is let go of when its reads have."""
        until = time.monotonic() + GRACE_S
        for transfer in self.transfers:
            if transfer.receiver is receiver:
                transfer.until = until
        self._leaving.append(receiver)
        self._let_go()

    def close(self) -> None:
        while self._poll():
            time.sleep(1e-4)  # NIXL has nothing to wait on
        self.agent.close()
        self.pool.close()

    def _poll(self) -> bool:
        for transfer in list(self.transfers):
            self._look_after(transfer, self.agent.state(transfer.handle))
        if self.stuck and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + STUCK_S
            self._look_after_stuck()
        if self._leaving:
            self._let_go()
        if self.transfers:
            self.linger()
            return True
        if time.monotonic() < self._linger_until:
            self.agent.notifications()
            return True
        return False

    def _look_after(self, transfer: _Transfer, state: str) -> None:
        if state != "PROC":
            self.transfers.remove(transfer)
            self.agent.release(transfer.handle)
            transfer.receiver.ended(transfer, state)
        elif transfer.until and transfer.until < time.monotonic():
            self.transfers.remove(transfer)
            log.warning("kv_nixl_read_given_up", extra={"detail": f"{transfer.message.nbytes} bytes"})
            self.stuck.append(transfer)  # its buffer may still be written

    def _look_after_stuck(self) -> None:
        for transfer in [t for t in self.stuck if self.agent.state(t.handle) != "PROC"]:
            self.stuck.remove(transfer)
            self.agent.release(transfer.handle)

    def _let_go(self) -> None:
        reading = {id(transfer.receiver) for transfer in self.transfers}
        for receiver in [r for r in self._leaving if id(r) not in reading]:
            self._leaving.remove(receiver)
            self.agent.remove(receiver.peer)
            receiver.spoiled.clear()


def runs_of(nbytes: int, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int]) -> Runs:
    """Where a message's rows lie in a producer's staging of ``nbytes``, in C order.

    Raises:
        KvWireError: not inside it, or not as long as the message says.
    """
    blocks, width = message.of, heads[1] - heads[0]
    whole = shape.layers * blocks * shape.heads * shape.row_bytes
    inside = 0 <= message.at <= min(nbytes, _MAX_BYTES) - whole and is_part(message)
    if not inside or message.heads != shape.heads:
        raise wire.KvWireError(f"{whole} bytes at {message.at} are not in the staging of {nbytes}")
    expected = shape.layers * message.count * width * shape.row_bytes
    if message.nbytes != expected or expected > wire.MAX_PAYLOAD:
        raise wire.KvWireError(f"payload of {message.nbytes} bytes, expected {expected}")
    if whole == expected:
        return Runs(np.array([message.at]), whole)
    block = shape.heads * shape.row_bytes
    layers = message.at + np.arange(shape.layers) * blocks * block + message.skip * block
    if width == shape.heads:
        return Runs(layers, message.count * block)
    rows = layers[:, None] + np.arange(message.count) * block + heads[0] * shape.row_bytes
    return Runs(rows.reshape(-1), width * shape.row_bytes)


def _descriptors(addresses: Any, nbytes: int) -> Any:
    """NIXL's list of (address, length, device)."""
    found = np.zeros((len(addresses), 3), dtype=np.uint64)
    found[:, 0], found[:, 1] = addresses, nbytes
    return found


def _decode(data: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise Unavailable(f"nixl terms: {error}") from None
