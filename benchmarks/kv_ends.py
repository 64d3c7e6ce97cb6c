"""The two ends of `kvtransfer`, each as it runs in an engine's worker, in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
import zmq

from benchmarks.kv_layout import Evictor, Layout, Pool, layout_of, now
from kvtransfer import wire
from kvtransfer.arena import Arena
from kvtransfer.cache import Group, HostCache
from kvtransfer.consumer import Consumer
from kvtransfer.digest import Check, Digests
from kvtransfer.fence import Fence
from kvtransfer.loop import Loop
from kvtransfer.producer import Producer
from kvtransfer.transport.select import consumer_transports, producer_transports

E = TypeVar("E", wire.Opened, wire.Closed, wire.Loaded)
EPOCH = 1
TOKENS = 16
WAIT_S = 30.0
Mode = Literal["wire", "whole"]


class Events:
    """What an end emitted and when, awaited by type."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, wire.Event]] = []
        self._changed = threading.Condition()

    def emit(self, event: wire.Event) -> None:
        at = now()
        with self._changed:
            self._seen.append((at, event))
            self._changed.notify_all()

    def take(self, kind: type[E]) -> tuple[float, E]:
        """The next event of this type and when it came; `Failed` for any other is an error."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._find(kind) or self._find(wire.Failed), WAIT_S):
                raise TimeoutError(f"no {kind.__name__} in {WAIT_S:.0f} s")
            found = self._find(kind)
            if not found:
                raise RuntimeError(str(self._seen))
            self._seen.remove(found[0])
        at, event = found[0]
        assert isinstance(event, kind)
        return at, event

    def _find(self, kind: type[object]) -> list[tuple[float, wire.Event]]:
        return [entry for entry in self._seen if isinstance(entry[1], kind)][:1]


class Gate:
    """A fence that passes when it is opened: pieces behind it are in staging and not yet published.

    `passed`: when it did, as the end saw it; to wake the thread that waits is no part of a transfer.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.passed = 0.0

    def wait(self) -> None:
        self._event.wait()
        self.passed = self.passed or now()

    def open(self) -> None:
        self._event.set()


def host_cache(layout: Layout, filled: bool) -> tuple[Pool, HostCache]:
    """A pool and the cache over it."""
    pool = Pool(layout, filled)
    return pool, HostCache([Group([torch.from_numpy(layer) for layer in pool.layers], layout.heads)])


def wire_key(name: str) -> wire.Key:
    return wire.Key(bytes.fromhex(name), 0)


@dataclass
class ProducerEnd:
    """A producer with its loop."""

    loop: Loop
    producer: Producer
    events: Events


class ProducerSide:
    """One producer for each way of digests, over one cache."""

    def __init__(self, layout: dict[str, int], staging_bytes: int) -> None:
        self._layout = layout_of(layout)
        self._pool, self._cache = host_cache(self._layout, filled=True)
        self._evictor = Evictor()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._ends = {check: self._end(check, staging_bytes) for check in get_args(Check)}

    def _end(self, check: Check, staging_bytes: int) -> ProducerEnd:
        loop, events = Loop(f"producer-{check}"), Events()
        producer = Producer(
            loop,
            self._context,
            bind="tcp://127.0.0.1:*",
            epoch=EPOCH,
            shapes=self._cache.shapes,
            arena=Arena(staging_bytes),
            lease_s=WAIT_S,
            emit=events.emit,
            transports=producer_transports(["shm", "zmq"]),
            piece_bytes=self._layout.piece_bytes,
            digests=Digests(check),
        )
        loop.start()
        return ProducerEnd(loop, producer, events)

    def endpoints(self) -> dict[str, Any]:
        return {check: end.producer.endpoint for check, end in self._ends.items()}

    def open(self, check: str, key: str, count: int) -> None:
        """Reserve staging, and wait until the consumer's subscription is here."""
        end, name = self._ends[check], wire_key(key)
        message = wire.Open(name, count * TOKENS, b"chain", "bench", (wire.Want(0, 0, count),), 1)
        end.loop.call_soon(lambda: end.producer.open(message))
        end.events.take(wire.Opened)
        deadline = time.monotonic() + WAIT_S
        while not end.producer.table.held[name].subscribers:
            if time.monotonic() > deadline:
                raise TimeoutError("no subscription")
            time.sleep(0.001)

    def stage(self, check: str, key: str, block_ids: Sequence[int], mode: Mode) -> dict[str, Any]:
        """Gather and publish blocks; when that began.

        `wire`: everything is gathered before the clock starts, and published at once. `whole`: the clock
        starts with the first gather, and blocks are published as they are gathered.
        """
        end, name, gate = self._ends[check], wire_key(key), Gate()

        def fill(run: range, out: torch.Tensor) -> Fence | None:
            self._cache.gather(0, block_ids[run.start : run.stop], out)
            return gate if mode == "wire" else None

        if mode == "wire":
            end.producer.stage(name, 0, 0, len(block_ids), fill)
            self._evictor.evict()
            gate.open()
        else:
            self._evictor.evict()
            start = now()
            end.producer.stage(name, 0, 0, len(block_ids), fill)
        end.events.take(wire.Closed)
        return {"start": gate.passed if mode == "wire" else start}

    def checksum(self, block_ids: Sequence[int]) -> dict[str, Any]:
        return {"crc": self._pool.checksum(block_ids)}

    def close(self) -> None:
        for end in self._ends.values():
            end.loop.stop()
            end.producer.close()
        self._context.destroy(linger=0)


@dataclass
class ConsumerEnd:
    """A consumer with its loop."""

    loop: Loop
    consumer: Consumer
    events: Events


class ConsumerSide:
    """One consumer for each transport and number of lanes, over one cache."""

    def __init__(self, layout: dict[str, int], transports: Sequence[tuple[str, int]]) -> None:
        self._layout = layout_of(layout)
        self._pool, self._cache = host_cache(self._layout, filled=False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._ends = {f"{name}-{lanes}": self._end(name, lanes) for name, lanes in transports}

    def _end(self, transport: str, lanes: int) -> ConsumerEnd:
        loop, events = Loop(f"consumer-{transport}-{lanes}"), Events()
        consumer = Consumer(
            loop,
            self._context,
            self._cache,
            name=f"{transport}-{lanes}",
            emit=events.emit,
            transports=consumer_transports([transport], lanes),
        )
        loop.start()
        return ConsumerEnd(loop, consumer, events)

    def load(self, transport: str, endpoint: str, key: str, block_ids: Sequence[int]) -> None:
        """Subscribe; `wait` says when the blocks are in the cache."""
        end = self._ends[transport]
        source = wire.Source(endpoint, EPOCH, 0, self._layout.heads, 0)
        spans = (wire.Span(0, 0, tuple(block_ids)),)
        spec = wire.Load(wire_key(key), (source,), "bench", len(block_ids) * TOKENS, b"chain", spans, WAIT_S)
        end.loop.call_soon(lambda: end.consumer.load(spec))

    def wait(self, transport: str) -> dict[str, Any]:
        """When the load had ended, and what it says of itself."""
        at, loaded = self._ends[transport].events.take(wire.Loaded)
        return {"end": at, "wire_s": loaded.wire_s, "scatter_s": loaded.scatter_s, "retries": loaded.retries}

    def checksum(self, block_ids: Sequence[int]) -> dict[str, Any]:
        return {"crc": self._pool.checksum(block_ids)}

    def close(self) -> None:
        for end in self._ends.values():
            end.loop.stop()
            end.consumer.close()
        self._context.destroy(linger=0)
