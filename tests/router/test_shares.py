"""Requests whose samples are divided over two decode workers."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from braid import wire
from tests.router.conftest import CHAT, COMPLETIONS, MakeStand, Stand, chat
from tests.router.fake_worker import answer_at_gate, decode_fails, silent


@pytest.fixture
async def stand(make_stand: MakeStand) -> Stand:
    return await make_stand(spread="spread")


async def test_shares_know_their_size_offset_and_consumers(stand: Stand) -> None:
    p0, d0, d1 = await stand.workers(decoders=2)
    await stand.post(CHAT, chat(n=5))
    shares = [await d0.expect(wire.Decode), await d1.expect(wire.Decode)]
    assert [(s.first, msgspec.json.decode(s.body)["n"]) for s in shares] == [(0, 3), (3, 2)]
    assert shares[0].ticket == shares[1].ticket == (await p0.expect(wire.Prefill)).ticket
    assert shares[0].ticket is not None
    assert shares[0].ticket.consumers == (1, 1)


async def test_by_cost_a_group_is_divided_and_its_next_goes_where_the_prompt_is(
    make_stand: MakeStand,
) -> None:
    stand = await make_stand(spread="auto", kv_bandwidth=1e6)
    p0, d0, d1 = await stand.workers(decoders=2)
    for _ in range(2):  # the same prompt again
        reply = await stand.post(CHAT, chat(messages=[{"role": "user", "content": "a" * 4000}], n=4))
        assert len(reply.json()["choices"]) == 4
    assert (len(d0.got(wire.Decode)), len(d1.got(wire.Decode))) in ((2, 0), (0, 2))
    short = await stand.post(CHAT, chat(n=8, max_tokens=2000))
    assert short.headers["x-braid-decode"] == "d0,d1"
    assert p0.got(wire.Prefill)


async def test_by_cost_what_has_no_prompt_to_share_is_served_too(make_stand: MakeStand) -> None:
    stand = await make_stand(spread="auto")
    await stand.workers(decoders=2)
    for path, body in (("/detokenize", {"tokens": [1, 2]}), ("/tokenize", {"prompt": "hi"})):
        assert (await stand.post(path, {"model": "demo", **body})).status_code == 200
    two = {"model": "demo", "prompt": ["a", "b"], "n": 2}
    assert (await stand.post(COMPLETIONS, two)).status_code == 200


async def test_a_body_has_all_choices_in_order_and_the_sum_of_what_moved(stand: Stand) -> None:
    await stand.workers(decoders=2)
    reply = await stand.post(CHAT, chat(n=5))
    body = reply.json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == ["d0.0", "d0.1", "d0.2", "d1.0", "d1.1"]
    assert [choice["index"] for choice in body["choices"]] == list(range(5))
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}
    assert (body["braid"]["kv_transfers"], body["braid"]["kv_bytes"]) == (2, 2000)
    assert reply.headers["x-braid-decode"] == "d0,d1"
    assert reply.headers["x-braid-kv-transfers"] == "2"


async def test_a_stream_joins_and_its_headers_tell_of_both(stand: Stand) -> None:
    await stand.workers(decoders=2)
    async with stand.openai().chat.completions.with_streaming_response.create(
        model="demo",
        messages=[{"role": "user", "content": "hi"}],
        n=3,
        stream=True,
        stream_options={"include_usage": True},
    ) as response:
        assert response.headers["x-braid-kv-transfers"] == "2"
        chunks = [chunk async for chunk in await response.parse()]
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["d0 says", "d0 says", "d1 says"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


async def test_several_prompts_stay_together(stand: Stand) -> None:
    _, d0, d1 = await stand.workers(decoders=2)
    await stand.post(COMPLETIONS, {"model": "demo", "prompt": ["a", "b"], "n": 2})
    assert len(d0.got(wire.Decode)) + len(d1.got(wire.Decode)) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_one_refusing_share_is_the_answer_and_cancels_the_other(stand: Stand, stream: bool) -> None:
    await stand.workers(decoders=0)
    d0 = await stand.worker("decode", "d0", decode_fails(400))
    d1 = await stand.worker("decode", "d1", silent)
    await stand.until(lambda: sum(p["verified"] for p in stand.app.pairs.state()) == 2)
    reply = await stand.post(CHAT, chat(n=2, stream=stream))
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "engine says no")
    await d1.expect(wire.Cancel)
    assert len(d0.got(wire.Decode)) == 1


async def test_only_the_share_of_a_lost_worker_moves(stand: Stand) -> None:
    p0, d0, d1 = await stand.workers(decode=answer_at_gate, decoders=2)
    request = asyncio.create_task(stand.post(CHAT, chat(n=4)))
    await d0.expect(wire.Decode)
    await d0.die()
    moved = await d1.expect(wire.Decode, 2)
    assert (moved.first, msgspec.json.decode(moved.body)["n"]) == (0, 2)
    assert (await p0.expect(wire.Prefill, 2)).ticket.consumers == (1,)
    d1.gate.set()
    reply = await request
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2, 3]
    assert reply.headers["x-braid-decode"] == "d1"
