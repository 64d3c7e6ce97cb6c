"""Calling an application in process: it streams, and a cancel reaches the handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from braid.worker.asgi import post

DEADLINE_S = 60.0


class Answer:
    """What came of a request."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.changed = asyncio.Event()

    def start(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.status, self.headers = status, dict(headers)

    def chunk(self, data: bytes) -> None:
        self.chunks.append(data)
        self.changed.set()


async def call(app: Any, target: str, answer: Answer, body: bytes = b"{}") -> None:
    await post(app, target, body, [("X-Request-Id", "r1")], answer.start, answer.chunk)


async def test_the_handler_sees_the_request_as_it_was_sent() -> None:
    app, answer = FastAPI(), Answer()

    @app.post("/echo")
    async def echo(request: Request) -> JSONResponse:
        body = (await request.body()).decode()
        return JSONResponse([body, request.query_params["a"], request.headers["x-request-id"]], 201)

    await call(app, "/echo?a=b", answer, b'{"x": 1}')
    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    assert b"".join(answer.chunks) == b'["{\\"x\\": 1}","b","r1"]'


async def test_chunks_come_while_the_handler_still_runs() -> None:
    app, answer, go_on = FastAPI(), Answer(), asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        yield b"first"
        await go_on.wait()
        yield b"second"

    @app.post("/s")
    async def handler() -> StreamingResponse:
        return StreamingResponse(stream())

    request = asyncio.create_task(call(app, "/s", answer))
    await asyncio.wait_for(answer.changed.wait(), DEADLINE_S)
    assert answer.chunks == [b"first"]
    go_on.set()
    await asyncio.wait_for(request, DEADLINE_S)
    assert answer.chunks == [b"first", b"second"]


async def test_an_unknown_path_is_answered() -> None:
    answer = Answer()
    await call(FastAPI(), "/nowhere", answer)
    assert answer.status == 404


async def test_an_exception_of_the_application_is_the_callers() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await call(app, "/", Answer())


async def test_a_cancel_is_a_disconnect_and_nothing_is_delivered_after_it() -> None:
    answer, waiting, seen = Answer(), asyncio.Event(), list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"before", "more_body": True})
        waiting.set()
        seen.append((await receive())["type"])
        await send({"type": "http.response.body", "body": b"after"})

    await _cancelled(call(app, "/", answer), waiting)
    assert seen == ["http.disconnect"]
    assert answer.chunks == [b"before"]


async def test_a_handler_that_ignores_the_disconnect_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid.worker.asgi._GRACE_S", 0)
    waiting, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await _cancelled(call(app, "/", Answer()), waiting)
    assert ended.is_set(), "the call returns after the handler"


async def test_a_cancel_ends_a_streaming_response() -> None:
    app, waiting, ended = FastAPI(), asyncio.Event(), asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            waiting.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    @app.post("/s")
    async def handler() -> StreamingResponse:
        return StreamingResponse(stream())

    await _cancelled(call(app, "/s", Answer()), waiting)
    assert ended.is_set()


@pytest.mark.slow
async def test_a_cancel_reaches_a_handler_of_vllm() -> None:
    vllm_utils = pytest.importorskip("vllm.entrypoints.serve.utils.api_utils")
    app, waiting, ended = FastAPI(), asyncio.Event(), asyncio.Event()

    @app.post("/v1/completions")
    @vllm_utils.with_cancellation
    async def handler(request: dict[str, Any], raw_request: Request) -> JSONResponse:
        try:
            waiting.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return JSONResponse({})

    await _cancelled(call(app, "/v1/completions", Answer()), waiting)
    assert ended.is_set()


async def _cancelled(request: Any, at: asyncio.Event) -> None:
    """Run a request, cancel it there, and wait until it has ended."""
    task = asyncio.ensure_future(request)
    await asyncio.wait_for(at.wait(), DEADLINE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, DEADLINE_S)
