"""What the commands that talk to a running server share: flags, connection, retries, a closed loop."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from braid.ask import printable

URL = "http://127.0.0.1:8000"
CONNECT_S = 5.0
EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130
RETRIED = frozenset({429, 502, 503})
"""Statuses that say nothing about the request: asking again may answer it."""

_Job = TypeVar("_Job")


class CommandFailed(Exception):
    """The command can't go on; the message says what to do, ``exit_code`` how it ends."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how long a request waits to be asked again.

    The k-th wait is the server's ``Retry-After``, else drawn from 0 to ``first_s`` x 2^k, in both cases at
    most ``longest_s`` ("full jitter": Brooker 2015, "Exponential Backoff And Jitter").
    """

    count: int = 8
    first_s: float = 0.5
    longest_s: float = 60.0

    def wait_s(self, retry: int, told_s: float | None) -> float:
        """Seconds before retry number ``retry``, from 0."""
        if told_s is not None:
            return min(told_s, self.longest_s)
        return random.uniform(0, min(self.longest_s, self.first_s * 2 ** min(retry, 32)))


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request.

    Attributes:
        response: the last response; None if there was none.
        seconds: the last attempt took; waits before it do not count.
        attempts: 1 where nothing was retried.
        error: ``timeout`` or ``connection`` where there is no response, else empty.
    """

    response: httpx.Response | None
    seconds: float
    attempts: int
    error: str = ""


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """``--url``, ``--key``, ``--timeout``, ``--retries`` and ``--concurrency``."""
    key = os.environ.get("BRAID_API_KEY") or os.environ.get("OPENAI_API_KEY")
    group = parser.add_argument_group("the server")
    group.add_argument("--url", default=os.environ.get("BRAID_URL", URL), help="its address (%(default)s)")
    group.add_argument("--key", default=key, help="API key (default: BRAID_API_KEY or OPENAI_API_KEY)")
    group.add_argument("--timeout", type=seconds, default=600.0, help="longest silence in s (%(default)g)")
    group.add_argument(
        "--retries", type=count, default=8, help="further attempts after 429, 502, 503 and lost connections"
    )
    group.add_argument("--concurrency", type=positive, default=8, help="requests at the same time")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def count(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def seconds(text: str) -> float:
    """A time of more than 0 s."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def open_client(url: str, key: str | None, concurrency: int, timeout_s: float) -> httpx.AsyncClient:
    """A client without proxies and compression.

    Raises:
        CommandFailed: the address is none.
    """
    headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
            raise httpx.InvalidURL("no address")
    except httpx.InvalidURL:
        raise CommandFailed(f"--url must look like {URL}", EXIT_USAGE) from None
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        trust_env=False,
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1),
    )


async def served_models(client: httpx.AsyncClient) -> list[str]:
    """The models of a server that is there, is ready and takes the key.

    Raises:
        CommandFailed: it is not, does not, or serves none.
    """
    try:
        ready = await client.get("/ready", timeout=CONNECT_S)
        models = await client.get("/v1/models", timeout=CONNECT_S)
    except httpx.HTTPError:
        raise gone(client) from None
    if models.status_code in (401, 403):
        raise CommandFailed("the server asks for an API key: give one with --key or BRAID_API_KEY")
    if ready.status_code == 503:
        hint = "wait until /ready answers 200 (`braid doctor` and /cluster tell why not)"
        raise CommandFailed(f"the server at {client.base_url} is not ready: {hint}", EXIT_UNREACHABLE)
    try:
        found = [str(model["id"]) for model in models.json()["data"]]
    except (ValueError, LookupError, TypeError):
        found = []
    if not found:
        raise CommandFailed(
            f"the server at {client.base_url} lists no model at /v1/models: is --url a Braid router?"
        )
    return found


async def get_json(client: httpx.AsyncClient, path: str) -> Any:
    """What a path answers, None where the server has no such path.

    Raises:
        CommandFailed: the server has gone.
    """
    try:
        response = await client.get(path, timeout=CONNECT_S)
        return response.json() if response.is_success else None
    except ValueError:
        return None
    except httpx.HTTPError:
        raise gone(client) from None


async def post(client: httpx.AsyncClient, path: str, body: Mapping[str, Any], retries: Retries) -> Reply:
    """Send a request until it is answered with something that is not :data:`RETRIED`, within ``retries``.

    A reply that does not come in time is not asked for again: the server may still be working on it.

    Raises:
        CommandFailed: no attempt found anybody who listens.
    """
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    for attempt in range(1, retries.count + 2):
        last, told_s = attempt > retries.count, None
        start = time.perf_counter()
        try:
            response = await client.post(path, content=content, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if last:
                raise gone(client) from None
        except httpx.TimeoutException:
            return Reply(None, time.perf_counter() - start, attempt, "timeout")
        except httpx.TransportError:
            if last:
                return Reply(None, time.perf_counter() - start, attempt, "connection")
        else:
            if last or response.status_code not in RETRIED:
                return Reply(response, time.perf_counter() - start, attempt)
            told_s = retry_after_s(response.headers.get("retry-after"))
        await asyncio.sleep(retries.wait_s(attempt - 1, told_s))
    raise AssertionError("the last attempt returns or raises")


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` asks for (RFC 9110, 10.2.3: seconds or a date), None if it is none."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def gone(client: httpx.AsyncClient) -> CommandFailed:
    """Nobody listens."""
    hint = "start one with `make up`, or name another address with --url"
    return CommandFailed(f"no server answers at {client.base_url}: {hint}", EXIT_UNREACHABLE)


def refusal(response: httpx.Response) -> str:
    """What an error response says, on one line."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = response.reason_phrase
    return f"HTTP {response.status_code}: {printable(' '.join(message.split()))[:500]}"


async def closed_loop(
    jobs: Iterable[_Job], concurrency: int, work: Callable[[_Job], Awaitable[None]]
) -> None:
    """Do ``jobs``, each of ``concurrency`` workers its next one when one ends; the first error ends all."""
    waiting = iter(jobs)

    async def worker() -> None:
        for job in waiting:
            await work(job)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
