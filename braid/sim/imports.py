"""Brings a group's prompt into a simulated decode worker's cache, as ``decode_server.prefix`` does."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from braid import wire
from braid.sim.engine import Engine
from braid.sim.kv import Consumer, LoadFailed
from braid.sim.tokens import Prompt
from braid.worker.source import Source
from kvtransfer import wire as kv
from kvtransfer.plan import CHAIN_TOKENS, chain


@dataclass(slots=True, eq=False)
class Held:
    """A prompt's place in the cache. ``blocks``: those that it holds, in order (empty: the samples compute
    the prompt); ``cached``: tokens of it that were there before."""

    record: wire.KvRecord
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    taken: int = 0


class Imports:
    """Imports of a simulated decode worker.

    At most ``max_load_share`` of the pool is held by imports, and ``beside`` blocks are never theirs: what
    the longest sequence needs, so that one that was let in can always end. Who finds no room waits, first
    come first served.
    """

    def __init__(
        self,
        engine: Engine,
        consumer: Consumer,
        *,
        max_load_share: float,
        beside: int,
        fingerprint: str,
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._consumer = consumer
        self._fingerprint = fingerprint
        self._timeout_s = timeout_s
        blocks = engine.scheduler.pool.blocks
        self._capacity = max(0, min(int(blocks * max_load_share), blocks - beside))
        self._used = 0
        self._turns: deque[object] = deque()
        self._held: dict[int, Held] = {}

    @property
    def idle(self) -> bool:
        return not self._used and not self._turns

    @property
    def blocks(self) -> list[list[int]]:
        """Blocks of each import."""
        return [held.blocks for held in self._held.values()]

    async def acquire(self, prompt: Prompt, part: int, source: Source) -> Held:
        """Import a prompt's KV, or say why the samples must compute it. Pairs up with :meth:`release`.

        Never raises for a failed transfer: the outcome is in the record.
        """
        if source.ticket is None:
            return Held(wire.KvRecord("local", reason=source.reason or "no_ticket"))
        needed = self._engine.scheduler.blocks_for(len(prompt))
        if needed > self._capacity:
            return Held(wire.KvRecord("local", reason="too_large"))
        since = time.monotonic()
        held = Held(wire.KvRecord("recomputed"), taken=needed)
        with self._hold(part, source):
            await self._enter(held)
        try:
            async with asyncio.timeout(self._timeout_s):
                held.record = await self._import(held, prompt, part, source, since)
        except TimeoutError:
            held.record = wire.KvRecord("recomputed", reason="timeout")
        except BaseException:
            self.release(held)
            raise
        if held.record.path != "remote":
            self.release(held)
        return held

    def release(self, held: Held) -> None:
        """Give back what :meth:`acquire` took, at once. Idempotent."""
        blocks, held.blocks = held.blocks, []
        self._engine.scheduler.pool.free(blocks)
        self._used -= held.taken
        held.taken = 0
        self._held.pop(id(held), None)
        self._engine.poke()

    @contextmanager
    def _hold(self, part: int, source: Source) -> Iterator[None]:
        """Meanwhile the prefill worker is told that the prompt waits, if it has to, and keeps its KV."""

        async def tell(ticket: wire.Ticket, waits: bool) -> None:
            endpoints = ticket.endpoints if waits else ()
            self._consumer.hold(kv.Hold(kv.Key(ticket.id, ticket.attempt, part), endpoints))

        holding = asyncio.get_running_loop().create_task(source.follow(tell))
        try:
            yield
        finally:
            holding.cancel()

    async def _enter(self, held: Held) -> None:
        """Wait for the turn and for room; nobody overtakes."""
        turn = object()
        self._turns.append(turn)
        try:
            while self._turns[0] is not turn or self._used + held.taken > self._capacity:
                await self._engine.changed()
            self._used += held.taken
            self._held[id(held)] = held
        except BaseException:
            held.taken = 0
            raise
        finally:
            self._turns.remove(turn)
            self._engine.poke()  # the next one's turn

    async def _import(
        self, held: Held, prompt: Prompt, part: int, source: Source, since: float
    ) -> wire.KvRecord:
        with self._hold(part, source):
            shared = await self._begin(held, prompt)
        block_size = self._engine.scheduler.block_size
        held.cached = shared * block_size
        transfers, queue_s = 0, time.monotonic() - since
        while (ticket := source.ticket) is not None:
            transfers += 1
            try:
                loaded = await self._load(ticket, held, shared, prompt, part, source)
            except LoadFailed as error:
                if source.ticket is ticket:
                    source.change(None, str(error))
                continue
            if loaded is not None:
                self._commit(held, prompt)
                return wire.KvRecord(
                    "remote",
                    transfers=transfers,
                    nbytes=loaded.nbytes,
                    blocks=loaded.blocks,
                    blocks_cached=shared,
                    queue_s=queue_s,
                    wait_s=loaded.wait_s,
                    wire_s=loaded.wire_s,
                    scatter_s=loaded.scatter_s,
                    transport=loaded.transport,
                    retries=loaded.retries,
                )
        return wire.KvRecord("recomputed", reason=source.reason, blocks_cached=shared)

    async def _begin(self, held: Held, prompt: Prompt) -> int:
        """Take the prompt's blocks; returns how many leading ones the cache had already."""
        scheduler = self._engine.scheduler
        whole = (len(prompt) - 1) // scheduler.block_size
        while True:
            shared = scheduler.pool.cached(prompt.links(scheduler.block_size)[:whole])
            missing = scheduler.blocks_for(len(prompt)) - len(shared)
            if scheduler.pool.can_take(shared, missing):
                break
            await self._engine.changed()
        scheduler.pool.share(shared)
        held.blocks = [*shared, *scheduler.pool.allocate(missing)]
        return len(shared)

    async def _load(
        self, ticket: wire.Ticket, held: Held, shared: int, prompt: Prompt, part: int, source: Source
    ) -> kv.Loaded | None:
        """One transfer; None if the router took the ticket away first."""
        key = kv.Key(ticket.id, ticket.attempt, part)
        spec = kv.Load(
            key,
            (kv.Source(ticket.endpoints[0], ticket.epoch, 0, 1, 0),),
            self._fingerprint,
            len(prompt),
            chain(prompt.tokens, CHAIN_TOKENS, prompt.salt),
            (kv.Span(0, shared, tuple(held.blocks[shared:])),),
            self._timeout_s,
            ticket.block_size,
        )
        links = content(prompt, self._engine.scheduler.block_size)
        loading = asyncio.ensure_future(self._consumer.load(spec, links))
        changed = asyncio.ensure_future(source.changed(ticket))
        try:
            await asyncio.wait((loading, changed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            if not loading.done():
                loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)  # until nothing writes the blocks any more
        return None if loading.cancelled() else loading.result()

    def _commit(self, held: Held, prompt: Prompt) -> None:
        scheduler = self._engine.scheduler
        for block, link in zip(held.blocks, prompt.links(scheduler.block_size), strict=False):
            scheduler.pool.publish(block, link)


def content(prompt: Prompt, block_size: int) -> list[bytes]:
    """What each block of a prompt holds, the partial last one included."""
    links = chain(prompt.tokens, block_size, prompt.salt)
    return [links[i : i + 16] for i in range(0, len(links), 16)]
