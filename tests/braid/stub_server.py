"""A small real HTTP server on loopback that answers as the router does, and misbehaves as it is told."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from router import strategies

Answer = tuple[int, dict[str, str], Any] | None
"""Status, headers and body; None closes the connection without a word."""


def completion(text: str, report: dict[str, Any] | None = None, tokens: int = 10) -> dict[str, Any]:
    """A reply of the router; with a strategy's report if there is one."""
    reply: dict[str, Any] = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "braid": {"path": "remote", "kv_bytes": 1000, "kv_transfers": 1},
    }
    return reply if report is None else {**reply, "reasoning": report}


def echo(body: dict[str, Any]) -> Answer:
    """The last word of the question, as an answer."""
    return 200, {}, completion(f"The answer is {body['messages'][-1]['content'].split()[-1]}.")


BRAID_AT_A_TERMINAL = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from braid.cli import main; sys.exit(main(sys.argv[1:]))",
]
"""The command as at a terminal: what a shell runs in the background ignores Ctrl-C."""


class StubServer:
    """Its switches, and what it was asked.

    Attributes:
        answer: makes the answer to a request's body.
        holds_after: so many requests are answered; later ones wait until :meth:`release`.
        bodies: of the requests, in the order they came.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answer: Callable[[dict[str, Any]], Answer] = echo
        self.holds_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gets: dict[str, Answer] = {
            "/ready": (200, {}, {}),
            "/v1/models": (200, {}, {"data": [{"id": "demo"}]}),
            "/v1/strategies": (200, {}, {"data": strategies.describe()}),
            "/cluster": (200, {}, {"ready": True, "workers": [{"worker": "d0"}]}),
        }
        self._lock = threading.Lock()
        self._held = threading.Semaphore(0)
        self._go = threading.Event()

    def wait_until_held(self, requests: int) -> None:
        """Return when so many requests wait."""
        for _ in range(requests):
            assert self._held.acquire(timeout=30)

    def release(self) -> None:
        """Answer those that wait, and all that come."""
        self.holds_after = None
        self._go.set()

    def take(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        """A request's answer."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            holds = self.holds_after is not None and len(self.bodies) > self.holds_after
        if holds:
            self._held.release()
            self._go.wait(30)
        return self.answer(body)


@contextmanager
def serve() -> Iterator[StubServer]:
    """Run one on a free port."""
    stub = StubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(stub.gets.get(self.path, (404, {}, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._reply(stub.take(body, {key.lower(): value for key, value in self.headers.items()}))

        def _reply(self, answer: Answer) -> None:
            if answer is None:
                self.close_connection = True
                return
            status, headers, body = answer
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                for key, value in {
                    "content-length": str(len(content)),
                    "x-request-id": "r1",
                    **headers,
                }.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                self.close_connection = True  # the client was killed while it waited

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        stub.release()
        server.shutdown()
        thread.join()
        server.server_close()


def closed_port() -> str:
    """An address where nobody listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_address[1]
    server.server_close()
    return f"http://127.0.0.1:{port}"
