"""The HTTP server that every process runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn

from braid import http


@pytest.fixture
def server() -> http.Server:
    return http.Server(uvicorn.Config(lambda *_: None, lifespan="off"))


async def test_it_ends_when_it_is_told_and_not_at_its_next_look(
    server: http.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "TICK_S", 1e6)
    loop = asyncio.create_task(server.main_loop())
    await asyncio.sleep(0)
    assert not loop.done()
    server.should_exit = True
    async with asyncio.timeout(60):
        await loop


async def test_one_that_was_told_before_does_not_begin(server: http.Server) -> None:
    server.should_exit = True
    async with asyncio.timeout(60):
        await server.main_loop()


async def test_the_date_in_its_headers_goes_on(server: http.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TICK_S", 0.001)
    server.config.load()
    loop = asyncio.create_task(server.main_loop())
    seen: list[Any] = []
    async with asyncio.timeout(60):
        while len(seen) < 2:
            if server.server_state.default_headers:
                seen.append(server.server_state.default_headers)
                server.server_state.default_headers = []
            await asyncio.sleep(0)
    assert all(name == b"date" for headers in seen for name, _ in headers[:1])
    server.should_exit = True
    await loop
