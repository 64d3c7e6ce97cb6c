"""Real ends on real sockets, each on a thread of its own, and what a test waits for."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch
import zmq

from braid.keys import stop_authenticator
from kvtransfer import wire
from kvtransfer.arena import Arena
from kvtransfer.cache import Cache, Group, HostCache
from kvtransfer.codec import Codec, encoded_gather, encoded_shapes
from kvtransfer.consumer import Consumer
from kvtransfer.digest import Check, Digests
from kvtransfer.loop import Loop
from kvtransfer.producer import Producer
from kvtransfer.transport.select import consumer_transports, producer_transports

T = TypeVar("T")
E = TypeVar("E")

DEADLINE_S = 10.0
"""How long anything awaited may take; reached only by a failure."""
EPOCH = 7
BLOCKS = 12
"""Blocks of a test's cache; block 0 is never a load's."""
HEADS = 2
ROW_BYTES = 128
BLOCK_BYTES = 2 * HEADS * ROW_BYTES
"""Bytes of a block of the default cache: two layers."""


class Events:
    """What an end emitted, in order; awaited by type and key."""

    def __init__(self) -> None:
        self.seen: list[wire.Event] = []
        self._changed = threading.Condition()

    def emit(self, event: wire.Event) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def expect(self, kind: type[E], key: wire.Key) -> E:
        """The first event of this type for this key, now or later."""
        found: list[E] = []

        def search() -> bool:
            found[:] = self.of(kind, key)
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(search, DEADLINE_S), f"no {kind.__name__} among {self.seen}"
        return found[0]

    def of(self, kind: type[E], key: wire.Key) -> list[E]:
        """Those seen so far of this type for this key."""
        return [e for e in self.seen if isinstance(e, kind) and getattr(e, "key", None) == key]

    def count(self, kind: type[object]) -> int:
        return sum(isinstance(event, kind) for event in self.seen)


class Thread:
    """A loop with its context and its events."""

    def __init__(self, name: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.loop = Loop(name)
        self.events = Events()

    def call(self, function: Callable[[], T]) -> T:
        """Run on the loop's thread and return what it returns."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.loop.call_soon(run)
        return future.result(DEADLINE_S)

    def until(self, holds: Callable[[], bool]) -> None:
        """Look on the loop's thread, once a turn, until it holds."""
        give_up = time.monotonic() + DEADLINE_S
        while not self.call(holds):
            assert time.monotonic() < give_up, "it never held"
            time.sleep(0.002)  # let the loop receive

    def stop(self) -> None:
        if self.loop.is_alive():
            self.loop.stop()

    def destroy(self) -> None:
        stop_authenticator(self.context)
        self.context.destroy(linger=0)


class Blocks(HostCache):
    """A cache whose layers a test can look at; ``tensors[group][layer]`` is ``[blocks, heads, row]``."""

    def __init__(self, tensors: list[list[torch.Tensor]]) -> None:
        super().__init__([Group(layers, layers[0].shape[1]) for layers in tensors])
        self.tensors = tensors

    def take(self, block_ids: Sequence[int], group: int = 0) -> torch.Tensor:
        """A copy of blocks, ``[layers, count, heads, row_bytes]``."""
        return torch.stack([layer[list(block_ids)] for layer in self.tensors[group]])


def make_cache(
    layers: int = 2,
    blocks: int = BLOCKS,
    *,
    fill: bool,
    heads: int = HEADS,
    row_bytes: int = ROW_BYTES,
    groups: int = 1,
    seed: int = 1,
) -> Blocks:
    """A cache of random bytes (``fill``; equal for equal seeds, none of them 0) or of zeros."""
    random = torch.Generator().manual_seed(seed)
    shape = (layers, blocks, heads, row_bytes)

    def group() -> list[torch.Tensor]:
        if not fill:
            return list(torch.zeros(shape, dtype=torch.uint8))
        return list(torch.randint(1, 256, shape, dtype=torch.uint8, generator=random))

    return Blocks([group() for _ in range(groups)])


def contents(cache: Blocks, group: int = 0) -> torch.Tensor:
    """A copy of all bytes of a group, ``[layers, blocks, heads, row_bytes]``."""
    return cache.take(range(cache.blocks), group)


class ProducerEnd(Thread):
    """A producer whose prompts' blocks lie in ``cache``."""

    def __init__(
        self,
        *,
        capacity: int = 1 << 20,
        lease_s: float = DEADLINE_S,
        keys_dir: Path | None = None,
        bind: str = "tcp://127.0.0.1:*",
        transports: Sequence[str] = ("shm", "zmq"),
        piece_bytes: int = 1 << 20,
        check: Check = "full",
        cache: Blocks | None = None,
        epoch: int = EPOCH,
        codec: Codec | None = None,
    ) -> None:
        super().__init__("test-producer")
        self.cache = cache or make_cache(fill=True)
        self.arena = Arena(capacity)
        self.gathers = itertools.count()
        self.codec = codec
        self.end = Producer(
            self.loop,
            self.context,
            bind=bind,
            epoch=epoch,
            shapes=encoded_shapes(self.cache.shapes, codec) if codec else self.cache.shapes,
            codec=codec.name if codec else "",
            arena=self.arena,
            lease_s=lease_s,
            emit=self.events.emit,
            transports=producer_transports(transports),
            piece_bytes=piece_bytes,
            digests=Digests(check),
            keys_dir=keys_dir,
        )
        self.loop.start()

    def open(self, key: wire.Key, blocks: int, *, subscribers: int = 1, **changes: object) -> None:
        """Open a lease of ``blocks`` blocks of 4 tokens in every group."""
        spans = tuple(wire.Want(group, 0, blocks) for group in range(len(self.cache.shapes)))
        fields = {"tokens": blocks * 4, "chain": b"chain", "fingerprint": "fp", "spans": spans, **changes}
        message = wire.Open(key, subscribers=subscribers, **fields)  # type: ignore[arg-type]
        self.call(lambda: self.end.open(message))

    def publish(self, key: wire.Key, first: int, block_ids: list[int], group: int = 0) -> bool:
        """Stage the cache's blocks as the prompt's from ``first`` on."""

        def fill(run: range, out: torch.Tensor) -> None:
            next(self.gathers)
            ids = block_ids[run.start : run.stop]
            if self.codec is not None:
                encoded_gather(self.cache, self.codec, group, ids, out)
            else:
                self.cache.gather(group, ids, out)

        return self.end.stage(key, group, first, len(block_ids), fill)

    @property
    def stats(self) -> wire.Stats:
        return self.call(self.end.stats)

    def settle(self) -> None:
        """Wait until nothing is held."""
        self.until(lambda: self.end.stats() == wire.Stats() and self.arena.used == 0)

    def check(self) -> None:
        def both() -> None:
            self.end.table.check_integrity()
            self.arena.check_integrity()

        self.call(both)

    def close(self) -> None:
        self.stop()
        self.end.close()
        self.destroy()


