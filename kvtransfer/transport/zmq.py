"""Payloads over ZMQ itself: inline frames of the control lane, or of several lanes to fill a fast link.

A lane is a further DEALER connection of the same session to the producer's ROUTER; the first message on it is
``Lane``. Parcels go to the lanes in turn, and each lane keeps its order, so with several lanes parcels of a
subscription may overtake one another. Frames are sent without a copy: they are read-only views of staging.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence

import msgspec
import zmq

from kvtransfer import wire
from kvtransfer.rows import Rows, address_of, packed
from kvtransfer.transport import Broken, Deliver, Parcel, Unavailable

Socket = zmq.Socket[bytes]


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offer and answer: how many connections carry payloads."""

    lanes: int


class ZmqSender:
    """See :class:`kvtransfer.transport.Sender`."""

    stretch = 1
    wraps = True

    def __init__(self, socket: Socket, address: bytes, lanes: int) -> None:
        self._socket = socket
        self._addresses = [address]
        self._lanes = lanes
        self._turn = itertools.count()

    @property
    def outlives(self) -> bool:
        """One of several connections may be lost, and what waits on the others still leaves staging."""
        if self._lanes > 1:
            self._addresses = [address for address in self._addresses if self._is_connected(address)]
            return bool(self._addresses)
        return False

    def _is_connected(self, address: bytes) -> bool:
        try:
            self._socket.send_multipart([address, wire.encode(wire.Alive(()))])
        except zmq.ZMQError as error:
            return error.errno != errno.EHOSTUNREACH
        return True

    def add_lane(self, address: bytes) -> None:
        """A further connection of this session; more than agreed are not used."""
        if len(self._addresses) < self._lanes and address not in self._addresses:
            self._addresses.append(address)

    def send(self, parcel: Parcel, digest: int) -> None:
        header, payload = wire.encode(parcel.header(digest=digest)), parcel.wrap()  # all of it, or none
        self._socket.send(self._addresses[next(self._turn) % len(self._addresses)], zmq.SNDMORE)
        self._socket.send(header, zmq.SNDMORE)
        self._socket.send(payload, copy=False)

    def close(self) -> None:
        """Nothing is held; what ZMQ has queued goes with the connection."""


class ZmqProducer:
    """See :class:`kvtransfer.transport.ProducerTransport`."""

    name = "zmq"

    def __init__(self, socket: Socket, max_lanes: int = 8) -> None:
        self._socket = socket
        self._max_lanes = max_lanes

    def accept(self, hello: wire.Hello, offer: bytes, address: bytes) -> tuple[ZmqSender, bytes]:
        lanes = max(1, min(_terms(offer).lanes, self._max_lanes))
        return ZmqSender(self._socket, address, lanes), msgspec.msgpack.encode(Terms(lanes))

    def close(self) -> None:
        """The socket is the producer's."""


class ZmqReceiver:
    """See :class:`kvtransfer.transport.Receiver`."""

    def __init__(self, deliver: Deliver, close: Callable[[], None]) -> None:
        self._deliver = deliver
        self._close = close

    def receive(
        self, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int], frames: Sequence[zmq.Frame]
    ) -> None:
        if len(frames) != 1:
            raise wire.KvWireError(f"{len(frames)} payload frames, expected 1")
        self._deliver(message, rows_of(frames[0], message, shape, heads[1] - heads[0]))

    def skip(self, message: wire.Blocks) -> None:
        """Nothing is left anywhere."""

    def close(self) -> None:
        self._close()


class ZmqConsumer:
    """See :class:`kvtransfer.transport.ConsumerTransport`.

    Args:
        consumer: the consumer's id at an endpoint.
        lanes: connections that carry payloads; 1 uses the control lane itself.
        connect: opens and registers a further connection to an endpoint; returns it and what closes it.
    """

    name = "zmq"

    def __init__(
        self,
        consumer: Callable[[str], bytes],
        lanes: int,
        connect: Callable[[str], tuple[Socket, Callable[[], None]]],
    ) -> None:
        self._consumer = consumer
        self._lanes = lanes
        self._connect = connect

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(Terms(self._lanes))

    def open(self, welcome: wire.Welcome, endpoint: str, deliver: Deliver, broken: Broken) -> ZmqReceiver:
        lanes = min(_terms(welcome.data).lanes, self._lanes)
        closers: list[Callable[[], None]] = []

        def close_all() -> None:
            while closers:
                closers.pop()()

        try:
            for _ in range(1, lanes):
                socket, close = self._connect(endpoint)
                closers.append(close)
                socket.send(wire.encode(wire.Lane(self._consumer(endpoint), welcome.session)), zmq.NOBLOCK)
        except (zmq.ZMQError, ValueError) as error:
            close_all()
            raise Unavailable(f"zmq: no further connection ({error})") from None
        return ZmqReceiver(deliver, close_all)

    def close(self) -> None:
        """The sockets are the consumer's."""


def rows_of(payload: zmq.Frame, message: wire.Blocks, shape: wire.Shape, heads: int) -> Rows:
    """A payload as ``[layers, count, heads, row_bytes]``.

    Raises:
        KvWireError: the length is not that of the message's blocks.
    """
    nbytes, expected = len(payload), shape.layers * message.count * heads * shape.row_bytes
    if message.count < 1 or nbytes != expected or message.nbytes != expected:
        raise wire.KvWireError(f"payload of {nbytes} bytes, expected {expected}")
    return packed(payload, address_of(payload), (shape.layers, message.count, heads, shape.row_bytes))


def _terms(data: bytes) -> Terms:
    try:
        return msgspec.msgpack.decode(data, type=Terms)
    except msgspec.DecodeError as error:
        raise Unavailable(f"zmq terms: {error}") from None
