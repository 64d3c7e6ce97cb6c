"""Load on a running server: streamed requests in a closed loop, timed as their client sees them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import stats
from benchmarks.client import proof_headers
from braid.lines import alines

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

CONNECT_S = 5.0
REPLY_S = 600.0
COUNTERS = ("braid_kv_bytes_total", "braid_kv_transfers_total", "braid_path_total", "braid_requests_total")
_PATH = re.compile(r'path="([^"]*)"')


class ServerError(RuntimeError):
    """There is no server to measure, or it is not ready; the message says what to do."""


@dataclass(slots=True)
class Stream:
    """One streamed request; times in seconds from before it was written.

    Attributes:
        first_event_s: until the first event of any kind, which of a strategy may be its progress.
        first_text_s: until the first text of any sample: the time to first token.
        gaps_s: from one text to the next of the same sample, over all samples (inter-token latency).
        headers: the ``x-braid-*`` headers, known when the first bytes were sent.
        proof: the ``braid`` object of the stream's end, the final truth per decode worker.
        error: why there is no complete reply, empty if there is one.
    """

    first_event_s: float | None = None
    first_text_s: float | None = None
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def path(self) -> str:
        """How the KV came, as the end of the stream tells it, or else its headers."""
        return str(self.proof.get("path") or self.headers.get("x-braid-path") or "unknown")

    def kv(self, name: str) -> int:
        """Its KV ``bytes`` or ``transfers``, as the end of the stream or else the headers tell."""
        told = self.proof.get(f"kv_{name}", self.headers.get(f"x-braid-kv-{name}", 0))
        return int(told)


def open_client(url: str, concurrency: int) -> httpx.AsyncClient:
    """A client without proxies or compression. It sends ``OPENAI_API_KEY`` where that is set."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        trust_env=False,
        timeout=httpx.Timeout(REPLY_S, connect=CONNECT_S),
        limits=httpx.Limits(
            max_connections=concurrency + 1,
            max_keepalive_connections=concurrency + 1,
            keepalive_expiry=2.0,  # before the server closes one: a request sent just then would be lost
        ),
    )


async def served_model(client: httpx.AsyncClient) -> Mapping[str, Any]:
    """The first entry of the server's ``/v1/models``.

    Raises:
        ServerError: nothing listens, it is not ready, or it refuses the key.
    """
    try:
        ready = await client.get("/ready", timeout=CONNECT_S)
        models = await client.get("/v1/models", timeout=CONNECT_S)
    except httpx.HTTPError:
        raise ServerError(
            f"no server answers at {client.base_url}: start one with `make up`, or name it with --url"
        ) from None
    if ready.status_code != httpx.codes.OK:
        raise ServerError(
            f"the server at {client.base_url} is not ready (HTTP {ready.status_code} of /ready)"
        )
    if models.status_code == httpx.codes.UNAUTHORIZED:
        raise ServerError("the server asks for an API key: set OPENAI_API_KEY")
    listed = models.json().get("data") if models.is_success else None
    if not listed:
        raise ServerError(f"the server at {client.base_url} lists no model")
    model: Mapping[str, Any] = listed[0]
    return model


async def closed_loop(
    jobs: Iterable[_Job], concurrency: int, work: Callable[[_Job], Awaitable[_Result]]
) -> list[_Result]:
    """Results in the order of ``jobs``; each of ``concurrency`` clients starts its next when one ends."""
    waiting = enumerate(jobs)
    results: dict[int, _Result] = {}

    async def client() -> None:
        for number, job in waiting:
            results[number] = await work(job)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return [results[number] for number in sorted(results)]


async def stream(client: httpx.AsyncClient, target: str, body: Mapping[str, Any]) -> Stream:
    """Send one request as a stream and time it; a failure is a result, not an exception."""
    reply = Stream()
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    try:
        async with client.stream("POST", target, json=sent) as response:
            reply.headers = proof_headers(response.headers)
            if response.is_error:
                await response.aread()
                reply.error = f"HTTP {response.status_code}"
            else:
                await _read(alines(response.aiter_bytes()), reply, start)
    except httpx.HTTPError as error:
        reply.error = type(error).__name__
    except (ValueError, TypeError, AttributeError):
        reply.error = "an event is not a chunk"
    reply.total_s = time.perf_counter() - start
    return reply


