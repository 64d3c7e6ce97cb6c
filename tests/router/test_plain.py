"""Plain requests through the router: what the client gets, and what the workers are sent."""

from __future__ import annotations

import msgspec

from braid import wire
from tests.router.conftest import CHAT, Stand, chat
from tests.router.fake_worker import FakeWorker, record, whole


async def test_a_chat_completion_comes_back_with_proof_of_path(stand: Stand) -> None:
    await stand.workers()
    reply = await stand.post(CHAT, chat())
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "d0.0"
    assert reply.json()["braid"]["path"] == "remote"
    assert reply.json()["braid"]["decode"]["d0"]["kv_bytes"] == 1000
    assert reply.headers["x-braid-path"] == "remote"


async def test_prefill_and_decode_are_sent_the_same_ticket(stand: Stand) -> None:
    p0, d0 = await stand.workers()
    await stand.post(CHAT, chat())
    prefill, decode = await p0.expect(wire.Prefill), await d0.expect(wire.Decode)
    assert prefill.ticket == decode.ticket
    assert len(prefill.ticket.id) == 16
    assert msgspec.json.decode(prefill.body) == msgspec.json.decode(decode.body) == chat()


async def test_the_official_client_streams(stand: Stand) -> None:
    await stand.workers()
    stream = await stand.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "d0 says"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (chunks[-1].model_extra or {})["braid"]["path"] == "remote"


async def test_a_priority_goes_beside_the_body(stand: Stand) -> None:
    _, d0 = await stand.workers()
    assert (await stand.post(CHAT, chat(priority=-2))).status_code == 200
    assert (await stand.post(CHAT, chat(priority="first"))).status_code == 400
    decode = await d0.expect(wire.Decode)
    assert (decode.priority, decode.several) == (-2, False)
    assert "priority" not in msgspec.json.decode(decode.body)
    await stand.post(CHAT, chat(n=2))
    assert (await d0.expect(wire.Decode, 2)).several


async def answer_at_length(worker: FakeWorker, message: wire.Decode) -> None:
    """A reply of 40 MiB in parts that come at once."""
    said = whole(message, worker.name)
    said["choices"][0]["message"]["content"] = "x" * (40 << 20)
    data, most = msgspec.json.encode(said), 8 << 20
    parts = [wire.Body(message.ref, data[at : at + most]) for at in range(0, len(data), most)]
    head = wire.Head(message.ref, 200, (("content-type", "application/json"),), record(message))
    await worker.send(head, *parts, wire.Body(message.ref, b"", end=True, kv=record(message)))


async def test_a_long_reply_that_comes_at_once_is_no_slow_reader(stand: Stand) -> None:
    _, d0 = await stand.workers()
    d0.script = answer_at_length
    reply = await stand.post(CHAT, chat())
    assert reply.status_code == 200
    assert len(reply.json()["choices"][0]["message"]["content"]) == 40 << 20
