"""An end in a process of its own, to be killed, stopped and continued; see :mod:`tests.kvtransfer.remote`.

Commands come on stdin and events go to stdout, each a length and a msgpack message. The process ends with
its stdin.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from typing import BinaryIO

import msgspec
import torch

from kvtransfer import sockets, wire
from tests.kvtransfer.ends import Blocks, ConsumerEnd, ProducerEnd, make_cache


class Setup(msgspec.Struct, frozen=True):
    """First message. ``stop_at``: a consumer stops itself (SIGSTOP) before it writes its n-th parcel."""

    role: str
    transports: tuple[str, ...]
    epoch: int
    blocks: int
    row_bytes: int
    piece_bytes: int
    silent_s: float
    seed: int = 1
    stop_at: int = 0


class Stage(msgspec.Struct, frozen=True, tag_field="t", tag="stage"):
    """Stage these cache blocks as the prompt's from ``first`` on."""

    key: wire.Key
    first: int
    block_ids: tuple[int, ...]


class Look(msgspec.Struct, frozen=True, tag_field="t", tag="look"):
    """Answered by ``Seen``."""

    block_ids: tuple[int, ...]


class Seen(msgspec.Struct, frozen=True, tag_field="t", tag="seen"):
    """Bytes of cache blocks, ``[layers, count, heads, row_bytes]``."""

    data: bytes


Command = wire.Open | wire.Close | wire.Load | wire.Unload | wire.Stat | Stage | Look
Answer = wire.Ready | wire.Opened | wire.Closed | wire.Loaded | wire.Failed | wire.Stats | Seen


def put(stream: BinaryIO, message: msgspec.Struct) -> None:
    """Write one message."""
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def take(stream: BinaryIO) -> bytes | None:
    """Read one message; None at the end."""
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "big")) if len(head) == 4 else None


class StoppingCache:
    """Stops its process between the deadline's check and the copy, once."""

    def __init__(self, cache: Blocks, stop_at: int) -> None:
        self._cache = cache
        self._left = stop_at
        self.shapes, self.blocks = cache.shapes, cache.blocks
        self.copy, self.gather = cache.copy, cache.gather

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> None:
        self._left -= 1
        if self._left == 0:
            # to this thread: sent to the process, another takes it, and this one may go on meanwhile
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        self._cache.scatter(group, block_ids, rows, put)


def main() -> None:
    first = take(sys.stdin.buffer)
    assert first is not None
    setup = msgspec.msgpack.decode(first, type=Setup)
    sockets.HEARTBEAT_S, sockets.SILENT_S = setup.silent_s / 3, setup.silent_s
    producer = setup.role == "producer"
    cache = make_cache(blocks=setup.blocks, row_bytes=setup.row_bytes, fill=producer, seed=setup.seed)
    end: ProducerEnd | ConsumerEnd
    if producer:
        end = ProducerEnd(
            transports=setup.transports,
            epoch=setup.epoch,
            cache=cache,
            piece_bytes=setup.piece_bytes,
            capacity=1 << 26,
        )
    else:
        end = ConsumerEnd(
            transports=setup.transports,
            cache=cache,
            through=lambda cache: StoppingCache(cache, setup.stop_at) if setup.stop_at else cache,
        )
    end.end._emit = lambda event: put(sys.stdout.buffer, event)
    endpoint = end.end.endpoint if isinstance(end, ProducerEnd) else ""
    put(sys.stdout.buffer, wire.Ready(0, "test", cache.shapes, endpoint))
    while (frame := take(sys.stdin.buffer)) is not None:
        command: Command = msgspec.msgpack.decode(frame, type=Command)  # type: ignore[arg-type]
        obey(end, command)
    end.close()


def obey(end: ProducerEnd | ConsumerEnd, command: Command) -> None:
    """Carry out one command."""
    if isinstance(end, ProducerEnd):
        producer = end.end
        match command:
            case wire.Open():
                end.call(lambda: producer.open(command))
            case wire.Close(key, reason):
                end.call(lambda: producer.end(key, reason))
            case Stage(key, first, block_ids):
                end.publish(key, first, list(block_ids))
    else:
        consumer = end.end
        match command:
            case wire.Load():
                end.call(lambda: consumer.load(command))
            case wire.Unload(key, reason):
                end.call(lambda: consumer.unload(key, reason))
            case Look(block_ids):
                data = end.call(lambda: end.cache.take(block_ids).numpy().tobytes())
                put(sys.stdout.buffer, Seen(data))
    if isinstance(command, wire.Stat):
        put(sys.stdout.buffer, end.call(end.end.stats))


if __name__ == "__main__":
    main()
