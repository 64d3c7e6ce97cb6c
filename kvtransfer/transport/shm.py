"""Payloads through the producer's staging memory itself, for two ends on one host.

The consumer maps the producer's arena read-only and copies blocks from there into its cache: one copy on
each side, nothing on a socket but the announcement. Whether both are on one host is tried, not guessed: the
producer puts a random number into its arena, and only who finds it there has the right one.
"""

from __future__ import annotations

import os
import select
import weakref
from collections.abc import Sequence

import msgspec
import torch
import zmq

from kvtransfer import wire
from kvtransfer.arena import Arena, ArenaRef, open_arena
from kvtransfer.rows import Rows
from kvtransfer.transport import Broken, Deliver, Parcel, Unavailable, is_part

Socket = zmq.Socket[bytes]


class Process:
    """A process of this host, which stays itself when its number is given to another."""

    def __init__(self, pid: int) -> None:
        """Raises OSError if there is none."""
        fd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, fd)
        self._end = select.poll()
        self._end.register(fd, select.POLLIN)

    @property
    def alive(self) -> bool:
        """Whether it has not ended; one that is stopped has not."""
        return not self._end.poll(0)


class ShmSender:
    """See :class:`kvtransfer.transport.Sender`."""

    stretch = 8
    wraps = False

    def __init__(self, socket: Socket, address: bytes, reader: Process) -> None:
        self._socket = socket
        self._address = address
        self._reader = reader

    @property
    def outlives(self) -> bool:
        """A process that stands still loses its connection, not its map."""
        return self._reader.alive

    def send(self, parcel: Parcel, digest: int) -> None:
        piece = parcel.piece
        where = {"at": piece.at, "skip": parcel.skip, "of": piece.count, "heads": piece.shape[2]}
        message = parcel.header(**where, digest=digest)
        self._socket.send_multipart([self._address, wire.encode(message)])

    def close(self) -> None:
        """Nothing is held."""


class ShmProducer:
    """See :class:`kvtransfer.transport.ProducerTransport`."""

    name = "shm"

    def __init__(self, socket: Socket, arena: Arena) -> None:
        self._socket = socket
        self._arena = arena

    def accept(self, hello: wire.Hello, offer: bytes, address: bytes) -> tuple[ShmSender, bytes]:
        try:
            reader = Process(msgspec.msgpack.decode(offer, type=int))
        except (msgspec.DecodeError, OSError, OverflowError) as error:
            raise Unavailable(f"shm: {error}") from None
        return ShmSender(self._socket, address, reader), msgspec.msgpack.encode(self._arena.ref)

    def close(self) -> None:
        """The arena is the producer's."""


class ShmReceiver:
    """See :class:`kvtransfer.transport.Receiver`."""

    def __init__(self, memory: memoryview, deliver: Deliver) -> None:
        self._memory: memoryview | None = memory
        self._address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._deliver = deliver

    def receive(
        self, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int], frames: Sequence[zmq.Frame]
    ) -> None:
        if self._memory is not None:
            self._deliver(message, rows_at(self._memory, self._address, message, shape, heads))

    def skip(self, message: wire.Blocks) -> None:
        """Nothing is left anywhere."""

    def close(self) -> None:
        self._memory = None


class ShmConsumer:
    """See :class:`kvtransfer.transport.ConsumerTransport`.

    A session maps the arena as long as it lasts: a map keeps all of the memory of a producer that is gone.
    """

    name = "shm"

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(os.getpid())

    def open(self, welcome: wire.Welcome, endpoint: str, deliver: Deliver, broken: Broken) -> ShmReceiver:
        try:
            memory = open_arena(msgspec.msgpack.decode(welcome.data, type=ArenaRef))
        except (msgspec.DecodeError, OSError, ValueError, OverflowError) as error:
            raise Unavailable(f"shm: {error}") from None
        return ShmReceiver(memory, deliver)

    def close(self) -> None:
        """The maps are the sessions'."""


def rows_at(
    memory: memoryview, address: int, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int]
) -> Rows:
    """The rows a message names in a producer's staging, which is mapped at ``address``.

    Raises:
        KvWireError: they are not inside the memory, or not as many bytes as the message says.
    """
    nbytes = shape.layers * message.of * shape.heads * shape.row_bytes
    inside = 0 <= message.at <= memory.nbytes - nbytes and is_part(message)
    if not inside or message.heads != shape.heads:
        raise wire.KvWireError(f"{nbytes} bytes at {message.at} are not in the arena of {memory.nbytes}")
    expected = shape.layers * message.count * (heads[1] - heads[0]) * shape.row_bytes
    if message.nbytes != expected:
        raise wire.KvWireError(f"payload of {message.nbytes} bytes, expected {expected}")
    block = shape.heads * shape.row_bytes
    offset = message.at + message.skip * block + heads[0] * shape.row_bytes
    layout = (shape.layers, message.count, heads[1] - heads[0], shape.row_bytes)
    return Rows(memory, address, offset, layout, message.of * block, block)
