"""A group of groups, as its reader leaves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.sampler import GroupUsage, Sample
from router.strategies.branches import ForkedGroup, _Open


class Hanging:
    """A group whose samples never come. ``left``: what it was left with."""

    def __init__(self) -> None:
        self.usage = GroupUsage(completion_tokens=3)
        self.cancelled = asyncio.Event()
        self.left: list[object] = []

    async def __aenter__(self) -> Hanging:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.left.append(exc[0])

    async def __aiter__(self) -> AsyncIterator[Sample]:
        await asyncio.Event().wait()
        yield Sample(0, "failed")

    async def cancel(self, indices: Any = None) -> None:
        self.cancelled.set()

    async def redraw(self, indices: Any) -> None: ...


async def test_branches_are_left_though_the_wait_for_their_end_is_cancelled() -> None:
    """Their fan-outs stayed open: prefills ran on and dispatches counted as in flight."""
    branches = [Hanging(), Hanging()]
    forked = ForkedGroup([_Open(one, {number}) for number, one in enumerate(branches)])

    async def fails() -> None:
        async with forked:
            raise ValueError("a reader that has enough")

    task = asyncio.create_task(fails())
    await branches[1].cancelled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [one.left for one in branches] == [[asyncio.CancelledError]] * 2
    assert forked.usage.completion_tokens == 6
