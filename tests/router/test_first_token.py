"""The token that a prefill worker draws is passed on to the decode worker that can begin with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from braid import wire
from tests.router.conftest import CHAT, COMPLETIONS, Stand, chat
from tests.router.fake_worker import FakeWorker, answer_at_gate, answer_decode, silent, stream_until_gate

GREEDY = (0.0, 1.0, 0, 0.0)


async def draws(worker: FakeWorker, message: wire.Prefill) -> None:
    if message.draw:
        await worker.send(wire.First(message.ref, 8, GREEDY))
    await worker.send(wire.PrefillDone(message.ref, 200, prompt_tokens=7))


async def test_a_drawn_token_reaches_the_decode_worker_under_its_own_number(stand: Stand) -> None:
    async def begins(worker: FakeWorker, message: wire.Decode) -> None:
        assert (await worker.expect(wire.First)) == wire.First(message.ref, 8, GREEDY)
        await answer_decode(worker, message)

    p0, d0 = await stand.workers(prefill=draws, decode=begins)
    assert (await stand.post(CHAT, chat(stream=True))).status_code == 200
    assert (await p0.expect(wire.Prefill)).draw
    assert (await d0.expect(wire.Decode)).drawn


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(n=2)),
        (COMPLETIONS, {"model": "demo", "prompt": ["a", "b"]}),
        (CHAT, chat(reasoning={"strategy": "self_consistency", "n": 3})),
    ],
)
async def test_several_samples_or_prompts_draw_their_own(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    p0, d0 = await stand.workers(prefill=draws)
    assert (await stand.post(path, body)).status_code == 200
    assert not (await p0.expect(wire.Prefill)).draw
    assert not (await d0.expect(wire.Decode)).drawn


async def test_without_a_prefill_worker_none_is_announced(stand: Stand) -> None:
    d0 = await stand.worker("decode", "d0")
    await stand.post(CHAT, chat())
    assert not (await d0.expect(wire.Decode)).drawn


async def test_a_token_of_a_producer_that_was_given_up_is_not_passed_on(stand: Stand) -> None:
    p0, d0 = await stand.workers(prefill=silent, decode=answer_at_gate)
    p1 = await stand.worker("prefill", "p1", silent)
    await stand.until(lambda: all(pair["verified"] for pair in stand.app.pairs.state()))
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    ticket = (await d0.expect(wire.Decode)).ticket
    assert ticket is not None
    by_name = {"p0": p0, "p1": p1}
    first, second = (by_name[name] for name in (ticket.producer, {"p0": "p1", "p1": "p0"}[ticket.producer]))
    failed = (await first.expect(wire.Prefill)).ref
    await first.send(wire.PrefillDone(failed, 500), wire.First(failed, 9, GREEDY))
    again = (await second.expect(wire.Prefill)).ref
    await second.send(wire.First(again, 8, GREEDY))
    assert (await d0.expect(wire.First)).token == 8
    d0.gate.set()
    assert (await request).status_code == 200
    assert [m.token for m in d0.got(wire.First)] == [8]


async def test_an_answer_that_has_begun_is_told_no_token(stand: Stand) -> None:
    p0, d0 = await stand.workers(prefill=silent, decode=stream_until_gate)
    async with stand.http.stream("POST", CHAT, json=chat(stream=True)) as reply:
        events = reply.aiter_bytes()
        await anext(events)
        prefill = await p0.expect(wire.Prefill)
        await p0.send(wire.First(prefill.ref, 8, GREEDY), wire.PrefillDone(prefill.ref, 200))
        await stand.until(lambda: prefill.ref not in stand.app.link.open_refs())
        d0.gate.set()
        async for _ in events:
            pass
    assert d0.got(wire.First) == []
