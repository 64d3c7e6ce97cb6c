"""The fallback ladder: what happens when a worker fails, refuses or is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from braid import wire
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import (
    REMOTE,
    SSE_HEADERS,
    FakeWorker,
    answer_at_gate,
    decode_fails,
    prefill_fails,
    silent,
    stream_events,
    stream_until_gate,
)


async def test_both_are_dispatched_before_either_answers(stand: Stand) -> None:
    p0, d0 = await stand.workers(prefill=silent, decode=answer_at_gate)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await p0.expect(wire.Prefill)
    await d0.expect(wire.Decode)
    d0.gate.set()
    assert (await request).status_code == 200
    await p0.expect(wire.Cancel)


async def test_a_refused_prefill_is_left_to_decode_and_keeps_its_worker(stand: Stand) -> None:
    async def refused_too(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.expect(wire.Lost)
        await decode_fails(400)(worker, message)

    _, d0 = await stand.workers(prefill=prefill_fails(400), decode=refused_too)
    reply = await stand.post(CHAT, chat())
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "engine says no")
    assert (await d0.expect(wire.Lost)).reason == "refused"
    assert stand.app.pairs.ready()


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_failed_prefill_moves_to_another_worker_once(stand: Stand, status: int) -> None:
    _, d0 = await stand.workers(prefill=prefill_fails(status), decode=answer_at_gate)
    p1 = await stand.worker("prefill", "p1", prefill_fails(status))
    await stand.until(lambda: all(pair["verified"] for pair in stand.app.pairs.state()))
    request = asyncio.create_task(stand.post(CHAT, chat()))
    moved, given_up = await d0.expect(wire.Lost), await d0.expect(wire.Lost, 2)
    first, second = (await d0.expect(wire.Decode)).ticket, (await p1.expect(wire.Prefill)).ticket
    assert first is not None
    assert moved.ticket == second
    assert (second.id, second.attempt, second.producer) == (first.id, 2, "p1")
    assert given_up.ticket is None
    d0.gate.set()
    assert (await request).status_code == 200


async def test_a_killed_prefill_worker_is_told_to_decode(stand: Stand) -> None:
    p0, d0 = await stand.workers(prefill=silent, decode=answer_at_gate)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await p0.expect(wire.Prefill)
    await p0.die()
    lost = await d0.expect(wire.Lost)
    assert (lost.reason, lost.ticket) == ("prefill_lost", None)
    d0.gate.set()
    assert (await request).status_code == 200


async def test_a_prefill_worker_killed_after_its_answer_is_told_too(stand: Stand) -> None:
    p0, d0 = await stand.workers(decode=answer_at_gate)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await p0.expect(wire.Prefill)
    await stand.until(lambda: len(stand.app.link.open_refs()) == 1)
    await p0.die()
    assert (await d0.expect(wire.Lost)).ticket is None
    d0.gate.set()
    assert (await request).status_code == 200


async def test_a_hanging_prefill_is_given_up_at_its_deadline(make_stand: MakeStand) -> None:
    stand = await make_stand(prefill_timeout_s=0.1)
    p0, d0 = await stand.workers(prefill=silent, decode=answer_at_gate)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    assert (await d0.expect(wire.Lost)).reason == "prefill_timeout"
    await p0.expect(wire.Cancel)
    d0.gate.set()
    assert (await request).status_code == 200


async def test_a_decode_worker_lost_before_its_answer_is_replaced_unseen(stand: Stand) -> None:
    p0, d0, d1 = await stand.workers(decode=answer_at_gate, decoders=2)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    await d0.die()
    second = await d1.expect(wire.Decode)
    assert second.ticket == (await p0.expect(wire.Prefill, 2)).ticket
    assert second.ticket is not None
    assert second.ticket.attempt == 2
    d1.gate.set()
    reply = await request
    assert (reply.status_code, reply.headers["x-braid-decode"]) == (200, "d1")


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_decode_worker_is_replaced_unseen(stand: Stand, status: int) -> None:
    _, d0 = await stand.workers(decode=decode_fails(status))
    await stand.worker("decode", "d1")
    assert (await stand.post(CHAT, chat())).json()["choices"][0]["message"]["content"] == "d1.0"
    assert len(d0.got(wire.Decode)) == 1


async def test_the_last_decode_workers_own_error_is_passed_on(stand: Stand) -> None:
    await stand.workers(decode=decode_fails(503, "engine is full"))
    reply = await stand.post(CHAT, chat())
    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "engine is full")


async def test_the_last_decode_worker_lost_is_a_503_with_retry_after(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=silent)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    await d0.die()
    reply = await request
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1


async def dying(worker: FakeWorker, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Lines as they come; the worker dies after the first."""
    async for line in lines:
        yield line
        await worker.die()


