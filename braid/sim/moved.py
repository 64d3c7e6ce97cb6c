"""KV transfer of simulated workers over the real ends of ``kvtransfer``: synthetic blocks, moved and checked.

For a few workers, where the transfer itself is looked at: each has a thread, a ZMQ context and, on the
prefill side, an arena. Needs torch, which ``kvtransfer`` keeps its staging in; this module imports none.
A block's bytes are its link of the prompt's hash chain, over and over; a decode worker compares what came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from braid.keys import stop_authenticator
from braid.sim.kv import LoadFailed, Refused
from kvtransfer import wire as kv
from kvtransfer.arena import Arena
from kvtransfer.consumer import Consumer
from kvtransfer.digest import Check, Digests
from kvtransfer.loop import Loop
from kvtransfer.producer import Producer
from kvtransfer.sockets import new_context
from kvtransfer.transport.select import consumer_transports, producer_transports

LINK_BYTES = 16
"""Bytes of a block are a multiple of this."""


class SyntheticCache:
    """A :class:`kvtransfer.cache.Cache` that keeps of each block the link that fills it."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self.blocks = blocks
        self.shapes: tuple[kv.Shape, ...] = (kv.Shape(1, 1, block_bytes),)
        self.links: dict[int, bytes] = {}

    def gather(self, group: int, block_ids: Sequence[int], out: Any) -> None:
        fill(out, [self.links.get(block, bytes(LINK_BYTES)) for block in block_ids])

    def scatter(self, group: int, block_ids: Sequence[int], rows: Any, put: int = 0) -> None:
        """A block whose bytes are not one link over and over is kept as no link at all."""
        told = np.asarray(rows).reshape(len(block_ids), -1, LINK_BYTES)
        for block, links in zip(block_ids, told, strict=True):
            whole = bool((links == links[0]).all())
            self.links[block] = links[0].tobytes() if whole else b""

    def copy(self, group: int, source: int, target: int) -> None:
        self.links[target] = self.links.get(source, b"")


def fill(out: Any, links: Sequence[bytes]) -> None:
    """Write blocks' bytes into ``out``, ``[1, count, 1, block_bytes]``."""
    told = np.frombuffer(b"".join(links), dtype=np.uint8).reshape(len(links), 1, LINK_BYTES)
    target = out.numpy().reshape(len(links), -1, LINK_BYTES)
    target[:] = told


class _End:
    """A loop's thread and its context, and events by what awaits them."""

    def __init__(self, name: str) -> None:
        self.context = new_context()
        self.loop = Loop(name)
        self._asyncio = asyncio.get_running_loop()
        self._waiting: dict[tuple[str, kv.Key], asyncio.Future[kv.Event]] = {}

    def emit(self, event: kv.Event) -> None:
        """Runs on the loop's thread."""
        self._asyncio.call_soon_threadsafe(self._arrived, event)

    def expect(self, what: str, key: kv.Key) -> asyncio.Future[kv.Event]:
        found = self._waiting[what, key] = self._asyncio.create_future()
        return found

    async def stop(self, end: Producer | Consumer) -> None:
        await asyncio.to_thread(self.loop.stop)
        end.close()
        stop_authenticator(self.context)
        self.context.destroy(linger=0)

    def _arrived(self, event: kv.Event) -> None:
        match event:
            case kv.Opened(key):
                self._resolve("open", key, event)
            case kv.Closed(key):
                self._resolve("open", key, event)
            case kv.Loaded(key) | kv.Failed(key):
                self._resolve("load", key, event)

    def _resolve(self, what: str, key: kv.Key, event: kv.Event) -> None:
        waiter = self._waiting.pop((what, key), None)
        if waiter is not None and not waiter.done():
            waiter.set_result(event)


class MovedProducer:
    """A :class:`braid.sim.kv.Producer` over a real one."""

    def __init__(
        self,
        *,
        name: str,
        bind: str,
        epoch: int,
        block_bytes: int,
        staging_bytes: int,
        lease_s: float,
        transports: Sequence[str],
        piece_bytes: int,
        check: Check,
        keys_dir: Path | None = None,
    ) -> None:
        self._end = _End(f"sim-kv-{name}")
        self._links: dict[kv.Key, list[bytes]] = {}
        self._producer = Producer(
            self._end.loop,
            self._end.context,
            bind=bind,
            epoch=epoch,
            shapes=(kv.Shape(1, 1, block_bytes),),
            arena=Arena(staging_bytes),
            lease_s=lease_s,
            emit=self._end.emit,
            transports=producer_transports(transports),
            piece_bytes=piece_bytes,
            digests=Digests(check),
            keys_dir=keys_dir,
        )
        self.endpoint = self._producer.endpoint
        self._end.loop.start()

    async def open(self, message: kv.Open, links: list[bytes]) -> None:
        opened = self._end.expect("open", message.key)
        self._end.loop.call_soon(lambda: self._producer.open(message))
        event = await opened
        if isinstance(event, kv.Closed):
            raise Refused(event.reason)
        self._links[message.key] = links

    def stage(self, key: kv.Key, first: int, last: int) -> None:
        links = self._links.get(key)
        if links is None or first >= last:
            return

        def write(run: range, out: Any) -> None:
            fill(out, links[first + run.start : first + run.stop])

        self._producer.stage(key, 0, first, last - first, write)
        if last == len(links):
            del self._links[key]

    def close(self, key: kv.Key, reason: str) -> None:
        self._links.pop(key, None)
        self._end.loop.call_soon(lambda: self._producer.end(key, reason))

    def stats(self) -> kv.Stats:
        return self._producer.stats()

    async def stop(self) -> None:
        await self._end.stop(self._producer)


class MovedConsumer:
    """A :class:`braid.sim.kv.Consumer` over a real one."""

    def __init__(
        self,
        *,
        name: str,
        blocks: int,
        block_bytes: int,
        transports: Sequence[str],
        lanes: int,
        keys_dir: Path | None = None,
    ) -> None:
        self._end = _End(f"sim-kv-{name}")
        self._cache = SyntheticCache(blocks, block_bytes)
        self._consumer = Consumer(
            self._end.loop,
            self._end.context,
            self._cache,
            name=name,
            emit=self._end.emit,
            transports=consumer_transports(transports, lanes),
            keys_dir=keys_dir,
        )
        self._end.loop.start()

    async def load(self, spec: kv.Load, links: list[bytes]) -> kv.Loaded:
        ended = self._end.expect("load", spec.key)
        self._end.loop.call_soon(lambda: self._consumer.load(spec))
        try:
            event = await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._end.loop.call_soon(lambda: self._consumer.unload(spec.key, "cancelled"))
            await ended  # after it, nothing is written
            raise
        if not isinstance(event, kv.Loaded):
            raise LoadFailed(event.reason if isinstance(event, kv.Failed) else "unknown")
        self._check(spec, links)
        return event

    def hold(self, message: kv.Hold) -> None:
        self._end.loop.call_soon(lambda: self._consumer.hold(message))

    async def stop(self) -> None:
        await self._end.stop(self._consumer)

    def _check(self, spec: kv.Load, links: list[bytes]) -> None:
        for span in spec.spans:
            for i, block in enumerate(span.block_ids, span.first):
                if self._cache.links.get(block) != links[i]:
                    raise LoadFailed("wrong_bytes")
