"""First tokens that simulated prefill workers draw, behind the real router."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from braid.sim.worker import SimWorker
from tests.router.conftest import CHAT
from tests.sim.conftest import Fleet
from tests.sim.test_wire import LONG, ask, texts

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the token is late."""
    monkeypatch.setattr("braid.worker.told.WAIT_S", 30.0)


def decoder(fleet: Fleet) -> SimWorker:
    return next(worker for worker in fleet.workers if worker.role == "decode")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sample_that_begins_with_it_is_the_same_and_has_a_step_less(
    fleet: Fleet, stream: bool
) -> None:
    await fleet.pairs()
    fields = {"stream": stream, "temperature": 0, "max_tokens": 8, "stream_options": None}
    begun, fewer = await counted(fleet, fields)
    plain, steps = await counted(fleet, {**fields, "logprobs": True})
    assert begun == plain
    assert (fewer, steps) == (7, 8)
    assert decoder(fleet).stats()["firsts"] == 1


async def counted(fleet: Fleet, fields: dict[str, Any]) -> tuple[str, int]:
    """Text of a reply, and the steps that the decode worker made for it."""
    before = decoder(fleet).engine.steps
    reply = await fleet.stand.post(CHAT, ask(LONG, **fields))
    found = said(reply.text) if fields["stream"] else texts(reply)
    return "".join(found), decoder(fleet).engine.steps - before


def said(stream: str) -> list[str]:
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return [c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sample_of_one_token_needs_no_step(fleet: Fleet, stream: bool) -> None:
    await fleet.pairs()
    text, steps = await counted(fleet, {"stream": stream, "temperature": 0, "max_tokens": 1})
    assert (len(text), steps) == (4, 0)
    await fleet.settled()


@pytest.mark.parametrize("fields", [{"seed": 1}, {"logprobs": True}, {"min_tokens": 2}, {"n": 2}], ids=str)
async def test_what_shapes_it_otherwise_is_drawn_where_it_is_decoded(
    fleet: Fleet, fields: dict[str, Any]
) -> None:
    await fleet.pairs()
    texts(await fleet.stand.post(CHAT, ask(LONG, max_tokens=4, **fields)))
    assert decoder(fleet).stats()["firsts"] == 0


async def test_a_token_that_is_not_told_is_waited_for_shortly(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braid.worker.told.WAIT_S", 0.01)
    await fleet.pairs()
    monkeypatch.setattr(decoder(fleet).service, "first", lambda message: None)
    text, steps = await counted(fleet, {"stream": False, "temperature": 0, "max_tokens": 4})
    assert (len(text), steps, decoder(fleet).stats()["firsts"]) == (16, 4, 0)


async def test_a_client_that_leaves_while_the_token_is_awaited_frees_every_block(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braid.worker.told.WAIT_S", 1.0)
    await fleet.pairs()
    worker, came, steps = decoder(fleet), asyncio.Event(), decoder(fleet).engine.steps
    monkeypatch.setattr(worker.service, "first", lambda message: came.set())
    request = asyncio.create_task(fleet.stand.post(CHAT, ask(LONG, max_tokens=4)))
    async with asyncio.timeout(60):
        await came.wait()
        while not worker.stats()["seats_held"]:
            await asyncio.sleep(0.001)
    request.cancel()
    await fleet.until(lambda: not worker.stats()["dispatches"])
    assert worker.engine.steps == steps
