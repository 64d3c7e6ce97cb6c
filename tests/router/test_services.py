"""Calls of the operator's services: every way they can go wrong, against a real server on loopback."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from braid.errors import BadRequest
from braid.services import HttpService
from router.metrics import Metrics
from router.services import Service, ServiceFailed, named
from tests.router.web import Answer, Web, always, http, never

pytestmark = pytest.mark.slow


class Told(msgspec.Struct):
    score: float


class Bench:
    """A service and the server behind it."""

    def __init__(self, web: Web, service: Service, metrics: Metrics) -> None:
        self.web = web
        self.service = service
        self.metrics = metrics

    async def call(self, payload: Any = None, **more: Any) -> Told:
        return await self.service.call({"x": 1} if payload is None else payload, Told, **more)

    def counted(self, outcome: str) -> float:
        labels = {"service": "judge", "outcome": outcome}
        return self.metrics.registry.get_sample_value("braid_service_calls_total", labels) or 0.0


Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def made(answer: Answer, **settings: Any) -> Bench:
            web, metrics = await stack.enter_async_context(Web(answer)), Metrics()
            service = Service("judge", HttpService(url=settings.pop("url", web.url), **settings), metrics)
            stack.push_async_callback(service.aclose)
            return Bench(web, service, metrics)

        yield made


async def test_a_call_brings_what_the_service_replies(make: Make) -> None:
    bench = await make(always(http({"score": 0.5, "more": [1]})))
    assert (await bench.call({"answer": "é"})).score == 0.5
    [asked] = bench.web.asked
    assert (asked.line, asked.payload) == ("POST /check HTTP/1.1", {"answer": "é"})
    assert asked.headers["content-type"] == "application/json"
    assert "authorization" not in asked.headers
    assert bench.counted("ok") == 1


async def test_the_token_comes_from_the_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    bench = await make(always(http({"score": 1})), bearer_env="JUDGE_TOKEN")
    await bench.call()
    assert bench.web.asked[0].headers["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("value", [None, "", " ", "a\nb", "schlüssel"])
def test_a_token_that_is_missing_or_none_keeps_the_router_from_starting(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(ValueError, match="JUDGE_TOKEN"):
        Service("judge", HttpService(url="http://127.0.0.1:1/", bearer_env="JUDGE_TOKEN"), Metrics())


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (http("<html>"), "malformed"),
        (http(""), "malformed"),
        (http('{"score": NaN}'), "malformed"),
        (http({"score": "0.5"}), "malformed"),
        (http({"scores": 0.5}), "malformed"),
        (http([0.5]), "malformed"),
        (http(b'{"score": "\xff"}'), "malformed"),
        (http('{"score": 1, "x": ' + DEEP + "}"), "malformed"),
        (http(gzip.compress(b'{"score": 1}'), content_encoding="gzip"), "malformed"),
        (http({"score": 1}, 500), "status"),
        (http({"score": 1}, 404), "status"),
        (http({"score": 1}, 204), "status"),
        (http({"score": 1}, 302, location="http://127.0.0.1:1/"), "redirect"),
        (http({"score": 1}, 307, location="http://127.0.0.1:1/"), "redirect"),
        (b"SSH-2.0-x\r\n\r\n", "unreachable"),
        (http({"score": 1})[:-3], "timeout"),
        (None, "unreachable"),
    ],
)
async def test_a_useless_reply_is_a_failure_with_its_reason(
    make: Make, reply: bytes | None, reason: str
) -> None:
    bench = await make(always(reply), timeout_s=0.3 if reason == "timeout" else 30)
    with pytest.raises(ServiceFailed) as caught:
        await bench.call()
    assert (caught.value.reason, bench.counted(reason)) == (reason, 1)


async def test_a_redirect_is_not_followed(make: Make) -> None:
    other = await make(always(http({"score": 1})))
    bench = await make(always(http("", 307, location=other.web.url)))
    with pytest.raises(ServiceFailed, match="redirect"):
        await bench.call()
    assert other.web.asked == []


async def test_a_proxy_of_the_environment_is_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    bench = await make(always(http({"score": 1})))
    assert (await bench.call()).score == 1


async def test_a_huge_reply_is_cut_off(make: Make) -> None:
    bench = await make(always(http(b" " * 3_000_000 + b'{"score": 1}')), max_response_bytes=1000)
    with pytest.raises(ServiceFailed, match="too_large"):
        await bench.call()


async def test_a_reply_of_unknown_length_is_bounded_too(make: Make) -> None:
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    endless = b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 5000
    bench = await make(always(endless), max_response_bytes=10_000)
    with pytest.raises(ServiceFailed, match="too_large"):
        await bench.call()


async def test_a_reply_of_just_the_size_is_taken(make: Make) -> None:
    body = json.dumps({"score": 1}).encode()
    bench = await make(always(http(body)), max_response_bytes=len(body))
    assert (await bench.call()).score == 1


@pytest.mark.parametrize("more", [{"limit_s": 0.05}, {"limit_s": 0.0}, {}])
async def test_silence_ends_at_the_earlier_of_both_limits(make: Make, more: dict[str, float]) -> None:
    bench = await make(never, timeout_s=60 if more else 0.05)
    async with asyncio.timeout(60):
        with pytest.raises(ServiceFailed, match="timeout"):
            await bench.call(**more)


async def test_nobody_listens(make: Make) -> None:
    bench = await make(never, url="http://127.0.0.1:1/")
    with pytest.raises(ServiceFailed, match="unreachable"):
        await bench.call()


@pytest.mark.slow
async def test_only_so_many_calls_run_at_once_and_waiting_is_not_their_time(make: Make) -> None:
    async def slowly(payload: Any) -> bytes:
        await asyncio.sleep(0.25)
        return http({"score": 1})

    bench = await make(slowly, concurrency=2, timeout_s=1.0)
    told = await asyncio.gather(*(bench.call() for _ in range(9)))
    assert (len(told), bench.web.most_running) == (9, 2)


async def test_a_call_that_is_given_up_lets_the_next_one_in(make: Make) -> None:
    bench = await make(never, concurrency=1)
    task = asyncio.create_task(bench.call())
    async with asyncio.timeout(60):
        while not bench.web.asked:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ServiceFailed, match="timeout"):
            await bench.call(limit_s=0.5)
    assert (bench.counted("cancelled"), len(bench.web.asked)) == (1, 2)


def test_an_unknown_name_is_refused_with_the_list() -> None:
    assert named({"a": 1}, "a", "verifier", "p") == 1
    with pytest.raises(BadRequest, match="there are a, b") as caught:
        named({"a": 1, "b": 2}, "c", "verifier", "reasoning.verifier")
    assert (caught.value.param, caught.value.code) == ("reasoning.verifier", "verifier")
    with pytest.raises(BadRequest, match="this router has none"):
        named({}, "c", "retriever", "p")
