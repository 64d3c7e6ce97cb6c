"""Spans of requests, as a collector receives them."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from braid import wire
from braid.cli import UsageError, parse
from braid.settings import RouterSettings
from router import tracing
from tests.router.collector import Collector, Span, collecting
from tests.router.conftest import CHAT, LONG_S, MakeStand, Stand, chat
from tests.router.fake_worker import (
    JSON_HEADERS,
    FakeWorker,
    answer_at_gate,
    answer_decode,
    decode_fails,
    group_done,
    prefill_fails,
    sample,
    silent,
    stream_until_gate,
    whole,
)
from tests.router.test_cancel import connected

pytestmark = pytest.mark.slow

GROUP = {"x-braid-group": "ours"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
RECORD = wire.KvRecord(
    "remote", 1, 4096, 3, 2, "", 0.25, 0.5, 0.125, scatter_s=0.0625, transport="shm", retries=1
)


@pytest.fixture(autouse=True)
def no_exporter_is_left() -> Iterator[None]:
    """One that tries again draws from `random`, which a later test's Hypothesis does not forgive."""
    yield
    for thread in threading.enumerate():
        if thread.name.lower().startswith("otel"):
            thread.join(LONG_S)
            assert not thread.is_alive(), thread.name


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector; spans come within milliseconds of their end."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with collecting() as found:
        yield found


@pytest.fixture
async def stand(make_stand: MakeStand, collector: Collector) -> Stand:
    return await make_stand(otlp_traces_endpoint=collector.url, spread="spread")


async def computes(worker: FakeWorker, message: wire.Prefill) -> None:
    await worker.send(wire.PrefillDone(message.ref, 200, b"", 7, 4, 0.75))


def prefills_answered(stand: Stand) -> Callable[[], bool]:
    """Whether the router has heard the end of every prefill; what decode workers say is heard after it."""
    return lambda: not any(w.inflight for w in stand.app.registry.all() if w.hello.role == "prefill")


async def answers_with_a_record(worker: FakeWorker, message: wire.Decode) -> None:
    body = msgspec.json.encode(whole(message, worker.name))
    head = wire.Head(message.ref, 200, JSON_HEADERS, wire.KvRecord("remote"))
    await worker.send(head, wire.Body(message.ref, body, end=True, kv=RECORD))


def parent_sent(decode: wire.Decode) -> tuple[str, str]:
    """Trace and span that a decode worker was told of."""
    (header,) = [value for key, value in decode.headers if key == "traceparent"]
    _, trace, span, _ = header.split("-")
    return trace, span


async def test_a_group_on_two_workers(stand: Stand, collector: Collector) -> None:
    async def after_the_prefill(worker: FakeWorker, message: wire.Decode) -> None:
        await stand.until(prefills_answered(stand))
        await answers_with_a_record(worker, message)

    _, d0, d1 = await stand.workers(prefill=computes, decode=after_the_prefill, decoders=2)
    reply = await stand.http.post(CHAT, json=chat(n=5), headers={"x-request-id": "mine", **GROUP})
    assert reply.status_code == 200
    root = await collector.request()
    assert (root.name, root.parent, root.failed) == ("POST /v1/chat/completions", "", False)
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "demo",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 10,
        "braid.request_id": "mine",
        "braid.group": "ours",
        "braid.n": 5,
    }
    (prefill,) = collector.below(root, "prefill")
    assert prefill.attributes == {
        "braid.group": "ours",
        "braid.worker": "p0",
        "braid.attempt": 1,
        "braid.status": 200,
        "braid.prompt_tokens": 7,
        "braid.cached_tokens": 4,
        "braid.compute_s": 0.75,
    }
    decodes = collector.below(root, "decode")
    assert [d.attributes for d in decodes] == [
        {
            "braid.group": "ours",
            "braid.worker": worker,
            "braid.first": first,
            "braid.n": n,
            "braid.moved": False,
            "braid.status": 200,
        }
        for worker, first, n in (("d0", 0, 3), ("d1", 3, 2))
    ]
    assert len(collector.below(root)) == 3
    assert {span.trace for span in collector.spans} == {root.trace}
    assert collector.services == {"braid-router"}
    for decode, worker in zip(decodes, (d0, d1), strict=True):
        assert root.start <= decode.start <= decode.end <= root.end
        assert parent_sent(await worker.expect(wire.Decode)) == (root.trace, decode.id)


