"""A streamed ``direct``: token by token, inside its bounds, with a report."""

from __future__ import annotations

from typing import Any

import msgspec

from braid import wire
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import stream_until_gate
from tests.router.test_cancel import connected


def chunks(text: str) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def test_the_text_comes_before_the_sample_has_ended(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=stream_until_gate)
    body = chat(stream=True, reasoning={"strategy": "direct", "deadline_s": 30})
    async with connected(stand, body) as reader:
        await reader.readuntil(b"d0 ")
        d0.gate.set()
        await reader.readuntil(b"[DONE]")


async def test_the_last_chunk_has_the_report_and_the_budget_bounds_the_tokens(stand: Stand) -> None:
    _, d0 = await stand.workers()
    options = {"strategy": "direct", "budget_tokens": 9, "return_samples": True, "deadline_s": 30}
    reply = await stand.post(CHAT, chat(stream=True, reasoning=options))
    (report,) = [chunk["reasoning"] for chunk in chunks(reply.text) if "reasoning" in chunk]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks(reply.text) if c["choices"])
    assert (report["strategy"], report["samples"][0]["text"]) == ("direct", text)
    assert report["group"] == reply.headers["x-braid-group"]
    assert report["stopped_early"] is None
    decode = await d0.expect(wire.Decode)
    assert decode.mode == "http"
    assert 0 < decode.deadline_s <= 30
    assert msgspec.json.decode(decode.body)["max_tokens"] == 9


async def test_a_worker_that_falls_silent_is_an_error_and_no_deadline(make_stand: MakeStand) -> None:
    """It was told as an answer that had come to its end."""
    stand = await make_stand(inter_token_timeout_s=0.2)
    await stand.workers(decode=stream_until_gate)
    options = {"strategy": "direct", "budget_tokens": 9}
    reply = await stand.post(CHAT, chat(stream=True, reasoning=options))
    *_, last = chunks(reply.text)
    assert last["error"]["code"] == "silent"
    assert "[DONE]" not in reply.text


async def test_at_its_deadline_it_ends_with_what_it_has(stand: Stand) -> None:
    await stand.workers(decode=stream_until_gate)
    options = {"strategy": "direct", "deadline_s": 0.5}
    reply = await stand.post(CHAT, chat(stream=True, reasoning=options))
    *_, last = chunks(reply.text)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["reasoning"]["stopped_early"] == "deadline"
    assert reply.text.endswith("data: [DONE]\n\n")
