"""A small real HTTP server that answers as the router documents: headers, SSE, usage and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

PROMPT_BASE = 11
KV_BYTES = 2048


class FakeServer:
    """What it was asked, and switches for what it does wrong."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.served = 0
        self.running = 0
        self.most_running = 0
        self.ready = True
        self.models = True
        self.cut = False
        self.refuse_after: int | None = None
        self.answer = "The answer is 19."

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/ready", self.on_ready),
                Route("/v1/models", self.on_models),
                Route("/metrics", self.on_metrics),
                Route("/v1/chat/completions", self.on_request, methods=["POST"]),
                Route("/v1/completions", self.on_request, methods=["POST"]),
            ]
        )

    async def on_ready(self, request: Request) -> Response:
        return PlainTextResponse("", status_code=200 if self.ready else 503)

    async def on_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "demo", "root": None}] if self.models else []})

    async def on_metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            "# TYPE braid_kv_bytes counter\n"
            f"braid_kv_bytes_total {self.served * KV_BYTES}\n"
            "# TYPE braid_kv_transfers counter\n"
            f"braid_kv_transfers_total {self.served}\n"
            "# TYPE braid_path counter\n"
            f'braid_path_total{{path="remote",reason=""}} {self.served}\n'
            'braid_other_total{path="remote"} 7\n'
        )

    async def on_request(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if self.refuse_after is not None and len(self.bodies) > self.refuse_after:
            return JSONResponse({"error": {"message": "full", "type": "rate_limit_error"}}, status_code=429)
        headers = {
            "x-braid-path": "remote",
            "x-braid-kv-bytes": str(KV_BYTES),
            "x-braid-kv-transfers": "1",
            "x-braid-decode": "d0",
        }
        self.served += 1
        n = body.get("n", 1)
        words = sum(len(message["content"].split()) for message in body.get("messages", []))
        usage = {"prompt_tokens": PROMPT_BASE + 2 * words, "completion_tokens": 3 * n}
        if body.get("stream"):
            return StreamingResponse(self.events(n, usage), headers=headers, media_type="text/event-stream")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.answer},
            "finish_reason": "stop",
        }
        return JSONResponse({"choices": [choice], "usage": usage}, headers=headers)

    async def events(self, n: int, usage: dict[str, int]) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield event({"choices": [{"index": i, "delta": {"role": "assistant"}} for i in range(n)]})
            for step in range(3):
                for index in range(n):
                    part = {"text": f"t{step}", "delta": {"content": f"t{step}"}}
                    yield event({"choices": [{"index": index, **part}]})
            if self.cut:
                return
            yield ": a comment\n\n"
            proof = {"path": "remote", "kv_bytes": KV_BYTES, "kv_transfers": 1, "decode": {"d0": None}}
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "braid": proof})
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


@contextmanager
def serve(fake: FakeServer) -> Iterator[FakeServer]:
    """Run it on a free port of loopback."""
    config = uvicorn.Config(fake.app(), host="127.0.0.1", port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen()  # who connects before it serves waits
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
