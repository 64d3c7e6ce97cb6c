"""Admission: slots, turns, the bound of the queue."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from braid.errors import Overloaded, Unavailable
from router.admission import Admission
from router.metrics import Metrics


def admission(capacity: int = 4, queue_limit: int = 2, timeout_s: float = 5.0) -> Admission:
    return Admission(capacity, queue_limit, timeout_s, Metrics())


async def hold(gate: Admission, n: int, order: list[int], release: asyncio.Event) -> None:
    async with gate.slots(n):
        order.append(n)
        await release.wait()


async def test_turns_come_in_order_even_if_a_later_one_would_fit() -> None:
    gate, order, release = admission(), list[int](), asyncio.Event()
    tasks = [asyncio.create_task(hold(gate, n, order, release)) for n in (3, 2, 1)]
    await asyncio.sleep(0)
    assert order == [3]
    release.set()
    await asyncio.gather(*tasks)
    assert order == [3, 2, 1]
    gate.check_integrity(idle=True)


async def test_more_samples_than_slots_take_all_slots() -> None:
    gate = admission()
    async with gate.slots(100):
        gate.check_integrity()
    gate.check_integrity(idle=True)


async def test_a_full_queue_refuses() -> None:
    gate, order, release = admission(queue_limit=0), list[int](), asyncio.Event()
    first = asyncio.create_task(hold(gate, 4, order, release))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await hold(gate, 1, order, release)
    release.set()
    await first


async def test_closing_refuses_who_waits_and_who_comes() -> None:
    gate, order, release = admission(), list[int](), asyncio.Event()
    first, second = (asyncio.create_task(hold(gate, 4, order, release)) for _ in range(2))
    await asyncio.sleep(0)
    gate.close()
    for late in (second, hold(gate, 1, order, release)):
        with pytest.raises(Unavailable):
            await late
    release.set()
    await first
    gate.check_integrity(idle=True)


@pytest.mark.parametrize("seed", range(20))
async def test_any_mix_of_turns_timeouts_and_cancels_leaves_nothing(seed: int) -> None:
    chance = random.Random(seed)
    gate = admission(capacity=5, queue_limit=6, timeout_s=0.01)

    async def one() -> None:
        with suppress(Overloaded):
            async with gate.slots(chance.randint(1, 7)):
                gate.check_integrity()
                await asyncio.sleep(chance.random() * 0.005)

    tasks = [asyncio.create_task(one()) for _ in range(30)]
    for _ in tasks:
        await asyncio.sleep(chance.random() * 0.001)
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gate.check_integrity(idle=True)
