"""Payloads through ``torch.distributed``: a group of two ranks a session, Gloo in host memory, NCCL on GPUs.

Bytes on a group's connections are neither encrypted nor authenticated, and Gloo ends the process that is
sent more than it expects: it is for networks and peers that are trusted.

Each half has a thread that builds the group and posts operations in the order of their announcements, which
are numbered (``Blocks.at``). The consumer's waits for them and tells the producer (a ``Rendezvous`` named
"got"), which until then holds what is being sent. Ending a session aborts its group, which ends that thread
(:mod:`kvtransfer.transport.group`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
import zmq

from kvtransfer import wire
from kvtransfer.transport import Broken, ConsumerSide, Deliver, Parcel, ProducerSide, Unavailable
from kvtransfer.transport.group import Backend, Session
from kvtransfer.transport.pool import Buffer, Pool

IN_FLIGHT = 16 * 1024 * 1024
"""Payload that one session receives at a time (one parcel at least); the pool is shared by all."""
_GOT = "got"


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offer and answer: both halves need the same."""

    backend: str
    torch: str


@dataclass(frozen=True, slots=True)
class _Send:
    backend: Backend
    rows: Any
    nbytes: int

    def post(self, group: Any) -> Any:
        return self.backend.send(group, self.rows)

    def done(self) -> None:
        """Nobody waits for it here."""


