"""A real router on loopback and workers without engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from braid import wire
from braid.http import listen
from braid.settings import RouterSettings
from router import checks, equivalence, extract
from router.app import App
from router.server import make_server
from tests.router.fake_worker import FakeWorker, Script


@pytest.fixture(scope="session", autouse=True)
def no_helper_is_left() -> Iterator[None]:
    """The processes that evaluate patterns and algebra live as long as the router's own."""
    yield
    extract._patterns.close()
    equivalence._algebra.close()
    checks._schemas.close()


CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LONG_S = 60.0
"""Longest wait for what has to come, on a machine that is busy with other things."""


def chat(**fields: Any) -> dict[str, Any]:
    """A chat body."""
    return {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}


class Hasty:
    """``asyncio`` with shorter pauses."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 100)


class Stand:
    """A running router and what talks to it."""

    def __init__(self, app: App, url: str, http: httpx.AsyncClient, stack: AsyncExitStack) -> None:
        self.app = app
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.http = http
        self._stack = stack

    @property
    def link(self) -> str:
        return self.app.link.endpoint

    async def worker(
        self, role: wire.Role, name: str, script: Script | None = None, **hello: Any
    ) -> FakeWorker:
        """Start a worker and wait until it is welcomed."""
        worker = await self._stack.enter_async_context(FakeWorker(self.link, role, name, script, **hello))
        await worker.join()
        return worker

    async def workers(
        self, prefill: Script | None = None, decode: Script | None = None, decoders: int = 1
    ) -> list[FakeWorker]:
        """One prefill worker ``p0`` and decode workers ``d0``..., their pairs verified."""
        found = [await self.worker("prefill", "p0", prefill)]
        found += [await self.worker("decode", f"d{i}", decode) for i in range(decoders)]
        await self.until(lambda: sum(p["verified"] for p in self.app.pairs.state()) >= decoders)
        return found

    async def until(self, holds: Callable[[], bool], timeout_s: float = LONG_S) -> None:
        """Wait for the router's own state: it has no event to await from outside."""
        async with asyncio.timeout(timeout_s):
            while not holds():
                await asyncio.sleep(0.005)

    def metric(self, name: str, **labels: str) -> float:
        return self.app.metrics.registry.get_sample_value(name, labels) or 0.0

    def openai(self) -> AsyncOpenAI:
        client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self._stack.push_async_callback(client.close)
        return client

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def settled(self) -> None:
        """Wait until nothing is in flight, then check all stores."""
        await self.until(lambda: not self.app.link.open_refs())
        self.app.check_integrity(idle=True)
        counted = [self.app.metrics.accepted, self.app.metrics.requests]
        accepted, ended = (
            sum(s.value for m in metric.collect() for s in m.samples if s.name.endswith("_total"))
            for metric in counted
        )
        assert accepted == ended


MakeStand = Callable[..., Awaitable[Stand]]


@pytest.fixture
async def make_stand() -> AsyncIterator[MakeStand]:
    """Starts routers with the given settings; stops them and checks their integrity afterwards."""
    async with AsyncExitStack() as stack:

        async def make(**fields: Any) -> Stand:
            given = {"link": "tcp://127.0.0.1:*", "heartbeat_s": 0.1, "port": 0, **fields}
            app = App(RouterSettings(**given))
            await app.start()
            stack.push_async_callback(app.stop)
            sock = listen(app.settings.host, app.settings.port)
            server = make_server(app)
            serving = asyncio.create_task(server.serve(sockets=[sock]))

            async def stop() -> None:
                with (
                    pytest.MonkeyPatch.context() as patch
                ):  # uvicorn's shutdown pauses for a tenth of a second
                    patch.setattr("uvicorn.server.asyncio", Hasty())
                    server.should_exit = True
                    await serving

            stack.push_async_callback(stop)
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=LONG_S))
            stand = Stand(app, url, http, stack)
            stack.push_async_callback(stand.settled)
            return stand

        yield make


@pytest.fixture
async def stand(make_stand: MakeStand) -> Stand:
    """A router with default settings."""
    return await make_stand()