async def test_a_transfer_has_its_record_and_is_timed_from_the_dispatch(
    stand: Stand, collector: Collector
) -> None:
    await stand.workers(decode=answers_with_a_record)
    await stand.http.post(CHAT, json=chat(), headers=GROUP)
    (decode,) = collector.below(await collector.request(), "decode")
    (transfer,) = collector.below(decode)
    assert transfer.name == "kv_transfer"
    assert transfer.attributes == {"braid.group": "ours"} | {
        f"braid.kv.{name}": getattr(RECORD, name) for name in RECORD.__struct_fields__
    }
    assert (transfer.start - decode.start, transfer.end - decode.start) == (0, 875_000_000)


async def test_a_failed_prefill_and_the_one_that_replaces_it(stand: Stand, collector: Collector) -> None:
    async def once_replaced(worker: FakeWorker, message: wire.Decode) -> None:
        assert (await worker.expect(wire.Lost)).ticket is not None
        await answer_decode(worker, message)

    await stand.workers(prefill=prefill_fails(500), decode=once_replaced)
    await stand.worker("prefill", "p1", computes)
    await stand.until(lambda: all(pair["verified"] for pair in stand.app.pairs.state()))
    assert (await stand.http.post(CHAT, json=chat(), headers=GROUP)).status_code == 200
    root = await collector.request()
    first, second = collector.below(root, "prefill")
    assert first.failed
    assert first.attributes == {
        "braid.group": "ours",
        "braid.worker": "p0",
        "braid.attempt": 1,
        "braid.status": 500,
        "error.type": "status_500",
    }
    assert not second.failed
    assert (second.attributes["braid.worker"], second.attributes["braid.attempt"]) == ("p1", 2)
    assert not root.failed


async def test_a_prefill_that_takes_too_long(make_stand: MakeStand, collector: Collector) -> None:
    stand = await make_stand(otlp_traces_endpoint=collector.url, prefill_timeout_s=0.1)
    _, d0 = await stand.workers(prefill=silent, decode=answer_at_gate)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    await d0.expect(wire.Lost)
    d0.gate.set()
    await request
    (prefill,) = collector.below(await collector.request(), "prefill")
    assert (prefill.failed, prefill.attributes["error.type"]) == (True, "prefill_timeout")


async def test_a_moved_share(stand: Stand, collector: Collector) -> None:
    await stand.workers(decode=decode_fails(503))
    d1 = await stand.worker("decode", "d1")
    await stand.post(CHAT, chat())
    root = await collector.request()
    left, moved = collector.below(root, "decode")
    assert (left.failed, left.attributes["error.type"]) == (True, "busy")
    assert (left.attributes["braid.worker"], left.attributes["braid.moved"]) == ("d0", False)
    assert (moved.failed, moved.attributes["braid.worker"]) == (False, "d1")
    assert moved.attributes["braid.moved"] is True
    assert parent_sent(await d1.expect(wire.Decode)) == (root.trace, moved.id)
    assert collector.below(left) == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_every_span(stand: Stand, collector: Collector, stream: bool) -> None:
    _, d0 = await stand.workers(prefill=silent, decode=silent)
    async with connected(stand, chat(stream=stream)):
        await d0.expect(wire.Decode)
    root = await collector.request()
    assert root.attributes["error.type"] == "client_gone"
    assert root.attributes["braid.cancelled"] is True
    assert "http.response.status_code" not in root.attributes
    assert not root.failed
    ended = {span.name: span.attributes.get("braid.cancelled") for span in collector.below(root)}
    assert ended == {"prefill": True, "decode": True}


