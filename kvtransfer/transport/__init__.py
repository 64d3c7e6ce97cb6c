"""How the bytes of blocks travel between the two ends of a session.

A session is one consumer rank connected to one producer rank. Messages always travel on its control lane
(ZMQ); a transport moves payloads. The consumer offers the transports it has, in order of preference, the
producer takes the first that works for both, and the consumer opens its half (if it can't, it says Hello
again without that offer).

To add one: implement :class:`ProducerTransport` with its :class:`Sender` and :class:`ConsumerTransport` with
its :class:`Receiver`, over what the ends lend (:class:`ProducerSide`, :class:`ConsumerSide`), and name it in
:mod:`kvtransfer.transport.select`. All methods are called by who holds the end's loop;
none may block it, but for ``close`` of an end, whose loop has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import zmq
from zmq import Frame  # by its name: `zmq` is this package's own module once that is imported

from kvtransfer import wire
from kvtransfer.arena import Arena
from kvtransfer.loop import Loop

Socket = zmq.Socket[bytes]


class Unavailable(Exception):
    """This transport can't be used with this peer; the message says why."""


@dataclass(slots=True)
class Piece:
    """Blocks that lie in staging.

    Attributes:
        at: offset in the arena.
        rows: tensor ``[layers, count, heads, row_bytes]``, uint8, contiguous; never written again while
            a subscription that may need it lives.
        shape: of ``rows``; to ask a tensor for it takes longer.
        memory: the bytes of ``rows``.
        digest: of ``rows``, 0 if not computed.
    """

    group: int
    first: int
    count: int
    at: int
    rows: Any
    shape: tuple[int, int, int, int]
    memory: memoryview
    digest: int = 0
    _frame: Frame | None = None

    @property
    def last(self) -> int:
        return self.first + self.count

    def wrap(self) -> Frame:
        """The bytes as a frame that ZMQ sends uncopied, to any number of consumers; made once."""
        if self._frame is None:
            self._frame = Frame(self.memory, copy=False)
        return self._frame


@dataclass(slots=True)
class Parcel:
    """What one subscription gets of a piece: ``count`` blocks, ``skip`` after its first, of some heads."""

    sub: int
    piece: Piece
    skip: int
    count: int
    heads: tuple[int, int]

    @property
    def whole(self) -> bool:
        """Whether nothing of the piece is left out."""
        return self.count == self.piece.count and self.heads == (0, self.piece.shape[2])

    @property
    def rows(self) -> Any:
        """A view ``[layers, count, heads, row_bytes]``, contiguous only if it is ``whole``."""
        if self.whole:
            return self.piece.rows
        return self.piece.rows[:, self.skip : self.skip + self.count, self.heads[0] : self.heads[1]]

    def wrap(self) -> Frame:
        """The bytes of ``rows`` as a frame, copied unless they are ``whole``."""
        if self.whole:
            return self.piece.wrap()
        return Frame(memoryview(self.rows.contiguous().numpy()).cast("B"), copy=False)

    @property
    def nbytes(self) -> int:
        layers, _, _, row_bytes = self.piece.shape
        return layers * self.count * (self.heads[1] - self.heads[0]) * row_bytes

    def header(self, **where: int) -> wire.Blocks:
        """The message that announces it; ``where``: fields for one-sided transports."""
        piece = self.piece
        first = piece.first + self.skip
        return wire.Blocks(self.sub, piece.group, first, self.count, self.nbytes, **where)


def is_part(message: wire.Blocks) -> bool:
    """Whether a message's blocks are some of those that it says lie there."""
    return message.skip >= 0 and message.count >= 1 and message.skip + message.count <= message.of


class Sender(Protocol):
    """The producer's half of a session.

    Attributes:
        outlives: the consumer may still read staging after the connection is lost, so the memory of its
            subscriptions is used again only when they have ended or their deadline has passed.
        stretch: how many times larger than elsewhere pieces may be, where nothing but the announcement
            is sent and there is nothing to overlap by small ones.
        wraps: it sends pieces as frames, which may be made beforehand.
    """

    stretch: int
    wraps: bool

    @property
    def outlives(self) -> bool: ...

    def send(self, parcel: Parcel, digest: int) -> None:
        """Announce a parcel on the control lane and let its bytes go.

        The piece stays as it is until the subscription ends. Raises ``zmq.ZMQError`` (EHOSTUNREACH) if
        the consumer is gone.
        """

    def close(self) -> None:
        """The session has ended. Idempotent."""


class Receiver(Protocol):
    """The consumer's half of a session."""

    def receive(
        self, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int], frames: Sequence[zmq.Frame]
    ) -> None:
        """Get the payload of ``message``, blocks of ``shape`` on the producer's rank, of which the
        subscription asked for ``heads``.

        ``deliver(message, rows)`` follows once, now or later, with rows ``[layers, count, heads, row_bytes]``
        (a tensor, or :class:`kvtransfer.rows.Rows`, which are written sooner) that are valid until it
        returns (longer, if it keeps a reference); or ``broken(reason)`` once, after
        which the session delivers nothing. Raises :class:`kvtransfer.wire.KvWireError` for a message that
        does not fit its payload.
        """

    def skip(self, message: wire.Blocks) -> None:
        """Take the payload of ``message`` off the transport; nobody wants it any more."""

    def close(self) -> None:
        """The session has ended; nothing is delivered afterwards. Idempotent."""


@runtime_checkable
class Meets(Protocol):
    """A half of a session (Sender or Receiver) that takes ``Rendezvous`` messages of the other one."""

    def told(self, name: str, value: bytes) -> None:
        """The other half has said this."""


@dataclass(frozen=True, slots=True)
class ProducerSide:
    """What a producer lends its transports. ``socket``: the ROUTER of all control lanes."""

    loop: Loop
    socket: Socket
    arena: Arena


@dataclass(frozen=True, slots=True)
class ConsumerSide:
    """What a consumer lends its transports.

    Attributes:
        consumer: its id at an endpoint.
        connect: opens and registers a further connection to an endpoint; returns it and what closes it.
        send: sends a message on an endpoint's control lane.
    """

    loop: Loop
    consumer: Callable[[str], bytes]
    connect: Callable[[str], tuple[Socket, Callable[[], None]]]
    send: Callable[[str, wire.Data], None]


Deliver = Callable[[wire.Blocks, Any], None]
Broken = Callable[[str], None]


class ProducerTransport(Protocol):
    """A transport as one producer has it."""

    name: str

    def accept(self, hello: wire.Hello, offer: bytes, address: bytes) -> tuple[Sender, bytes]:
        """Set up the half for a consumer; the bytes are for its ``open``. Raises :class:`Unavailable`."""

    def close(self) -> None:
        """The producer ends."""


class ConsumerTransport(Protocol):
    """A transport as one consumer has it."""

    name: str

    def offer(self) -> bytes:
        """What the producer needs to know. Raises :class:`Unavailable` if this machine lacks it."""

    def open(self, welcome: wire.Welcome, endpoint: str, deliver: Deliver, broken: Broken) -> Receiver:
        """Set up the half for a producer. Raises :class:`Unavailable`."""

    def close(self) -> None:
        """The consumer ends."""
