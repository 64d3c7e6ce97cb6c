"""The inbox of a request: order, waiting, and its bound."""

from __future__ import annotations

import asyncio

import pytest

from braid import wire
from router.link import Dispatch, Inbox, SlowReader
from tests.router.test_placement import worker


def body(inbox: Inbox, data: bytes) -> tuple[Dispatch, wire.Body]:
    return Dispatch(1, worker("decode", "d0"), 1, inbox, None), wire.Body(1, data)


def soon() -> float:
    return asyncio.get_running_loop().time() + 0.02


async def test_events_come_in_order_and_then_time_passes() -> None:
    inbox = Inbox()
    events = [body(inbox, b"a"), body(inbox, b"b")]
    for event in events:
        inbox.put(event)
    assert [await inbox.get(soon()), await inbox.get(soon()), await inbox.get(soon())] == [*events, None]


async def test_a_waiting_reader_is_woken() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.get(asyncio.get_running_loop().time() + 5))
    await asyncio.sleep(0)
    event = body(inbox, b"a")
    inbox.put(event)
    assert await waiting == event


async def test_one_large_message_passes() -> None:
    inbox = Inbox(limit=10)
    inbox.put(body(inbox, b"x" * 100))
    assert await inbox.get(soon()) is not None


async def test_a_reader_too_far_behind_is_told_and_memory_stays_bounded() -> None:
    inbox = Inbox(limit=10)
    for _ in range(1000):
        inbox.put(body(inbox, b"x" * 8))
    assert len(inbox._events) == 2
    with pytest.raises(SlowReader):
        await inbox.get(soon())
