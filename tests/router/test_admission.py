"""Admission: slots, turns, the bound of the queue."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import pytest

from braid.errors import DeadlineExceeded, Overloaded, Unavailable
from router.admission import Admission
from router.metrics import Metrics


def admission(
    capacity: int = 4, queue_limit: int = 2, timeout_s: float = 5.0, group_share: float = 1.0
) -> Admission:
    return Admission(capacity, queue_limit, timeout_s, Metrics(), group_share)


async def hold(gate: Admission, n: int, order: list[int], release: asyncio.Event, **asked: Any) -> None:
    async with gate.slots(n, **asked):
        order.append(n)
        await release.wait()


async def turns(gate: Admission, *asked: tuple[str, int, int]) -> list[str]:
    """Tenants in the order of their turns, each (tenant, slots, priority) letting the next one in."""
    order: list[str] = []

    async def one(tenant: str, n: int, priority: int) -> None:
        async with gate.slots(n, tenant=tenant, priority=priority):
            order.append(tenant)
            await asyncio.sleep(0)

    async with gate.slots(gate._capacity, tenant="first"):
        tasks = [asyncio.create_task(one(*each)) for each in asked]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    gate.check_integrity(idle=True)
    return order


async def test_turns_come_in_order_even_if_a_later_one_would_fit() -> None:
    gate, order, release = admission(capacity=6), list[int](), asyncio.Event()
    tasks = [asyncio.create_task(hold(gate, n, order, release)) for n in (4, 5, 2)]
    await asyncio.sleep(0)
    assert order == [4]
    release.set()
    await asyncio.gather(*tasks)
    assert order == [4, 5, 2]
    gate.check_integrity(idle=True)


async def test_tenants_get_as_many_slots_however_many_requests_they_send() -> None:
    gate = admission(capacity=2, queue_limit=100)
    asked = [("many", 2, 0)] * 6 + [("few", 2, 0)] * 3
    assert await turns(gate, *asked) == ["many", "few", "many", "few", "many", "few", "many", "many", "many"]


async def test_a_tenant_of_wide_requests_gets_fewer_of_them() -> None:
    gate = admission(capacity=4, queue_limit=100)
    found = await turns(gate, *[("wide", 4, 0)] * 3, *[("narrow", 2, 0)] * 6)
    assert found[:6].count("narrow") == 4


async def test_a_lower_priority_goes_first() -> None:
    gate = admission(capacity=1, queue_limit=10)
    assert await turns(gate, ("a", 1, 0), ("b", 1, 5), ("c", 1, -5)) == ["c", "a", "b"]


async def test_groups_leave_room_for_single_requests() -> None:
    gate, order, release = (
        admission(capacity=8, queue_limit=8, group_share=0.75),
        list[int](),
        asyncio.Event(),
    )
    tasks = [asyncio.create_task(hold(gate, n, order, release)) for n in (4, 64, 2, 1, 1)]
    await asyncio.sleep(0)
    assert order == [4, 1, 1], "a wide one is next, so that no narrower group overtakes it; single ones do"
    gate.check_integrity()
    release.set()
    await asyncio.gather(*tasks)
    assert order == [4, 1, 1, 64, 2]
    gate.check_integrity(idle=True)


async def test_a_wait_ends_at_the_requests_own_deadline() -> None:
    gate, order, release = admission(), list[int](), asyncio.Event()
    first = asyncio.create_task(hold(gate, 4, order, release))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded, match="waited for a slot"):
        await hold(gate, 1, order, release, until=asyncio.get_running_loop().time() + 0.01)
    release.set()
    await first
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
    gate = admission(capacity=5, queue_limit=6, timeout_s=0.01, group_share=0.8)

    async def one() -> None:
        with suppress(Overloaded):
            tenant, priority = chance.choice("abc"), chance.choice((0, 0, 1))
            async with gate.slots(chance.randint(1, 7), tenant=tenant, priority=priority):
                gate.check_integrity()
                await asyncio.sleep(chance.random() * 0.005)

    tasks = [asyncio.create_task(one()) for _ in range(30)]
    for _ in tasks:
        await asyncio.sleep(chance.random() * 0.001)
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gate.check_integrity(idle=True)