async def _read(lines: AsyncIterator[str], reply: Stream, start: float) -> None:
    """Time the events of a stream, up to its ``[DONE]``."""
    latest: dict[int, float] = {}
    async for line in lines:
        if not line.startswith("data:"):
            continue
        now = time.perf_counter() - start
        data = line[5:].strip()
        if data == "[DONE]":
            return
        if reply.first_event_s is None:
            reply.first_event_s = now
        _take(json.loads(data), reply, now, latest)
    reply.error = reply.error or "the stream was cut"


def _take(event: Mapping[str, Any], reply: Stream, now: float, latest: dict[int, float]) -> None:
    """Add one event to its reply; ``latest`` is when each sample last had text."""
    if event.get("error"):
        reply.error = str(event["error"].get("type") or "error")
    if proof := event.get("braid"):
        reply.proof = dict(proof)
    if usage := event.get("usage"):
        reply.prompt_tokens = usage.get("prompt_tokens", 0)
        reply.completion_tokens = usage.get("completion_tokens", 0)
    for choice in event.get("choices") or ():
        if not _text(choice):
            continue
        index = choice.get("index", 0)
        if reply.first_text_s is None:
            reply.first_text_s = now
        if index in latest:
            reply.gaps_s.append(now - latest[index])
        latest[index] = now


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or "")


async def counters(client: httpx.AsyncClient) -> dict[str, float]:
    """The router's own counters of what it served, by name and labels; empty where it has no ``/metrics``."""
    try:
        page = await client.get("/metrics", timeout=CONNECT_S)
    except httpx.HTTPError:
        return {}
    if not page.is_success:
        return {}
    samples = (s for family in text_string_to_metric_families(page.text) for s in family.samples)
    return {_series(s.name, s.labels): s.value for s in samples if s.name in COUNTERS}


def _series(name: str, labels: Mapping[str, str]) -> str:
    text = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{text}}}" if text else name


def counted_paths(counted: Mapping[str, float]) -> dict[str, int]:
    """Prompts by path, from the growth of ``braid_path_total``."""
    paths: Counter[str] = Counter()
    for series, grown in counted.items():
        if series.startswith("braid_path_total{") and (match := _PATH.search(series)):
            paths[match[1]] += int(grown)
    return dict(paths)


def milliseconds(values: Iterable[float | None]) -> dict[str, Any]:
    """The summary of times in milliseconds, with the 99th percentile."""
    ranked = sorted(value * 1000 for value in values if value is not None)
    p99 = stats.percentile(ranked, 0.99) if ranked else None
    return {**stats.summary(ranked), "p99": p99}


def summarise(replies: list[Stream], wall_s: float, counted: Mapping[str, float]) -> dict[str, Any]:
    """Figures of one load: complete replies only, with the failed ones counted by reason.

    ``kv_bytes``, ``kv_transfers`` and ``paths`` are what the replies tell of themselves; ``counted`` is what
    the router's own counters grew by meanwhile, other clients included.
    """
    complete = [reply for reply in replies if not reply.error]
    tokens = sum(reply.completion_tokens for reply in complete)
    return {
        "requests": len(replies),
        "failed": dict(Counter(reply.error for reply in replies if reply.error)),
        "wall_s": wall_s,
        "ttft_ms": milliseconds(reply.first_text_s for reply in complete),
        "itl_ms": milliseconds(gap for reply in complete for gap in reply.gaps_s),
        "total_ms": milliseconds(reply.total_s for reply in complete),
        "completion_tokens": tokens,
        "tokens_per_s": tokens / wall_s if wall_s else 0.0,
        "requests_per_s": len(complete) / wall_s if wall_s else 0.0,
        "prompt_tokens": stats.summary([reply.prompt_tokens for reply in complete]),
        "kv_bytes": sum(reply.kv("bytes") for reply in complete),
        "kv_transfers": sum(reply.kv("transfers") for reply in complete),
        "paths": dict(Counter(reply.path for reply in complete)),
        "counters": dict(counted),
    }