class ConsumerEnd(Thread):
    def __init__(
        self,
        *,
        keys_dir: Path | None = None,
        transports: Sequence[str] = ("shm", "zmq"),
        lanes: int = 1,
        cache: Blocks | None = None,
        through: Callable[[Blocks], Cache] = lambda cache: cache,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        super().__init__("test-consumer")
        self.cache = cache or make_cache(fill=False)
        self.end = Consumer(
            self.loop,
            self.context,
            through(self.cache),
            name="d0",
            emit=self.events.emit,
            transports=consumer_transports(transports, lanes),
            codecs=codecs,
            keys_dir=keys_dir,
        )
        self.loop.start()

    def load(self, key: wire.Key, endpoint: str, block_ids: tuple[int, ...], **changes: object) -> None:
        """Load the prompt's blocks from ``first`` (0) on into these blocks of every group."""
        first, epoch = changes.pop("first", 0), changes.pop("epoch", EPOCH)
        assert isinstance(first, int)
        assert isinstance(epoch, int)
        fields: dict[str, object] = {
            "sources": (wire.Source(endpoint, epoch, 0, self.cache.shapes[0].heads, 0),),
            "fingerprint": "fp",
            "tokens": (first + len(block_ids)) * 4,
            "chain": b"chain",
            "spans": tuple(wire.Span(group, first, block_ids) for group in range(len(self.cache.shapes))),
            "deadline_s": DEADLINE_S,
        }
        spec = wire.Load(key, **(fields | changes))  # type: ignore[arg-type]
        self.call(lambda: self.end.load(spec))

    def unload(self, key: wire.Key) -> None:
        self.call(lambda: self.end.unload(key, "cancelled"))

    def came(self, key: wire.Key) -> int:
        """Blocks of a load in flight that have been written."""

        def missing() -> int:
            load = self.end._loads[key]
            total = sum(len(span.block_ids) for span in load.spec.spans) * len(load.parts)
            return total - sum(len(m) for part in load.parts for m in part.missing.values())

        return self.call(missing)

    def settle(self) -> None:
        """Wait until nothing is in flight."""
        self.until(lambda: self.end.stats() == wire.Stats() and not self.end._parts)

    def close(self) -> None:
        self.stop()
        self.end.close()
        self.destroy()


class Pair:
    """A producer and its consumers, each on a thread of its own.

    Args:
        transports: those all ends have; ``lanes``, ``blocks``, ``row_bytes``, ``groups`` of the ends.
    """

    def __init__(
        self,
        *,
        keys_dir: Path | None = None,
        transports: Sequence[str] = ("shm", "zmq"),
        lanes: int = 1,
        blocks: int = BLOCKS,
        row_bytes: int = ROW_BYTES,
        groups: int = 1,
        **producer: object,
    ) -> None:
        self.keys_dir = keys_dir
        self._transports, self._lanes = transports, lanes
        self._shape = {"blocks": blocks, "row_bytes": row_bytes, "groups": groups}
        self.p = ProducerEnd(
            keys_dir=keys_dir,
            transports=transports,
            cache=make_cache(fill=True, **self._shape),
            **producer,  # type: ignore[arg-type]
        )
        self.consumers: list[ConsumerEnd] = []
        self.d = self.consumer()

    @property
    def endpoint(self) -> str:
        return self.p.end.endpoint

    def consumer(self, **options: object) -> ConsumerEnd:
        """One more consumer."""
        defaults = {
            "keys_dir": self.keys_dir,
            "transports": self._transports,
            "lanes": self._lanes,
            "cache": make_cache(fill=False, **self._shape),
        }
        self.consumers.append(ConsumerEnd(**(defaults | options)))  # type: ignore[arg-type]
        return self.consumers[-1]

    def close(self) -> None:
        for consumer in self.consumers:
            if consumer.loop.is_alive():
                consumer.call(consumer.end.check_integrity)
                assert consumer.call(consumer.end.stats) == wire.Stats()
            consumer.close()
        if self.p.loop.is_alive():
            self.p.check()
        self.p.close()


def make_key(number: int = 1, attempt: int = 1) -> wire.Key:
    return wire.Key(number.to_bytes(16, "big"), attempt)


def same(source: Blocks, theirs: Sequence[int], target: Blocks, ours: Sequence[int], group: int = 0) -> bool:
    """Whether the blocks hold equal bytes."""
    return bool(torch.equal(source.take(theirs, group), target.take(ours, group)))
