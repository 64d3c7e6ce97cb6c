"""When an answer with a deadline leaves."""

from __future__ import annotations

from typing import Any

import pytest

from braid.settings import RouterSettings
from router.http import REPLY_S, Call


async def nothing(*_: Any) -> Any:
    raise AssertionError("nobody reads or writes")


async def call() -> Call:
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    return Call(scope, nothing, nothing, RouterSettings())


async def test_there_is_none_without_a_deadline() -> None:
    assert (await call()).due(None) is None


@pytest.mark.parametrize(
    ("seconds", "left"), [(5.0, REPLY_S), (10 * REPLY_S, REPLY_S), (0.05, 0.005), (1e-6, 1e-7)]
)
async def test_it_leaves_before_the_deadline_as_it_has_a_way_to_go(seconds: float, left: float) -> None:
    asked = await call()
    due = asked.due(seconds)
    assert due is not None
    assert due - asked.received == pytest.approx(seconds - left, abs=1e-9)
