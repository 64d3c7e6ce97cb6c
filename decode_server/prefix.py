"""Brings a group's prompt into the engine's cache once, before any of its samples is submitted.

The engine does not know that a transfer is under way: blocks are taken from its pool
(:mod:`kvtransfer.adapter.imports`), written by the transfer thread of its worker process, and
published when they are complete. While it waits nothing is polled.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from braid import wire
from braid.ranks import head_runs
from braid.worker.engine import Engine
from braid.worker.prompt import Prompt
from braid.worker.source import Source
from kvtransfer import wire as kv
from kvtransfer.plan import CHAIN_TOKENS, needed_blocks

log = logging.getLogger("braid.decode")

_RETRY_S = 0.02
"""Pause before the pool is asked again when it had no room."""


@dataclass(slots=True)
class Held:
    """A prompt's place in the cache. ``name`` is the import's, None if each sample computes it; ``cached``:
    tokens of it that were there before."""

    name: str | None
    record: wire.KvRecord
    blocks: int = 0
    cached: int = 0


class Prefixes:
    """Imports of a decode worker.

    At most ``capacity`` blocks are held by imports at a time; more wait, first come first served, so that
    samples that run always find blocks (:mod:`decode_server.room`). ``acquire`` or ``computed`` and
    ``release`` pair up; a cancelled one has released what it took.
    """

    def __init__(self, engine: Engine, capacity: int, load_timeout_s: float) -> None:
        self._engine = engine
        self._capacity = capacity
        self._timeout_s = load_timeout_s
        self._names = itertools.count()
        self._held = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        return self._held == 0 and not self._tasks

    @property
    def held_blocks(self) -> int:
        return self._held

    async def acquire(self, prompt: Prompt, part: int, source: Source, waits: bool = True) -> Held:
        """Import a prompt's KV, or say why the samples must compute it themselves.

        Never raises for a failed transfer: the outcome is in the record.

        Args:
            waits: for room, if there is none at once. Who holds another import may not: that could be what
                others wait for, and they before it.
        """
        if source.ticket is None:
            return Held(None, wire.KvRecord("local", reason=source.reason or "no_ticket"))
        blocks = self.blocks_of(len(prompt.tokens))
        if blocks > self._capacity or not (waits or self._has_room(blocks)):
            return Held(None, wire.KvRecord("local", reason="too_large"))
        name = f"i{next(self._names)}"
        held = Held(name, wire.KvRecord("recomputed"), blocks)
        since = time.monotonic()
        with self._hold(part, source):  # nobody is told if there is room at once
            await self._take(blocks)
        try:
            async with asyncio.timeout(self._timeout_s):
                held.record = await self._import(held, name, prompt, part, source, since)
        except TimeoutError:
            held.record = wire.KvRecord("recomputed", reason="timeout")
        except BaseException:
            self.release(held)
            raise
        if held.record.path == "remote":
            return held
        self.release(held)
        return Held(None, held.record)

    async def computed(
        self, prompt: Prompt, n: int, record: wire.KvRecord, compute: Callable[[str], Awaitable[int]]
    ) -> Held:
        """Have a prompt that was not imported computed once, before its ``n`` samples fork from it.

        Samples that are submitted together would each compute it, and later ones its tail. Where all of them
        fit into one step of the engine, a step more would gain nothing; then, and where there is no room to
        hold it, the samples compute it.

        Args:
            compute: runs the prompt and has the engine keep it by the name given; returns how many of its
                tokens were in the cache. What it raises is raised.
        """
        blocks = self.blocks_of(len(prompt.tokens) + 1)
        if n * len(prompt.tokens) <= self._engine.chunk or n == 1 or blocks > self._capacity:
            return Held(None, record)
        name = f"i{next(self._names)}"
        held = Held(name, record, blocks)
        await self._take(blocks)
        try:
            held.cached = await compute(name)
        except BaseException:
            self.release(held)
            raise
        return held

    def release(self, held: Held) -> None:
        """Give back what was taken, once its samples have ended. Idempotent."""
        if held.name is None:
            return
        name, held.name = held.name, None
        self._soon(self._release(name, held.blocks))

    def let_go(self, name: str) -> None:
        """Unpin what the engine holds under a name; nothing if there is no such name."""
        self._soon(self._release(name, 0))

    def _soon(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def blocks_of(self, tokens: int) -> int:
        """Pool blocks that a prefix of so many tokens holds, of all groups."""
        engine = self._engine
        return sum(len(needed_blocks(tokens, group, engine.block_size)) for group in engine.groups)

    def _has_room(self, blocks: int) -> bool:
        """Whether :meth:`_take` does not wait, if it is called now."""
        return not (self._turn.locked() or self._room.locked()) and self._held + blocks <= self._capacity

    async def _take(self, blocks: int) -> None:
        async with self._turn, self._room:  # who waits for room holds the turn: nobody overtakes
            await self._room.wait_for(lambda: self._held + blocks <= self._capacity)
            self._held += blocks

    async def _release(self, name: str, blocks: int) -> None:
        try:
            await self._engine.call("braid_release", name)
        except Exception:
            log.exception("import_release_failed", extra={"import": name})
        async with self._room:
            self._held -= blocks
            self._room.notify_all()

    async def _import(
        self, held: Held, name: str, prompt: Prompt, part: int, source: Source, since: float
    ) -> wire.KvRecord:
        engine = self._engine
        begin = partial(engine.call, "braid_begin", name, prompt.tokens, prompt.salt, [])
        if (begun := await begin()) is None:
            with self._hold(part, source):
                while (begun := await begin()) is None:
                    await asyncio.sleep(_RETRY_S)
        held.cached = int(begun["cached"])
        spans = tuple(kv.Span(group, first, tuple(ids)) for group, first, ids in begun["spans"])
        cached = held.cached // engine.block_size
        transfers, queue_s = 0, time.monotonic() - since
        while (ticket := source.ticket) is not None:
            transfers += 1
            ended = await self._load(ticket, prompt, part, spans, source)
            if isinstance(ended, list):
                commit = asyncio.ensure_future(engine.call("braid_commit", name))
                await asyncio.sleep(0)  # sent now, so it precedes the samples in the engine's queue
                commit.add_done_callback(_log_failure)
                return _record(ended, cached, transfers, queue_s)
            if source.ticket is ticket:
                source.change(None, ended)
        return wire.KvRecord("recomputed", reason=source.reason, blocks_cached=cached)

    @contextmanager
    def _hold(self, part: int, source: Source) -> Iterator[None]:
        """Meanwhile the prefill worker is told that the prompt waits, and keeps its KV."""
        control, ranks = self._engine.control, range(self._engine.ranks)

        async def tell(ticket: wire.Ticket, waits: bool) -> None:
            try:
                of_ranks = [self._sources(ticket, rank) if waits else () for rank in ranks]
            except ValueError:
                return  # nothing will be loaded
            key = kv.Key(ticket.id, ticket.attempt, part)
            await control.send([kv.Hold(key, tuple(s.endpoint for s in of_rank)) for of_rank in of_ranks])

        holding = self._soon(source.follow(tell))
        try:
            yield
        finally:
            holding.cancel()

    async def _load(
        self,
        ticket: wire.Ticket,
        prompt: Prompt,
        part: int,
        spans: tuple[kv.Span, ...],
        source: Source,
    ) -> list[kv.Loaded] | str:
        """One transfer over every rank: what was loaded, or why not. When it returns (or raises),
        nothing writes the blocks any more."""
        engine = self._engine
        key = kv.Key(ticket.id, ticket.attempt, part)
        try:
            sources = [self._sources(ticket, rank) for rank in range(engine.ranks)]
        except ValueError:
            return "ranks_differ"
        chain, tokens = prompt.chain(CHAIN_TOKENS), len(prompt.tokens)
        commands: list[kv.Command] = [
            kv.Load(
                key, of_rank, engine.fingerprint, tokens, chain, spans, self._timeout_s, ticket.block_size
            )
            for of_rank in sources
        ]
        loaded = engine.control.expect(("load", key))
        changed = asyncio.create_task(source.changed(ticket))
        try:
            await engine.control.send(commands)
            await asyncio.wait((loaded, changed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            if not loaded.done():
                await _to_the_end(self._unload(key, loaded))
        events = loaded.result()
        failed = [e.reason for e in events if isinstance(e, kv.Failed)]
        return failed[0] if failed else [e for e in events if isinstance(e, kv.Loaded)]

    def _sources(self, ticket: wire.Ticket, rank: int) -> tuple[kv.Source, ...]:
        """Where a rank reads its heads. Raises ValueError if these ranks can't be paired."""
        runs = head_runs(self._engine.kv_heads, len(ticket.endpoints), self._engine.ranks, rank)
        return tuple(
            kv.Source(ticket.endpoints[run.rank], ticket.epoch, run.first, run.last, run.put) for run in runs
        )

    async def _unload(self, key: kv.Key, loaded: asyncio.Future[list[kv.Event]]) -> None:
        """Stop a load and wait until every rank has; also one that a rank was never asked for."""
        await self._engine.control.broadcast(kv.Unload(key, "cancelled"))
        await loaded


def _record(loaded: list[kv.Loaded], cached: int, transfers: int, queue_s: float) -> wire.KvRecord:
    return wire.KvRecord(
        "remote",
        transfers=transfers,
        nbytes=sum(event.nbytes for event in loaded),
        blocks=loaded[0].blocks,
        blocks_cached=cached,
        wait_s=max(event.wait_s for event in loaded),
        wire_s=max(event.wire_s for event in loaded),
        scatter_s=max(event.scatter_s for event in loaded),
        transport=",".join(sorted({event.transport for event in loaded if event.transport})),
        retries=sum(event.retries for event in loaded),
        queue_s=queue_s,
    )


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` however often the caller is cancelled; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


def _log_failure(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("import_commit_failed", extra={"detail": str(task.exception())})
