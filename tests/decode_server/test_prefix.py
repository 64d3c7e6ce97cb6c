"""Imports of a decode worker: budget, transfers, cancellation. The engine is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from braid import wire
from braid.worker.prompt import Prompt
from braid.worker.source import Source
from decode_server.prefix import Held, Prefixes
from kvtransfer import wire as kv
from tests.decode_server.fake_engine import BLOCK_SIZE, FakeEngine

DEADLINE_S = 60.0


def ticket(attempt: int = 1, endpoints: tuple[str, ...] = ("tcp://p:1",)) -> wire.Ticket:
    return wire.Ticket(b"t" * 16, attempt, "p0", 7, endpoints, "fp")


def prompt(blocks: int = 3) -> Prompt:
    return Prompt(list(range(blocks * BLOCK_SIZE - 1)), "", "")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def prefixes(engine: FakeEngine) -> AsyncIterator[Prefixes]:
    """A worker that may hold ten blocks; at the end nothing is held."""
    made = make(engine)
    yield made
    await until(lambda: made.idle)
    assert made.held_blocks == 0
    assert not engine.control.held
    assert not engine.begun


def make(engine: FakeEngine, timeout_s: float = DEADLINE_S) -> Prefixes:
    return Prefixes(engine, engine.blocks // 10, timeout_s)  # type: ignore[arg-type]


async def until(holds: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0)


def acquire(prefixes: Prefixes, source: Source, blocks: int = 3) -> asyncio.Task[Held]:
    return asyncio.create_task(prefixes.acquire(prompt(blocks), 0, source))


async def loading(engine: FakeEngine) -> kv.Load:
    return await asyncio.wait_for(engine.control.loads.get(), DEADLINE_S)


def loaded(load: kv.Load) -> kv.Loaded:
    return kv.Loaded(load.key, 100, sum(len(s.block_ids) for s in load.spans), 0.5, 0.25, 0.125, "zmq", 0)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, DEADLINE_S)


async def test_a_prompt_is_loaded_committed_and_released(engine: FakeEngine, prefixes: Prefixes) -> None:
    engine.cached = 1
    task = acquire(prefixes, Source(ticket(), ""))
    load = await loading(engine)
    assert (load.spans, load.tokens) == ((kv.Span(0, 1, (2, 3)),), 11)
    assert load.sources == (kv.Source("tcp://p:1", 7, 0, 2, 0),)
    engine.control.end(load.key, loaded(load))
    held = await task
    assert replace(held.record, queue_s=0.0) == wire.KvRecord(
        "remote", 1, 100, 2, 1, wait_s=0.5, wire_s=0.25, scatter_s=0.125, transport="zmq"
    )
    assert held.cached == BLOCK_SIZE
    assert prefixes.held_blocks == 3
    for _ in range(2):
        prefixes.release(held)
    await until(lambda: prefixes.idle)
    assert engine.journal == ["begin i0", "load 1", "ended 1", "commit i0", "release i0"]


async def test_without_a_ticket_nothing_is_taken(engine: FakeEngine, prefixes: Prefixes) -> None:
    held = await prefixes.acquire(prompt(), 0, Source(None, "short"))
    assert (held.name, held.record) == (None, wire.KvRecord("local", reason="short"))
    assert engine.journal == []


LOCAL = wire.KvRecord("local", reason="no_prefill")


async def test_a_prompt_of_several_samples_is_computed_once(engine: FakeEngine, prefixes: Prefixes) -> None:
    async def compute(name: str) -> int:
        engine.journal.append(f"compute {name}")
        assert prefixes.held_blocks == 4  # room for the token that it ends with
        return BLOCK_SIZE

    size = len(prompt(4).tokens)
    assert 2 * size > engine.chunk
    held = await prefixes.computed(prompt(4), 2, LOCAL, compute)
    assert (held.name, held.record, held.cached) == ("i0", LOCAL, BLOCK_SIZE)
    prefixes.release(held)
    await until(lambda: prefixes.idle)
    assert engine.journal == ["compute i0", "release i0"]


@pytest.mark.parametrize(("blocks", "n"), [(4, 1), (2, 2), (10, 2), (11, 2)])
async def test_a_prompt_is_left_to_the_samples(
    engine: FakeEngine, prefixes: Prefixes, blocks: int, n: int
) -> None:
    """One sample; all of them in one step; no room, as the token that it ends with takes a block more."""

    async def compute(name: str) -> int:
        raise AssertionError

    given = Prompt(list(range(blocks * BLOCK_SIZE)), "", "")
    assert (n * len(given.tokens) <= engine.chunk) == (blocks * n == 4)
    held = await prefixes.computed(given, n, LOCAL, compute)
    assert (held.name, held.record) == (None, LOCAL)
    assert engine.journal == []


async def test_a_prompt_that_cannot_be_computed_is_let_go(engine: FakeEngine, prefixes: Prefixes) -> None:
    async def fail(name: str) -> int:
        raise ValueError(name)

    with pytest.raises(ValueError, match="i0"):
        await prefixes.computed(prompt(4), 2, LOCAL, fail)
    await until(lambda: prefixes.idle)
    begun = asyncio.Event()

    async def hang(name: str) -> int:
        begun.set()
        await asyncio.Event().wait()
        return 0

    task = asyncio.create_task(prefixes.computed(prompt(4), 2, LOCAL, hang))
    await begun.wait()
    await cancel(task)
    await until(lambda: prefixes.idle)
    assert engine.journal == ["release i0", "release i1"]


async def test_a_prompt_over_the_budget_is_computed_here(engine: FakeEngine, prefixes: Prefixes) -> None:
    held = await prefixes.acquire(prompt(11), 0, Source(ticket(), ""))
    assert held.record.reason == "too_large"
    assert engine.journal == []


@pytest.mark.parametrize("reason", ["disconnected", "stale_epoch", "prompt_mismatch"])
async def test_a_failed_load_is_recomputed(engine: FakeEngine, prefixes: Prefixes, reason: str) -> None:
    task = acquire(prefixes, Source(ticket(), ""))
    load = await loading(engine)
    engine.control.end(load.key, kv.Failed(load.key, reason))
    held = await task
    assert (held.name, held.record) == (None, wire.KvRecord("recomputed", reason=reason))
    await until(lambda: prefixes.idle)
    assert engine.journal[-1] == "release i0"
    assert engine.count("commit i0") == 0


async def test_ranks_that_cannot_be_paired_are_refused(engine: FakeEngine, prefixes: Prefixes) -> None:
    engine.kv_heads = 0
    held = await prefixes.acquire(prompt(), 0, Source(ticket(endpoints=("tcp://a:1", "tcp://b:1")), ""))
    assert held.record.reason == "ranks_differ"


async def test_each_rank_reads_its_heads_from_the_ranks_that_hold_them() -> None:
    one = FakeEngine(kv_heads=4)
    await _loaded(one, ticket(endpoints=("tcp://a:1", "tcp://b:1")))
    a, b = kv.Source("tcp://a:1", 7, 0, 2, 0), kv.Source("tcp://b:1", 7, 0, 2, 2)
    assert [load.sources for load in one.control.sent[0]] == [(a, b)]
    two = FakeEngine(kv_heads=4, ranks=2)
    await _loaded(two, ticket())
    halves = [(kv.Source("tcp://p:1", 7, first, first + 2, 0),) for first in (0, 2)]
    assert [load.sources for load in two.control.sent[0]] == halves


async def _loaded(engine: FakeEngine, of: wire.Ticket) -> None:
    prefixes = make(engine)
    task = acquire(prefixes, Source(of, ""))
    load = await loading(engine)
    engine.control.end(load.key, *(loaded(load) for _ in range(engine.ranks)))
    held = await task
    assert held.record.nbytes == 100 * engine.ranks
    prefixes.release(held)
    await until(lambda: prefixes.idle)


async def test_a_load_says_how_large_the_producers_blocks_are(engine: FakeEngine) -> None:
    await _loaded(engine, wire.Ticket(b"t" * 16, 1, "p0", 7, ("tcp://p:1",), "fp", (1,), 8))
    assert [load.block_size for load in engine.control.sent[0]] == [8]


async def test_a_load_that_fails_on_one_rank_is_not_committed() -> None:
    engine = FakeEngine(ranks=2)
    prefixes = make(engine)
    task = acquire(prefixes, Source(ticket(), ""))
    load = await loading(engine)
    engine.control.end(load.key, loaded(load), kv.Failed(load.key, "corrupt"))
    held = await task
    assert (held.name, held.record.path, held.record.reason) == (None, "recomputed", "corrupt")
    await until(lambda: prefixes.idle)
    assert engine.count("commit i0") == 0


async def test_of_a_windowed_group_only_what_the_samples_see_is_loaded_and_counted() -> None:
    engine = FakeEngine(200, 5)
    prefixes = make(engine)
    task = acquire(prefixes, Source(ticket(), ""), 6)
    load = await loading(engine)
    assert load.spans == (kv.Span(0, 0, (1, 2, 3, 4, 5, 6)), kv.Span(1, 4, (5, 6)))
    engine.control.end(load.key, loaded(load))
    held = await task
    assert prefixes.held_blocks == held.blocks == 8
    prefixes.release(held)
    await until(lambda: prefixes.idle)


async def test_the_budget_is_given_first_come_first_served(engine: FakeEngine, prefixes: Prefixes) -> None:
    order: list[str] = []
    first = acquire(prefixes, Source(ticket(1), ""), 6)
    load = await loading(engine)

    async def wait_for(name: str, attempt: int, blocks: int) -> Held:
        held = await acquire(prefixes, Source(ticket(attempt), ""), blocks)
        order.append(name)
        return held

    large = asyncio.create_task(wait_for("large", 2, 8))
    await asyncio.sleep(0)
    small = asyncio.create_task(wait_for("small", 3, 2))
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.control.loads.empty(), "the small one waits behind the large one"
    engine.control.end(load.key, loaded(load))
    prefixes.release(await first)
    for _ in range(2):
        load = await loading(engine)
        engine.control.end(load.key, loaded(load))
    for held in await asyncio.gather(large, small):
        prefixes.release(held)
    assert order == ["large", "small"]


async def test_one_that_gives_up_waiting_lets_the_next_one_in(engine: FakeEngine, prefixes: Prefixes) -> None:
    first = acquire(prefixes, Source(ticket(1), ""), 6)
    load = await loading(engine)
    large = acquire(prefixes, Source(ticket(2), ""), 8)
    small = acquire(prefixes, Source(ticket(3), ""), 2)
    await until(lambda: attempts_held(engine) == [2, 3])
    await cancel(large)
    second = await loading(engine)
    assert second.key.attempt == 3
    await until(lambda: not engine.control.held)
    for task, load_ in ((first, load), (small, second)):
        engine.control.end(load_.key, loaded(load_))
        prefixes.release(await task)


def attempts_held(engine: FakeEngine) -> list[int]:
    return [key.attempt for key in engine.control.held]


async def test_the_lease_of_a_prompt_that_waits_for_room_is_kept(
    engine: FakeEngine, prefixes: Prefixes
) -> None:
    """It expired while the prompt was queued, and its load waited for it all the same until it timed out."""
    first = acquire(prefixes, Source(ticket(1), ""), 6)
    load = await loading(engine)
    assert "hold 1" not in engine.journal, "there was room at once"
    source = Source(ticket(2, ("tcp://p:1",)), "")
    second = acquire(prefixes, source, 8)
    await until(lambda: attempts_held(engine) == [2])
    assert engine.control.held == {kv.Key(b"t" * 16, 2): [("tcp://p:1",)]}
    source.change(ticket(3, ("tcp://q:1",)), "prefill_lost")
    await until(lambda: engine.control.held == {kv.Key(b"t" * 16, 3): [("tcp://q:1",)]})
    engine.control.end(load.key, loaded(load))
    prefixes.release(await first)
    load = await loading(engine)
    await until(lambda: not engine.control.held)
    engine.control.end(load.key, loaded(load))
    prefixes.release(await second)


async def test_a_prompt_that_waits_has_nothing_held_once_its_ticket_is_taken_away(
    engine: FakeEngine, prefixes: Prefixes
) -> None:
    first = acquire(prefixes, Source(ticket(1), ""), 6)
    load = await loading(engine)
    source = Source(ticket(2), "")
    second = acquire(prefixes, source, 8)
    await until(lambda: attempts_held(engine) == [2])
    source.change(None, "prefill_lost")
    await until(lambda: not engine.control.held)
    engine.control.end(load.key, loaded(load))
    prefixes.release(await first)
    assert (await second).record == wire.KvRecord("recomputed", reason="prefill_lost")


async def test_a_full_pool_is_asked_again(engine: FakeEngine, prefixes: Prefixes) -> None:
    engine.full = 2
    task = acquire(prefixes, Source(ticket(), ""))
    await until(lambda: attempts_held(engine) == [1])
    load = await loading(engine)
    engine.control.end(load.key, loaded(load))
    prefixes.release(await task)
    assert engine.count("begin i0") == 3


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancel_at_any_turn_releases_once_and_after_the_load(
    engine: FakeEngine, prefixes: Prefixes, turns: int
) -> None:
    task = acquire(prefixes, Source(ticket(), ""))
    for _ in range(turns):
        await asyncio.sleep(0)
    await cancel(task)
    await until(lambda: prefixes.idle)
    assert engine.count("release i0") == (turns > 0)
    assert engine.count("load 1") == engine.count("ended 1")
    if "load 1" in engine.journal:
        assert engine.journal.index("ended 1") < engine.journal.index("release i0")


async def test_the_blocks_are_kept_until_a_cancelled_load_has_ended(
    engine: FakeEngine, prefixes: Prefixes
) -> None:
    engine.control.slow_unload = True
    task = acquire(prefixes, Source(ticket(), ""))
    load = await loading(engine)
    for _ in range(3):  # the deadline, the router and the grace period may all cancel it
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        assert engine.count("release i0") == 0
    engine.control.end(load.key, kv.Failed(load.key, "cancelled"))
    await cancel(task)
    await until(lambda: prefixes.idle)
    assert engine.journal[-2:] == ["ended 1", "release i0"]


async def test_a_load_that_lasts_too_long_is_stopped(engine: FakeEngine) -> None:
    prefixes = make(engine, timeout_s=0.05)
    held = await asyncio.wait_for(acquire(prefixes, Source(ticket(), "")), DEADLINE_S)
    assert held.record == wire.KvRecord("recomputed", reason="timeout")
    await until(lambda: prefixes.idle)
    assert engine.journal[-2:] == ["ended 1", "release i0"]


async def test_a_lost_producer_is_replaced(engine: FakeEngine, prefixes: Prefixes) -> None:
    source = Source(ticket(1), "")
    task = acquire(prefixes, source)
    await loading(engine)
    source.change(ticket(2), "prefill_lost")
    load = await loading(engine)
    assert load.key.attempt == 2
    engine.control.end(load.key, loaded(load))
    held = await task
    assert (held.record.path, held.record.transfers) == ("remote", 2)
    prefixes.release(held)
    assert engine.journal[:4] == ["begin i0", "load 1", "ended 1", "load 2"]


async def test_a_lost_producer_without_another_is_recomputed(engine: FakeEngine, prefixes: Prefixes) -> None:
    source = Source(ticket(1), "")
    task = acquire(prefixes, source)
    await loading(engine)
    source.change(None, "prefill_lost")
    held = await task
    assert held.record == wire.KvRecord("recomputed", reason="prefill_lost")


async def test_a_producer_lost_before_the_load_began_does_not_cost_its_successor(
    engine: FakeEngine, prefixes: Prefixes
) -> None:
    source = Source(ticket(1), "")
    source.change(ticket(2), "prefill_lost")
    task = acquire(prefixes, source)
    load = await loading(engine)
    assert load.key.attempt == 2
    for _ in range(5):
        await asyncio.sleep(0)
    assert engine.control.unloads.empty()
    engine.control.end(load.key, loaded(load))
    held = await task
    assert held.record.path == "remote"
    prefixes.release(held)


async def test_a_change_that_meets_the_end_of_the_load_is_followed(
    engine: FakeEngine, prefixes: Prefixes
) -> None:
    source = Source(ticket(1), "")
    task = acquire(prefixes, source)
    load = await loading(engine)
    engine.control.end(load.key, kv.Failed(load.key, "disconnected"))
    source.change(ticket(2), "prefill_lost")
    load = await loading(engine)
    engine.control.end(load.key, loaded(load))
    held = await task
    assert held.record.path == "remote"
    prefixes.release(held)


def test_a_prefix_is_counted_in_every_cache_group() -> None:
    prefixes = make(FakeEngine(200, 5))
    assert prefixes.blocks_of(16) == 4 + 2  # of the window of 5: blocks with the tokens 8 to 15
    assert prefixes.blocks_of(17) == 5 + 2  # 12 to 16


async def test_who_may_not_wait_for_room_is_told_that_there_is_none(
    engine: FakeEngine, prefixes: Prefixes
) -> None:
    """Searches of one body hold their imports to its end: one that waited for room waited for itself, and
    every other import behind it."""
    first = acquire(prefixes, Source(ticket(), ""), 6)
    load = await loading(engine)
    engine.control.end(load.key, loaded(load))
    held = await first
    none = await prefixes.acquire(prompt(6), 1, Source(ticket(2), ""), waits=False)
    assert (none.name, none.record) == (None, wire.KvRecord("local", reason="too_large"))
    waiting = acquire(prefixes, Source(ticket(3), ""), 6)
    await until(lambda: prefixes._turn.locked())
    none = await prefixes.acquire(prompt(3), 1, Source(ticket(2), ""), waits=False)
    assert none.name is None, "nobody overtakes"
    await cancel(waiting)
    room = asyncio.create_task(prefixes.acquire(prompt(3), 1, Source(ticket(2), ""), waits=False))
    load = await loading(engine)
    engine.control.end(load.key, loaded(load))
    for one in (held, await room):
        assert one.name is not None
        prefixes.release(one)
