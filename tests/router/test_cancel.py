"""A client that leaves, in every phase, and one that reads slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from braid import wire
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import (
    REMOTE,
    SSE_HEADERS,
    FakeWorker,
    answer_at_gate,
    event,
    silent,
    stream_until_gate,
)


@asynccontextmanager
async def connected(stand: Stand, body: object) -> AsyncIterator[asyncio.StreamReader]:
    """A client that has sent its request and leaves with the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


async def cancelled(stand: Stand) -> None:
    await stand.until(lambda: stand.metric("braid_requests_total", endpoint="chat", outcome="cancelled") == 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_during_prefill_cancels_both(stand: Stand, stream: bool) -> None:
    p0, d0 = await stand.workers(prefill=silent, decode=silent)
    async with connected(stand, chat(stream=stream)):
        prefill, decode = await p0.expect(wire.Prefill), await d0.expect(wire.Decode)
    assert (await p0.expect(wire.Cancel)).ref == prefill.ref
    assert (await d0.expect(wire.Cancel)).ref == decode.ref
    await cancelled(stand)


async def test_leaving_between_prefills_answer_and_decodes_cancels_both(stand: Stand) -> None:
    p0, d0 = await stand.workers(decode=silent)
    async with connected(stand, chat(stream=True)):
        await d0.expect(wire.Decode)
        await stand.until(lambda: len(stand.app.link.open_refs()) == 1)
    await p0.expect(wire.Cancel)
    await d0.expect(wire.Cancel)
    await cancelled(stand)


async def test_leaving_mid_stream_cancels_decode(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=stream_until_gate)
    async with connected(stand, chat(stream=True)) as reader:
        await reader.readuntil(b"d0 ")
    await d0.expect(wire.Cancel)
    await cancelled(stand)


async def test_leaving_the_queue_frees_the_place(make_stand: MakeStand) -> None:
    stand = await make_stand(max_inflight=1, queue_limit=1)
    _, d0 = await stand.workers(decode=answer_at_gate)
    running = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    async with connected(stand, chat()):
        await stand.until(lambda: stand.metric("braid_queue_depth") == 1)
    await stand.until(lambda: stand.metric("braid_queue_depth") == 0)
    d0.gate.set()
    assert (await running).status_code == 200
    assert len(d0.got(wire.Decode)) == 1


async def test_leaving_while_sending_the_body_harms_nobody(stand: Stand) -> None:
    _, d0 = await stand.workers()
    _, writer = await asyncio.open_connection("127.0.0.1", stand.port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{{".encode())
    await writer.drain()
    writer.close()
    await stand.until(lambda: stand.metric("braid_errors_total", error="client_gone") == 1)
    assert d0.got(wire.Decode) == []
    assert (await stand.post(CHAT, chat())).status_code == 200


async def test_a_cancelled_dispatch_leaves_the_table_with_its_answer(stand: Stand) -> None:
    await stand.workers(decode=stream_until_gate)
    async with connected(stand, chat(stream=True)) as reader:
        await reader.readuntil(b"d0 ")
        assert stand.app.registry.all()[0].inflight == 1
    await stand.until(lambda: not stand.app.link.open_refs())
    assert stand.app.registry.all()[0].inflight == 0


async def test_a_slow_reader_is_cut_and_others_go_on(make_stand: MakeStand) -> None:
    async def floods(worker: FakeWorker, message: wire.Decode) -> None:
        if b'"max_tokens":1' in message.body:
            await answer_at_gate(worker, message)
        await worker.send(wire.Head(message.ref, 200, SSE_HEADERS, REMOTE))
        data = event({"choices": [{"index": 0, "delta": {"content": "x" * 100_000}}]})
        while True:
            await worker.send(wire.Body(message.ref, data))
            await asyncio.sleep(0.001)

    stand = await make_stand(write_timeout_s=0.3)
    _, d0 = await stand.workers(decode=floods)
    d0.gate.set()
    async with connected(stand, chat(stream=True)):
        await d0.expect(wire.Cancel)
        await cancelled(stand)
        assert (await stand.post(CHAT, chat(max_tokens=1))).status_code == 200
    assert stand.metric("braid_errors_total", error="slow_reader") == 1