async def stream_ends_in_error(stand: Stand) -> list[bytes]:
    """The events of a stream that has to end with an error and without ``[DONE]``."""
    reply = await stand.http.post(CHAT, json=chat(stream=True))
    events = [event for event in reply.content.split(b"\n\n") if event]
    assert reply.status_code == 200
    assert events[-1].startswith(b'data: {"error":')
    assert b"[DONE]" not in reply.content
    return events


async def test_a_decode_worker_lost_mid_stream_is_an_error_event(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=stream_until_gate)
    async with stand.http.stream("POST", CHAT, json=chat(stream=True)) as reply:
        lines = [line async for line in dying(d0, reply.aiter_lines()) if line]
    assert "d0 " in lines[0]
    assert lines[-1].startswith('data: {"error":')


async def test_a_cut_stream_is_an_error_event(stand: Stand) -> None:
    async def cut(worker: FakeWorker, message: wire.Decode) -> None:
        data = stream_events(message, worker.name)[0]
        head = wire.Head(message.ref, 200, SSE_HEADERS, REMOTE)
        await worker.send(head, wire.Body(message.ref, data, end=True, cut="engine"))

    await stand.workers(decode=cut)
    assert len(await stream_ends_in_error(stand)) == 2


async def test_a_cut_body_is_a_502(stand: Stand) -> None:
    async def cut(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.send(wire.Head(message.ref, 200, ()), wire.Body(message.ref, b"{", True, cut="engine"))

    await stand.workers(decode=cut)
    assert (await stand.post(CHAT, chat())).status_code == 502


async def test_an_engines_error_event_ends_the_stream_without_done(stand: Stand) -> None:
    async def fails(worker: FakeWorker, message: wire.Decode) -> None:
        events = [stream_events(message, worker.name)[0], b'data: {"error": {"message": "x"}}\n\n']
        head = wire.Head(message.ref, 200, SSE_HEADERS, REMOTE)
        await worker.send(head, wire.Body(message.ref, b"".join(events) + b"data: [DONE]\n\n", end=True))

    await stand.workers(decode=fails)
    await stream_ends_in_error(stand)
    assert stand.metric("braid_requests_total", endpoint="chat", outcome="failed") == 1


async def test_silence_mid_stream_is_an_error_event(make_stand: MakeStand) -> None:
    stand = await make_stand(inter_token_timeout_s=0.1)
    _, d0 = await stand.workers(decode=stream_until_gate)
    await stream_ends_in_error(stand)
    await d0.expect(wire.Cancel)


async def test_the_deadline_is_a_504_and_cancels_both(make_stand: MakeStand) -> None:
    stand = await make_stand(request_timeout_s=0.2)
    p0, d0 = await stand.workers(prefill=silent, decode=silent)
    assert (await stand.post(CHAT, chat())).status_code == 504
    await p0.expect(wire.Cancel)
    await d0.expect(wire.Cancel)


@pytest.mark.parametrize("body", [b"not json", b"[1]", b'{"choices": 5}', b""])
async def test_an_unusable_answer_is_a_502(stand: Stand, body: bytes) -> None:
    async def garbage(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.send(wire.Head(message.ref, 200, ()), wire.Body(message.ref, body, end=True))

    await stand.workers(decode=garbage)
    reply = await stand.post(CHAT, chat())
    assert reply.status_code == (200 if body.startswith(b"{") else 502)


async def test_no_decode_worker_is_a_503_with_retry_after(stand: Stand) -> None:
    reply = await stand.post(CHAT, chat())
    assert reply.status_code == 503
    assert "retry-after" in reply.headers


async def test_no_prefill_worker_is_computed_on_decode_and_says_so(stand: Stand) -> None:
    d0 = await stand.worker("decode", "d0")
    reply = await stand.post(CHAT, chat())
    assert reply.json()["braid"]["path"] == "local"
    assert "x-braid-prefill" not in reply.headers
    assert (await d0.expect(wire.Decode)).reason == "no_prefill"


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (CHAT, chat(prompt_logprobs=1), "unshareable"),
        ("/v1/completions", {"model": "demo", "prompt": "hi", "echo": True}, "unshareable"),
        ("/v1/completions", {"model": "demo", "prompt": "hi", "suffix": "x"}, "unshareable"),
    ],
)
async def test_what_a_prefill_worker_cannot_serve_is_computed_on_decode(
    stand: Stand, path: str, body: object, reason: str
) -> None:
    p0, d0 = await stand.workers()
    assert (await stand.post(path, body)).status_code == 200
    assert (await d0.expect(wire.Decode)).reason == reason
    assert p0.got(wire.Prefill) == []


async def test_short_prompts_stay_local_when_configured(make_stand: MakeStand) -> None:
    stand = await make_stand(remote_min_chars=10)
    p0, d0 = await stand.workers()
    await stand.post(CHAT, chat())
    await stand.post(CHAT, chat(messages=[{"role": "user", "content": "long enough"}]))
    assert [d.reason for d in d0.got(wire.Decode)] == ["short", ""]
    await p0.expect(wire.Prefill)  # it may be read after the reply
    assert len(p0.got(wire.Prefill)) == 1
