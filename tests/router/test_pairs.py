"""Pairs: used and ready only after a real transfer."""

from __future__ import annotations

import msgspec
import pytest

from braid import wire
from router import pairs
from router.registry import Worker
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import JSON_HEADERS, FakeWorker, answer_decode


async def test_ready_only_after_a_pair_is_verified(stand: Stand) -> None:
    assert (await stand.http.get("/ready")).status_code == 503
    await stand.worker("decode", "d0")
    assert (await stand.http.get("/ready")).status_code == 503
    await stand.workers(decoders=0)
    await stand.until(stand.app.pairs.ready)
    assert (await stand.http.get("/ready")).status_code == 200


async def test_losing_the_only_prefill_worker_keeps_the_router_ready(stand: Stand) -> None:
    p0, d0 = await stand.workers()
    await p0.die()
    await stand.until(lambda: len(stand.app.registry.all()) == 1)
    assert (await stand.http.get("/ready")).status_code == 200
    await d0.die()
    await stand.until(lambda: not stand.app.registry.all())
    assert (await stand.http.get("/ready")).status_code == 503


async def test_a_pair_of_different_fingerprints_is_never_used(stand: Stand) -> None:
    await stand.worker("prefill", "p0")
    d0 = await stand.worker("decode", "d0", fingerprint="other")
    reply = await stand.post(CHAT, chat())
    decode = await d0.expect(wire.Decode)
    assert (decode.ticket, decode.reason) == (None, "no_pair")
    assert reply.headers["x-braid-path"] == "local"
    (pair,) = stand.app.pairs.state()
    assert (pair["verified"], pair["error"]) == (False, "the fingerprints differ")
    await d0.die()
    await stand.until(lambda: not stand.app.pairs.state())


def hello(role: wire.Role, ranks: int = 1, kv_heads: int = 4, **traits: str) -> wire.Hello:
    named = tuple({"dtype": "float32", "kernels": "cpu/AVX2", **traits}.items())
    return wire.Hello(
        wire.PROTOCOL, role, role, 1, ("demo",), 100, 32, 4, str(named), "0.32.0", ("tcp://p:1",) * ranks,
        ranks, kv_heads, named,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        (hello("prefill"), hello("decode"), ""),
        (hello("prefill", 4), hello("decode", 2), ""),
        (hello("prefill", 2), hello("decode", 8), ""),
        (
            hello("prefill", kernels="cpu/AVX512"),
            hello("decode"),
            "kernels: cpu/AVX512 on prefill, cpu/AVX2 on decode",
        ),
        (hello("prefill", layout="a"), hello("decode"), "layout: a on prefill, unknown on decode"),
        (hello("prefill", 8), hello("decode", 2), "hold copies of 4 KV heads"),
        (hello("prefill", 2, 0), hello("decode", 1, 0), "can't be split by head"),
    ],
)
def test_workers_that_do_not_fit_are_refused_with_the_reason(
    prefill: wire.Hello, decode: wire.Hello, reason: str
) -> None:
    why = pairs.mismatch(prefill, decode)
    assert reason in why
    assert bool(why) == bool(reason)


def test_a_ticket_says_how_many_ranks_of_each_decode_worker_will_read() -> None:
    prefill, d0, d1 = (
        Worker(b"w", made, 0.0, 0.0) for made in (hello("prefill", 2), hello("decode"), hello("decode", 4))
    )
    ticket = pairs.make_ticket(b"t" * 16, 3, prefill, [d0, d1])
    assert (ticket.consumers, ticket.block_size, len(ticket.endpoints)) == ((1, 4), 32, 2)


def test_block_sizes_that_do_not_divide_are_refused() -> None:
    why = pairs.mismatch(hello("prefill"), msgspec.structs.replace(hello("decode"), block_size=48))
    assert why == "block sizes 32 and 48: neither is a multiple of the other"
    assert not pairs.mismatch(hello("prefill"), msgspec.structs.replace(hello("decode"), block_size=96))


async def test_a_probe_is_a_fresh_prompt_of_more_than_two_blocks(stand: Stand) -> None:
    _, d0 = await stand.workers()
    (probe,) = [m for m in d0.received if isinstance(m, wire.Decode)]
    body = msgspec.json.decode(probe.body)
    assert len(body["prompt"]) == 2 * 32 + 3
    assert (body["model"], body["max_tokens"]) == ("demo", 1)
    assert all(5 <= token < 69 for token in body["prompt"])


async def test_a_probe_that_moved_nothing_is_repeated(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BACKOFF_S", (0.01,))

    class Stubborn(FakeWorker):
        async def _run(self, message: wire.Decode) -> None:
            if len(self.received) < 5:
                record = wire.KvRecord(path="recomputed", reason="load_failed")
                head = wire.Head(message.ref, 200, JSON_HEADERS, record)
                await self.send(head, wire.Body(message.ref, b"{}", end=True, kv=record))
            else:
                await answer_decode(self, message)

    await stand.worker("prefill", "p0")
    async with Stubborn(stand.link, "decode", "d0"):
        await stand.until(lambda: stand.metric("braid_pair_probes_total", outcome="failed") >= 1)
        assert "recomputed" in stand.app.pairs.state()[0]["error"]
        await stand.until(stand.app.pairs.ready)


async def test_without_verification_a_matching_pair_is_used_at_once(make_stand: MakeStand) -> None:
    stand = await make_stand(verify_pairs=False)
    await stand.worker("prefill", "p0")
    await stand.worker("decode", "d0")
    assert (await stand.http.get("/ready")).status_code == 200
    assert (await stand.post(CHAT, chat())).headers["x-braid-path"] == "remote"


async def test_a_pair_leaves_with_its_worker(stand: Stand) -> None:
    p0, _ = await stand.workers()
    await p0.die()
    await stand.until(lambda: not stand.app.pairs.state())
    assert (await stand.http.get("/ready")).status_code == 200, "d0 computes prompts itself"
