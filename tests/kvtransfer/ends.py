"""Real ends on real sockets, and what a test waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch
import zmq

from braid.keys import stop_authenticator
from kvtransfer import wire
from kvtransfer.consumer import Consumer
from kvtransfer.loop import Loop
from kvtransfer.paged import PagedCache
from kvtransfer.producer import Producer

T = TypeVar("T")
E = TypeVar("E")

DEADLINE_S = 60.0
"""How long anything awaited may take; reached only by a failure."""
EPOCH = 7
BLOCKS = 12
"""Blocks of a test's cache; block 0 is never a load's."""


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
            found[:] = [e for e in self.seen if isinstance(e, kind) and getattr(e, "key", None) == key]
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(search, DEADLINE_S), f"no {kind.__name__} among {self.seen}"
        return found[0]

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

    def close(self) -> None:
        if self.loop.is_alive():
            self.loop.stop()
        stop_authenticator(self.context)
        self.context.destroy(linger=0)


def make_cache(layers: int = 2, blocks: int = BLOCKS, *, fill: bool) -> PagedCache:
    """A cache of random bytes (``fill``) or of zeros; 256 bytes a block and layer."""
    shape = (blocks, 2, 4, 8)
    tensors = [torch.randn(shape) if fill else torch.zeros(shape) for _ in range(layers)]
    return PagedCache({f"layer{i}": tensor for i, tensor in enumerate(tensors)})


def contents(cache: PagedCache) -> torch.Tensor:
    """All bytes of a cache, ``[layers, blocks, words]``."""
    return torch.stack([layer.clone() for layer in cache.layers])


class ProducerEnd(Thread):
    def __init__(self, *, capacity: int, lease_s: float, keys_dir: Path | None, bind: str) -> None:
        super().__init__("test-producer")
        self.cache = make_cache(fill=True)
        self.end = Producer(
            self.loop,
            self.context,
            bind=bind,
            epoch=EPOCH,
            block_bytes=self.cache.block_bytes,
            capacity=capacity,
            lease_s=lease_s,
            emit=self.events.emit,
            keys_dir=keys_dir,
        )
        self.loop.start()

    def open(self, key: wire.Key, blocks: int, *, subscribers: int = 1, **changes: object) -> None:
        """Open a lease of ``blocks`` blocks of 4 tokens."""
        fields = {"tokens": blocks * 4, "chain": b"chain", "fingerprint": "fp", **changes}
        message = wire.Open(key, blocks=blocks, subscribers=subscribers, **fields)  # type: ignore[arg-type]
        self.call(lambda: self.end.open(message))

    def publish(self, key: wire.Key, first: int, block_ids: list[int]) -> None:
        self.end.publish(key, first, self.cache.gather(block_ids))


class ConsumerEnd(Thread):
    def __init__(self, *, keys_dir: Path | None = None, layers: int = 2) -> None:
        super().__init__("test-consumer")
        self.cache = make_cache(layers, fill=False)
        self.end = Consumer(
            self.loop, self.context, self.cache, name="d0", emit=self.events.emit, keys_dir=keys_dir
        )
        self.loop.start()

    def load(self, key: wire.Key, endpoint: str, block_ids: tuple[int, ...], **changes: object) -> None:
        """Load the prompt's blocks from ``first`` (0) on into these blocks."""
        first = changes.get("first", 0)
        assert isinstance(first, int)
        fields: dict[str, object] = {
            "epoch": EPOCH,
            "fingerprint": "fp",
            "tokens": (first + len(block_ids)) * 4,
            "chain": b"chain",
            "first": 0,
            "deadline_s": DEADLINE_S,
        }
        spec = wire.Load(key, endpoint, block_ids=block_ids, **(fields | changes))  # type: ignore[arg-type]
        self.call(lambda: self.end.load(spec))

    def unload(self, key: wire.Key) -> None:
        self.call(lambda: self.end.unload(key, "cancelled"))


class Pair:
    """A producer and its consumers, each on a thread of its own."""

    def __init__(
        self,
        *,
        capacity: int = 1 << 20,
        lease_s: float = DEADLINE_S,
        keys_dir: Path | None = None,
        bind: str = "tcp://127.0.0.1:*",
    ) -> None:
        self.keys_dir = keys_dir
        self.p = ProducerEnd(capacity=capacity, lease_s=lease_s, keys_dir=keys_dir, bind=bind)
        self.consumers: list[ConsumerEnd] = []
        self.d = self.consumer()

    @property
    def endpoint(self) -> str:
        return self.p.end.endpoint

    def consumer(self, **options: object) -> ConsumerEnd:
        """One more consumer."""
        self.consumers.append(ConsumerEnd(keys_dir=self.keys_dir, **options))  # type: ignore[arg-type]
        return self.consumers[-1]

    def close(self) -> None:
        for consumer in self.consumers:
            if consumer.loop.is_alive():
                assert consumer.call(consumer.end.stats) == wire.Stats()
            consumer.close()
        if self.p.loop.is_alive():
            self.p.call(self.p.end.table.check_integrity)
        self.p.close()


def make_key(number: int = 1, attempt: int = 1) -> wire.Key:
    return wire.Key(number.to_bytes(16, "big"), attempt)


def same(source: PagedCache, theirs: list[int], target: PagedCache, ours: list[int]) -> bool:
    """Whether the blocks hold equal bytes."""
    return bool(torch.equal(source.gather(theirs), target.gather(ours)))
