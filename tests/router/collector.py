"""An OTLP/HTTP collector on loopback that keeps the spans it is sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it came; ``start`` and ``end`` in nanoseconds."""

    name: str
    trace: str
    id: str
    parent: str
    server: bool
    start: int
    end: int
    failed: bool
    attributes: Mapping[str, Any]


class Collector:
    """Spans in order of arrival. A span's children come before it, or with it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self._arrived = threading.Condition()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._arrived:
            for sent in request.resource_spans:
                service = [a.value.string_value for a in sent.resource.attributes if a.key == "service.name"]
                self.services.update(service)
                self.spans += [_span(message) for scope in sent.scope_spans for message in scope.spans]
            self._arrived.notify_all()

    async def request(self) -> Span:
        """The span of the one request that was made, once it is there."""
        await asyncio.to_thread(self._wait)
        (root,) = [span for span in self.spans if span.server]
        return root

    def below(self, parent: Span, name: str | None = None) -> list[Span]:
        """A span's children by start, of one name or all."""
        found = [s for s in self.spans if s.parent == parent.id and name in (None, s.name)]
        return sorted(found, key=lambda span: span.start)

    def _wait(self) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: any(span.server for span in self.spans), 60)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A running collector."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _span(message: Message) -> Span:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value") or "") for a in message.attributes}
    return Span(
        message.name,
        message.trace_id.hex(),
        message.span_id.hex(),
        message.parent_span_id.hex(),
        message.kind == Message.SPAN_KIND_SERVER,
        message.start_time_unix_nano,
        message.end_time_unix_nano,
        message.status.code == Status.STATUS_CODE_ERROR,
        values,
    )