class CollectiveSender:
    """See :class:`kvtransfer.transport.Sender`."""

    outlives = False  # nothing leaves staging once the group is aborted
    stretch = 1
    wraps = False

    def __init__(self, side: ProducerSide, backend: Backend, address: bytes, number: int) -> None:
        self._socket = side.socket
        self._backend = backend
        self._address = address
        self._number = number
        self._turn = itertools.count(1)
        say = lambda name, value: side.loop.call_soon(partial(self._say, name, value))  # noqa: E731
        self.session = Session(side.loop, backend, 0, say, lambda reason: None)

    def _say(self, name: str, value: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the consumer is gone, and the session with it
            message = wire.Rendezvous(self._number, name, value)
            self._socket.send_multipart([self._address, wire.encode(message)])

    def told(self, name: str, value: bytes) -> None:
        if name == _GOT:
            self.session.release()
        else:
            self.session.told(name, value)

    def send(self, parcel: Parcel, digest: int) -> None:
        header = parcel.header(at=next(self._turn), digest=digest)
        self._socket.send_multipart([self._address, wire.encode(header)])
        self.session.put(_Send(self._backend, parcel.rows, parcel.nbytes))

    def close(self) -> None:
        self.session.close()


class CollectiveProducer:
    """See :class:`kvtransfer.transport.ProducerTransport`."""

    name = "collective"

    def __init__(self, side: ProducerSide, backend: Backend) -> None:
        self._side = side
        self._backend = backend
        self._senders: list[CollectiveSender] = []

    def accept(self, hello: wire.Hello, offer: bytes, address: bytes) -> tuple[CollectiveSender, bytes]:
        ours = _terms_of(self._backend)
        if (theirs := _decode(offer)) != ours:
            raise Unavailable(f"collective: {theirs} there, {ours} here")
        sender = CollectiveSender(self._side, self._backend, address, hello.session)
        self._senders = [s for s in self._senders if s.session.alive] + [sender]
        return sender, msgspec.msgpack.encode(ours)

    def close(self) -> None:
        for sender in self._senders:
            sender.close()
        for sender in self._senders:
            sender.session.join()


@dataclass(frozen=True, slots=True)
class _Receive:
    """``shape``: of the rows, None if nobody wants them."""

    receiver: CollectiveReceiver
    message: wire.Blocks
    shape: tuple[int, int, int, int] | None
    buffer: Buffer

    @property
    def nbytes(self) -> int:
        return self.message.nbytes

    def post(self, group: Any) -> Any:
        return self.receiver.backend.receive(group, self.buffer.data)

    def done(self) -> None:
        self.receiver.loop.call_soon(partial(self.receiver.arrived, self))


class CollectiveReceiver:
    """See :class:`kvtransfer.transport.Receiver`."""

    def __init__(
        self,
        side: ConsumerSide,
        backend: Backend,
        pool: Pool,
        endpoint: str,
        number: int,
        deliver: Deliver,
        broken: Broken,
    ) -> None:
        self.loop = side.loop
        self.backend = backend
        self._pool = pool
        self._deliver = deliver
        self._broken = broken
        self._expected = itertools.count(1)
        self._waiting: deque[tuple[wire.Blocks, tuple[int, int, int, int] | None]] = deque()
        self._in_flight = 0
        self._closed = False

        def say(name: str, value: bytes) -> None:
            side.loop.call_soon(partial(side.send, endpoint, wire.Rendezvous(number, name, value)))

        self._say = say
        self.session = Session(side.loop, backend, 1, say, self._fail)

    def told(self, name: str, value: bytes) -> None:
        self.session.told(name, value)

    def receive(
        self, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int], frames: Sequence[zmq.Frame]
    ) -> None:
        rows = (shape.layers, message.count, heads[1] - heads[0], shape.row_bytes)
        expected = rows[0] * rows[1] * rows[2] * rows[3]
        if message.count < 1 or message.nbytes != expected or expected > wire.MAX_PAYLOAD:
            raise wire.KvWireError(f"payload of {message.nbytes} bytes, expected {expected}")
        self._announced(message, rows)

    def skip(self, message: wire.Blocks) -> None:
        if message.nbytes > 0:
            self._announced(message, None)

    def close(self) -> None:
        self._closed = True
        self._waiting.clear()
        self.session.close()

    def _announced(self, message: wire.Blocks, shape: tuple[int, int, int, int] | None) -> None:
        if self._closed:
            return
        if message.at != next(self._expected):
            self._fail(f"payload {message.at} is out of turn")
            return
        self._waiting.append((message, shape))
        self._pump()

    def _pump(self) -> None:
        """Receive what has room, in order."""
        while self._waiting:
            message, shape = self._waiting[0]
            if self._in_flight and self._in_flight + message.nbytes > IN_FLIGHT:
                return
            buffer = self._pool.take(message.nbytes, self._pump)
            if buffer is None:
                return
            self._waiting.popleft()
            self._in_flight += message.nbytes
            self.session.put(_Receive(self, message, shape, buffer))

    def arrived(self, job: _Receive) -> None:
        """A payload is complete."""
        if self._closed:
            return
        self._in_flight -= job.nbytes
        self._say(_GOT, b"")
        self._pump()
        if job.shape is not None:
            self._deliver(job.message, job.buffer.data.view(job.shape))

    def _fail(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._broken(f"collective: {reason}")


class CollectiveConsumer:
    """See :class:`kvtransfer.transport.ConsumerTransport`."""

    name = "collective"

    def __init__(self, side: ConsumerSide, backend: Backend) -> None:
        self._side = side
        self._backend = backend
        self._pool = Pool(side.loop)
        self._receivers: list[CollectiveReceiver] = []

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(_terms_of(self._backend))

    def open(
        self, welcome: wire.Welcome, endpoint: str, deliver: Deliver, broken: Broken
    ) -> CollectiveReceiver:
        if _decode(welcome.data) != _terms_of(self._backend):
            raise Unavailable("collective: another backend than ours")
        receiver = CollectiveReceiver(
            self._side, self._backend, self._pool, endpoint, welcome.session, deliver, broken
        )
        self._receivers = [r for r in self._receivers if r.session.alive] + [receiver]
        return receiver

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()
        for receiver in self._receivers:
            receiver.session.join()
        self._pool.close()


def _terms_of(backend: Backend) -> Terms:
    backend.check()
    return Terms(backend.name, torch.__version__.split("+")[0])


def _decode(data: bytes) -> Terms:
    try:
        return msgspec.msgpack.decode(data, type=Terms)
    except msgspec.DecodeError as error:
        raise Unavailable(f"collective terms: {error}") from None