async def test_a_client_that_leaves_mid_stream_leaves_the_record(stand: Stand, collector: Collector) -> None:
    await stand.workers(decode=stream_until_gate)
    async with connected(stand, chat(stream=True)) as reader:
        await reader.readuntil(b"d0 ")
    root = await collector.request()
    assert root.attributes["http.response.status_code"] == 200
    (decode,) = collector.below(root, "decode")
    assert decode.attributes["braid.cancelled"] is True
    assert [span.attributes["braid.kv.nbytes"] for span in collector.below(decode)] == [1000]


def unreadable(_: FakeWorker) -> dict[str, Any]:
    return {"body": chat(n=0), "status": 400, "error": "bad_request", "failed": False}


def refused(worker: FakeWorker) -> dict[str, Any]:
    worker.script = decode_fails(400)
    return {"body": chat(), "status": 400, "error": "400", "failed": False}


def broken(worker: FakeWorker) -> dict[str, Any]:
    async def garbage(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.send(wire.Head(message.ref, 200, ()), wire.Body(message.ref, b"no", end=True))

    worker.script = garbage
    return {"body": chat(), "status": 502, "error": "upstream_failed", "failed": True}


@pytest.mark.parametrize("case", [unreadable, refused, broken])
async def test_an_error_is_the_services_from_500_on(
    stand: Stand, collector: Collector, case: Callable[[FakeWorker], dict[str, Any]]
) -> None:
    _, d0 = await stand.workers()
    wanted = case(d0)
    assert (await stand.post(CHAT, wanted["body"])).status_code == wanted["status"]
    root = await collector.request()
    assert root.attributes["http.response.status_code"] == wanted["status"]
    assert (root.attributes["error.type"], root.failed) == (wanted["error"], wanted["failed"])


async def test_a_stream_that_is_cut_is_a_failure_of_the_service(stand: Stand, collector: Collector) -> None:
    async def cut(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.send(wire.Head(message.ref, 200, (("content-type", "text/event-stream"),)))
        await worker.send(wire.Body(message.ref, b"", end=True, cut="engine died"))

    await stand.workers(decode=cut)
    await stand.post(CHAT, chat(stream=True))
    root = await collector.request()
    (decode,) = collector.below(root, "decode")
    assert (root.failed, root.attributes["error.type"]) == (True, "upstream_failed")
    assert (decode.failed, decode.attributes["error.type"]) == (True, "cut")


async def test_the_usage_of_a_stream(stand: Stand, collector: Collector) -> None:
    await stand.workers(decoders=2)
    await stand.post(CHAT, chat(n=3, stream=True, stream_options={"include_usage": True}))
    root = await collector.request()
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["gen_ai.usage.output_tokens"] == 6


async def test_a_stream_that_tells_no_usage_has_the_prefills(stand: Stand, collector: Collector) -> None:
    p0, d0 = await stand.workers(decode=answer_at_gate)
    reply = asyncio.create_task(stand.post(CHAT, chat(stream=True)))
    await p0.expect(wire.Prefill)
    await stand.until(lambda: len(stand.app.link.open_refs()) == 1)  # the prefill has answered
    d0.gate.set()
    await reply
    root = await collector.request()
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert "gen_ai.usage.output_tokens" not in root.attributes


async def test_a_strategys_groups_have_spans_of_their_own(stand: Stand, collector: Collector) -> None:
    async def undecided(worker: FakeWorker, message: wire.Decode) -> None:
        n = msgspec.json.decode(message.body)["n"]
        for index in range(message.first, message.first + n):
            await worker.send(sample(message, index, f"The answer is {index}."))
        await worker.send(group_done(message, n))

    await stand.workers(decode=undecided, decoders=2)
    strategy = {"strategy": "adaptive_consistency", "n": 4, "wave": 2}
    reply = await stand.http.post(CHAT, json=chat(reasoning=strategy), headers=GROUP)
    assert reply.status_code == 200
    root = await collector.request()
    assert (root.attributes["braid.strategy"], root.attributes["braid.n"]) == ("adaptive_consistency", 4)
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["gen_ai.usage.output_tokens"] == 20
    assert root.attributes["gen_ai.usage.cache_read.input_tokens"] == 4
    request_id = root.attributes["braid.request_id"]
    groups = collector.below(root)
    assert [(group.name, group.attributes) for group in groups] == [
        (
            "group",
            {
                "braid.group": "ours",
                "braid.request_id": name,
                "braid.n": 2,
                "braid.first": first,
                "braid.prompt_tokens": 7,
                "braid.cached_tokens": 4,
                "braid.completion_tokens": 10,
            },
        )
        for name, first in ((request_id, 0), (f"{request_id}-1", 2))
    ]
    for group in groups:
        assert len(collector.below(group, "prefill")) == 1
        shares = collector.below(group, "decode")
        first = group.attributes["braid.first"]
        assert sorted(share.attributes["braid.first"] for share in shares) == [first, first + 1]
        assert [share.attributes["braid.completion_tokens"] for share in shares] == [5, 5]
        assert all(len(collector.below(share, "kv_transfer")) == 1 for share in shares)


async def test_a_group_whose_worker_is_lost_says_so(stand: Stand, collector: Collector) -> None:
    _, d0 = await stand.workers(decode=silent)
    request = asyncio.create_task(stand.post(CHAT, chat(reasoning={"strategy": "direct", "deadline_s": 60})))
    await d0.expect(wire.Decode)
    await d0.die()
    assert (await request).status_code == 503
    (group,) = collector.below(await collector.request(), "group")
    (decode,) = collector.below(group, "decode")
    assert decode.attributes["error.type"] == group.attributes["error.type"] == "unavailable"


async def test_a_group_that_finds_no_worker_says_so(stand: Stand, collector: Collector) -> None:
    async def drains(worker: FakeWorker, message: wire.Decode) -> None:
        for index in range(2):
            await worker.send(sample(message, index, f"The answer is {index}."))
        await worker.send(wire.Bye(), group_done(message, 2))

    await stand.workers(decode=drains)
    await stand.post(CHAT, chat(reasoning={"strategy": "adaptive_consistency", "n": 4, "wave": 2}))
    first, second = collector.below(await collector.request())
    assert "error.type" not in first.attributes
    assert (second.failed, second.attributes["error.type"]) == (True, "unavailable")
    assert collector.below(second) == []


def with_parent(value: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("traceparent", value), *more]


async def test_the_clients_span_is_the_parent_and_its_state_goes_on(
    stand: Stand, collector: Collector
) -> None:
    _, d0 = await stand.workers()
    headers = with_parent(f"00-{TRACE}-{PARENT}-01", ("tracestate", "a=1"), ("tracestate", "b=2"))
    await stand.http.post(CHAT, json=chat(), headers=headers)
    root = await collector.request()
    assert (root.trace, root.parent) == (TRACE, PARENT)
    sent = await d0.expect(wire.Decode)
    (decode,) = collector.below(root, "decode")
    assert parent_sent(sent) == (TRACE, decode.id)
    assert [value for key, value in sent.headers if key == "tracestate"] == ["a=1,b=2"]


@pytest.mark.parametrize(
    "headers",
    [
        with_parent("00-zz-1-01"),
        with_parent(f"00-{TRACE}-{'0' * 16}-01"),
        with_parent(f"00-{TRACE}-{PARENT}-01", ("traceparent", f"00-{TRACE}-{PARENT}-01")),
    ],
    ids=["malformed", "zero", "two"],
)
async def test_a_parent_that_can_not_be_read_begins_a_new_trace(
    stand: Stand, collector: Collector, headers: list[tuple[str, str]]
) -> None:
    _, d0 = await stand.workers()
    reply = await stand.http.post(CHAT, json=chat(), headers=headers)
    assert reply.status_code == 200
    root = await collector.request()
    assert root.parent == ""
    assert root.trace != TRACE
    assert parent_sent(await d0.expect(wire.Decode))[0] == root.trace


async def test_what_the_client_does_not_sample_is_not_sent(stand: Stand, collector: Collector) -> None:
    _, d0 = await stand.workers()
    await stand.http.post(CHAT, json=chat(), headers=with_parent(f"00-{TRACE}-{PARENT}-00"))
    await stand.post(CHAT, chat())
    assert (await collector.request()).trace != TRACE
    sent = dict((await d0.expect(wire.Decode)).headers)["traceparent"]
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-0[02]", sent)


async def test_the_log_line_of_a_request_has_its_trace(
    stand: Stand, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    await stand.workers()
    with caplog.at_level(logging.INFO, "braid.router"):
        await stand.post(CHAT, chat())
        root = await collector.request()
    (line,) = [record for record in caplog.records if record.getMessage() == "request"]
    assert vars(line)["trace_id"] == root.trace
    assert vars(line)["request_id"] == root.attributes["braid.request_id"]


async def test_questions_about_the_router_have_no_spans(stand: Stand, collector: Collector) -> None:
    await stand.workers()
    for path in ("/health", "/ready", "/metrics", "/cluster", "/v1/models", CHAT, "/nothing"):
        await stand.http.get(path)
    await stand.post("/nothing", {})
    await stand.post("/tokenize", {"prompt": "hi"})
    assert (await collector.request()).name == "POST /tokenize"
    assert {span.name for span in collector.spans} == {"POST /tokenize", "decode", "kv_transfer"}


@pytest.mark.parametrize("suffix", ["TRACES_ENDPOINT", "ENDPOINT"])
async def test_opentelemetrys_own_variables_turn_it_on(
    make_stand: MakeStand, collector: Collector, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    url = collector.url if suffix == "TRACES_ENDPOINT" else collector.url.removesuffix("/v1/traces")
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{suffix}", url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
    stand = await make_stand()
    await stand.workers()
    await stand.post(CHAT, chat())
    root: Span = await collector.request()
    assert root.name == "POST /v1/chat/completions"
    assert collector.services == {"front"}


async def test_what_is_left_is_sent_when_the_router_stops(
    make_stand: MakeStand, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    stand = await make_stand(otlp_traces_endpoint=collector.url)
    await stand.workers()
    await stand.post(CHAT, chat())
    assert collector.spans == []
    await stand.app.stop()
    await collector.request()


async def test_a_collector_that_does_not_answer_harms_no_request_and_holds_no_stop(
    make_stand: MakeStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.otel.FLUSH_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "3")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/v1/traces"
        stand = await make_stand(otlp_traces_endpoint=url)
        await stand.workers()
        for _ in range(3):
            assert (await stand.post(CHAT, chat())).status_code == 200
        begun = time.monotonic()
        await stand.app.tracer.stop()
        assert 0.1 < time.monotonic() - begun < 2.9  # the exporter tries for 3 s


async def test_without_an_endpoint_a_clients_context_passes_through(make_stand: MakeStand) -> None:
    stand = await make_stand()
    _, d0 = await stand.workers()
    header = f"00-{TRACE}-{PARENT}-01"
    await stand.http.post(CHAT, json=chat(), headers={"traceparent": header})
    assert dict((await d0.expect(wire.Decode)).headers)["traceparent"] == header
    assert type(stand.app.tracer) is tracing.Tracer


OFF_PROGRAM = """
import sys
from braid.settings import RouterSettings
from router.app import App
App(RouterSettings())
print(*[name for name in sys.modules if name.startswith(("opentelemetry", "google.protobuf", "requests"))])
"""


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    command = [sys.executable, "-c", OFF_PROGRAM]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


WITHOUT_PACKAGE = """
import sys
from braid.cli import main
sys.modules["opentelemetry"] = None
sys.exit(main(["router", "--port", "0", "--link", "tcp://127.0.0.1:*", "--otlp-traces-endpoint", "http://127.0.0.1:1"]))
"""


def test_an_endpoint_without_the_package_says_what_to_install() -> None:
    command = [sys.executable, "-c", WITHOUT_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "install the extra `tracing`" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_endpoint_is_a_setting_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse(["router", "--otlp-traces-endpoint", "https://collector/v1/traces"]).settings
    assert isinstance(given, RouterSettings)
    assert given.otlp_traces_endpoint == "https://collector/v1/traces"
    monkeypatch.setenv("BRAID_OTLP_TRACES_ENDPOINT", "collector:4317")
    with pytest.raises(UsageError, match="BRAID_OTLP_TRACES_ENDPOINT"):
        parse(["router"])
