"""Keys, admission, pass-through and the router's own pages."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import msgspec
import pytest

from braid import wire
from router.auth import Keys
from tests.router.conftest import CHAT, LONG_S, MakeStand, Stand, chat
from tests.router.fake_worker import REMOTE, FakeWorker, answer_at_gate, decode_fails, silent


@pytest.fixture
async def locked(make_stand: MakeStand, tmp_path: Path) -> Stand:
    """A router with two API keys."""
    file = tmp_path / "keys"
    file.write_text("# team\nalpha\n\nbeta\n")
    return await make_stand(api_keys_file=file)


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer gamma", "Basic alpha", "alpha", "Bearer # team"])
async def test_a_missing_or_wrong_key_is_a_401(locked: Stand, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    for path in (
        "/v1/models",
        "/v1/strategies",
        "/metrics",
        "/cluster",
        "/v1/nothing",
        "/v1/models?api_key=a",
    ):
        reply = await locked.http.get(path, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_each_key_opens_and_health_needs_none(locked: Stand) -> None:
    for key in ("alpha", "beta"):
        reply = await locked.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 200
    assert (await locked.http.get("/health")).status_code == 200
    assert (await locked.http.get("/ready")).status_code == 503


async def test_tenants_do_not_share_a_cache(locked: Stand) -> None:
    _, d0 = await locked.workers()
    for key in ("alpha", "beta", "alpha"):
        reply = await locked.http.post(CHAT, json=chat(), headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 200
    salts = [msgspec.json.decode(m.body)["cache_salt"] for m in d0.got(wire.Decode)]
    assert salts[0] == salts[2] != salts[1]
    assert "authorization" not in dict(d0.got(wire.Decode)[0].headers)


def test_a_file_without_keys_does_not_open_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ValueError, match="no API key"):
        Keys(tmp_path / "keys")


async def test_a_full_queue_refuses_at_once(make_stand: MakeStand) -> None:
    stand = await make_stand(max_inflight=4, queue_limit=1, queue_timeout_s=10 * LONG_S)
    _, d0 = await stand.workers(decode=answer_at_gate)
    running = asyncio.create_task(stand.post(CHAT, chat(n=4)))
    await d0.expect(wire.Decode)
    waiting = asyncio.create_task(stand.post(CHAT, chat(n=4)))
    await stand.until(lambda: stand.metric("braid_queue_depth") == 1)
    reply = await stand.post(CHAT, chat(n=2))  # the client would not wait for a turn as long
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    d0.gate.set()
    assert [(await r).status_code for r in (running, waiting)] == [200, 200]


async def test_a_turn_that_does_not_come_in_time_is_a_429(make_stand: MakeStand) -> None:
    stand = await make_stand(max_inflight=1, queue_timeout_s=0.05)
    _, d0 = await stand.workers(decode=answer_at_gate)
    running = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    assert (await stand.post(CHAT, chat())).status_code == 429
    d0.gate.set()
    assert (await running).status_code == 200


async def test_a_draining_router_refuses_new_and_ends_running_requests(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=answer_at_gate)
    running = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    drained = asyncio.create_task(stand.app.drain(LONG_S))
    await asyncio.sleep(0)
    reply = await stand.post(CHAT, chat())
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
    d0.gate.set()
    assert (await running).status_code == 200
    await drained


async def test_what_outlives_the_drain_ends_with_a_503(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=answer_at_gate)
    running = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Decode)
    await stand.app.drain(0.05)
    assert (await running).status_code == 503
    await d0.expect(wire.Cancel)


async def test_request_ids_are_taken_or_made(stand: Stand) -> None:
    _, d0 = await stand.workers()
    given = await stand.http.post(CHAT, json=chat(), headers={"x-request-id": "abc-1"})
    made = await stand.post(CHAT, chat())
    assert given.headers["x-request-id"] == "abc-1"
    assert [m.request_id for m in d0.got(wire.Decode)] == ["abc-1", made.headers["x-request-id"]]


async def test_headers_of_the_connection_and_secrets_stay_here(stand: Stand) -> None:
    async def with_headers(worker: FakeWorker, message: wire.Decode) -> None:
        sent = (
            ("connection", "close"),
            ("transfer-encoding", "chunked"),
            ("x-engine", "1"),
            ("x-braid-path", "x"),
        )
        await worker.send(
            wire.Head(message.ref, 200, sent, REMOTE), wire.Body(message.ref, b"{}", end=True, kv=REMOTE)
        )

    _, d0 = await stand.workers(decode=with_headers)
    given = {"traceparent": "00-1", "cookie": "a=b", "authorization": "Bearer x"}
    reply = await stand.http.post(CHAT, json=chat(), headers=given)
    forwarded = dict((await d0.expect(wire.Decode)).headers)
    assert forwarded["traceparent"] == "00-1"
    assert not {"cookie", "authorization", "host", "content-length"} & forwarded.keys()
    assert (reply.headers["x-engine"], reply.headers["x-braid-path"]) == ("1", "remote")
    assert "transfer-encoding" not in reply.headers


async def test_answers_do_not_wait_for_the_clients_acknowledgement(stand: Stand) -> None:
    waits = []
    for _ in range(20):
        before = time.monotonic()
        await stand.http.get("/health")
        waits.append(time.monotonic() - before)
    assert min(waits[1:]) < 0.03, "Nagle's delay is 40 ms"


async def test_models_are_those_of_decode_workers(stand: Stand) -> None:
    assert (await stand.http.get("/v1/models")).json()["data"] == []
    await stand.workers()
    (model,) = (await stand.openai().models.list()).data
    assert (model.id, model.owned_by) == ("demo", "braid")


async def test_the_cluster_page_tells_workers_and_pairs(stand: Stand) -> None:
    await stand.workers()
    state = (await stand.http.get("/cluster")).json()
    assert {w["worker"]: w["role"] for w in state["workers"]} == {"p0": "prefill", "d0": "decode"}
    assert state["pairs"][0]["verified"]
    assert state["ready"]


async def test_metrics_tell_paths_and_outcomes(stand: Stand) -> None:
    await stand.workers()
    await stand.post(CHAT, chat())
    text = (await stand.http.get("/metrics")).text
    for line in (
        'braid_requests_total{endpoint="chat",outcome="completed"} 1.0',
        'braid_path_total{path="remote",reason=""} 1.0',
        "braid_kv_bytes_total 1000.0",
        'braid_kv_blocks_total{source="moved"} 4.0',
        'braid_kv_blocks_total{source="cached"} 0.0',
        *(
            f'braid_kv_{what}_seconds_count{{transport=""}} 1.0'
            for what in ("queue", "wait", "wire", "scatter")
        ),
        'braid_workers{role="decode",state="ready"} 1.0',
        'braid_pairs{state="verified"} 1.0',
    ):
        assert line in text


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_tokenizing_passes_through_a_decode_worker(stand: Stand, path: str) -> None:
    p0, d0 = await stand.workers()
    reply = await stand.post(path, {"model": "demo", "prompt": "hi"})
    decode = await d0.expect(wire.Decode)
    assert (decode.target, decode.ticket) == (path, None)
    assert reply.status_code == 200
    assert "braid" not in reply.json()
    assert p0.got(wire.Prefill) == []


async def test_a_model_known_but_gone_is_a_503(stand: Stand) -> None:
    await stand.workers()
    other = await stand.worker("decode", "d1", models=("other",))
    await other.die()
    await stand.until(lambda: stand.app.registry.models() == ["demo"])
    assert (await stand.post(CHAT, chat(model="other"))).status_code == 503
    assert (await stand.post(CHAT, chat(model="never"))).status_code == 404


async def test_the_log_line_of_a_failed_request_says_why(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    _, decode = await stand.workers(decode=decode_fails(400))
    with caplog.at_level(logging.INFO, "braid.router"):
        assert (await stand.post(CHAT, chat())).status_code == 400
        decode.script = silent
        asked = asyncio.create_task(stand.post(CHAT, chat()))
        await decode.expect(wire.Decode, 2)
        await decode.die()
        assert (await asked).status_code == 503
    refused, failed = [vars(record) for record in caplog.records if record.getMessage() == "request"]
    assert (refused["outcome"], refused["status"]) == ("failed", 400)
    assert (failed["outcome"], failed["status"], failed["error"]) == ("failed", 503, "unavailable")
    assert failed["detail"]
