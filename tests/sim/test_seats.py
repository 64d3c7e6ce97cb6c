"""Seats of a simulated decode worker, and a fleet that loses one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from braid import wire
from braid.sim.worker import SimWorker
from tests.router.conftest import CHAT
from tests.sim.test_service import Desk, desk  # noqa: F401
from tests.sim.test_wire import ask

pytestmark = pytest.mark.slow

VOTE = {"strategy": "self_consistency", "cot": False, "early_stop": False}


def running(worker: SimWorker) -> int:
    return len(worker.engine.scheduler.running)


async def test_a_group_is_narrow_beside_a_single_request_and_wide_without(desk: Desk) -> None:  # noqa: F811
    desk.worker.service.seats.group_width = 4  # type: ignore[union-attr]
    desk.worker.service.seats.calm_s = 0.0  # type: ignore[union-attr]
    desk.decode(1, "[sim tokens=3000]", n=1)
    await desk.running(1)
    desk.decode(2, "[sim tokens=3000]", n=64, several=True)
    await desk.running(5)
    assert desk.worker.stats()["seats_waiting"] == 60
    assert desk.service.beat().waiting == 60
    desk.service.cancel(wire.Cancel(1))
    await desk.running(64)
    desk.service.cancel(wire.Cancel(2))
    assert desk.worker.stats()["seats_held"] == desk.worker.stats()["seats_waiting"] == 0


async def test_samples_that_wait_are_cancelled_without_a_token(desk: Desk) -> None:  # noqa: F811
    desk.worker.service.seats.capacity = 3  # type: ignore[union-attr]
    desk.decode(1, "[sim tokens=3000]", n=6, several=True)
    await desk.running(2)
    desk.service.cancel(wire.Cancel(1, (3, 4)))
    assert {(s.index, s.state, s.tokens) for s in desk.of(wire.Sample)} == {
        (3, "cancelled", 0),
        (4, "cancelled", 0),
    }
    assert desk.worker.stats()["seats_waiting"] == 2
    desk.service.cancel(wire.Cancel(1))
    assert desk.worker.stats()["seats_waiting"] == 0


async def test_the_order_of_starting_changes_no_sample(desk: Desk) -> None:  # noqa: F811
    desk.decode(1, "hello [sim tokens=30]", n=8, several=True)
    await desk.until(wire.GroupDone)
    whole = {sample.index: sample.text for sample in desk.of(wire.Sample)}
    desk.sent.clear()
    desk.worker.service.seats.capacity = 3  # type: ignore[union-attr]
    desk.decode(2, "hello [sim tokens=30]", n=8, several=True)
    await desk.until(wire.GroupDone)
    assert {sample.index: sample.text for sample in desk.of(wire.Sample)} == whole


async def test_waiting_samples_still_fork_from_the_one_import(make_fleet: Any) -> None:
    fleet = await make_fleet()
    _, d0 = await fleet.pairs()
    d0.service.seats.capacity = 4
    body = ask("[sim answer=7] " + "count the eggs " * 60, seed=1, reasoning=VOTE | {"n": 64})
    reply = (await fleet.stand.post(CHAT, body)).json()
    record = reply["braid"]["decode"]["d0"]
    assert (record["kv_transfers"], record["path"]) == (1, "remote")
    assert [s["state"] for s in reply["reasoning"]["samples"]] == ["finished"] * 64


async def test_priority_orders_seats(make_fleet: Any) -> None:
    fleet = await make_fleet()
    _, d0 = await fleet.pairs()
    d0.service.seats.capacity = 1
    order: list[int] = []

    async def post(priority: int) -> None:
        await fleet.stand.post(CHAT, ask("[sim tokens=200]", priority=priority))
        order.append(priority)

    first = asyncio.create_task(post(0))
    await fleet.until(lambda: running(d0) == 1)
    later = [asyncio.create_task(post(p)) for p in (5, -5)]
    await fleet.until(lambda: d0.service.seats.waiting == 2)
    await asyncio.gather(first, *later)
    assert order == [0, -5, 5]


async def test_the_samples_of_a_killed_worker_are_the_same_on_another(make_fleet: Any) -> None:
    fleet = await make_fleet()
    _, d0, d1 = await fleet.pairs(decode=2, sim_time_scale=1.0)
    body = ask("[sim answer=7 tokens=60]", seed=3, reasoning=VOTE | {"n": 16, "return_samples": True})
    whole = (await fleet.stand.post(CHAT, body)).json()
    request = asyncio.create_task(fleet.stand.post(CHAT, body))
    shares: list[Any] = []

    def some_ended() -> bool:
        owners = (dispatch.owner for dispatch in fleet.stand.app.link._table.values())
        shares[:] = [owner for owner in owners if getattr(owner, "told", None) and owner.left]
        return bool(shares)

    await fleet.until(some_ended)
    await (d0 if shares[0].worker.name == "d0" else d1).kill()
    again = (await request).json()
    assert again["reasoning"]["samples_redrawn"] > 0
    assert _texts(again) == _texts(whole)
    assert fleet.stand.metric("braid_retries_total", stage="sample", reason="decode_lost") > 0


def _texts(reply: Any) -> list[tuple[int, str, str]]:
    found = [(s["index"], s["state"], s["text"]) for s in reply["reasoning"]["samples"]]
    return sorted(found)


async def test_a_deadline_counts_from_receipt_while_a_request_waits_for_a_slot(make_fleet: Any) -> None:
    fleet = await make_fleet(max_inflight=4, group_share=1.0)
    _, d0 = await fleet.pairs(sim_time_scale=1.0)
    holder = asyncio.create_task(
        fleet.stand.post(CHAT, ask("[sim tokens=100]", reasoning=VOTE | {"n": 4, "deadline_s": 1.0}))
    )
    await fleet.until(lambda: running(d0) == 4)
    late = ask("[sim tokens=30]", reasoning=VOTE | {"n": 4, "deadline_s": 0.1})
    reply = await fleet.stand.post(CHAT, late)
    assert reply.status_code == 504
    assert "waited for a slot" in reply.json()["error"]["message"]
    assert (await holder).status_code in (200, 504)
