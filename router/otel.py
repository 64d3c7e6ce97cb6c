"""Spans through OpenTelemetry's SDK. Imported only where an OTLP endpoint is set (:mod:`router.tracing`)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from braid import __version__, wire
from router.tracing import Headers, Trace, Tracer, Value

FLUSH_S = 5.0
"""Longest wait for the collector when the router stops."""

_W3C = TraceContextTextMapPropagator()
_TRACE_HEADERS = ("traceparent", "tracestate")
_STANDARD = {
    "http_method": "http.request.method",
    "http_route": "http.route",
    "http_status": "http.response.status_code",
    "operation": "gen_ai.operation.name",
    "model": "gen_ai.request.model",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cache_read_tokens": "gen_ai.usage.cache_read.input_tokens",
}
"""Attributes for which OpenTelemetry has words. Usage is the request's only: whoever adds up a trace's
spans would count it twice."""


class OtelTracer(Tracer):
    """Exports in batches from a thread of its own; a slow or absent collector costs spans, not requests."""

    def __init__(self, endpoint: str) -> None:
        """Args: endpoint: full URL; empty: OpenTelemetry's variables say it."""
        ours = Resource.create({"service.name": "braid-router", "service.version": __version__})
        resource = ours.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
        self._tracer = self._provider.get_tracer("braid.router", __version__)
        self._stopped = False

    def request(self, name: str, headers: Headers) -> Trace:
        method, _, route = name.partition(" ")
        span = OtelTrace(self._tracer, name, _Clock(), _parent(headers), SpanKind.SERVER)
        span.note(http_method=method, http_route=route)
        return span

    async def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            # A thread that the interpreter does not wait for: the collector may be away.
            flush = threading.Thread(target=self._provider.shutdown, name="otel-flush", daemon=True)
            flush.start()
            await asyncio.to_thread(flush.join, FLUSH_S)


class _Clock:
    """Nanoseconds since 1970 that only move forward within a request."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        return self._offset + time.monotonic_ns()


class OtelTrace(Trace):
    """A recorded span."""

    def __init__(
        self,
        tracer: trace.Tracer,
        name: str,
        clock: _Clock,
        parent: Context,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        self._tracer = tracer
        self._clock = clock
        self._began = clock.now()
        self._span = tracer.start_span(name, parent, kind, start_time=self._began)
        self._context = trace.set_span_in_context(self._span, Context())
        self._children: list[Trace] = []
        self._shared: dict[str, Value] = {}
        self._error = ""
        self._kv: wire.KvRecord | None = None
        self._ended = False
        self.id = trace.format_trace_id(self._span.get_span_context().trace_id)

    def begin(self, name: str, **attributes: Value) -> Trace:
        child = OtelTrace(self._tracer, name, self._clock, self._context)
        child.share(**self._shared)
        child.note(**attributes)
        self._children.append(child)
        return child

    def note(self, **attributes: Value) -> None:
        for name, value in attributes.items():
            if value is not None and value != "":
                self._span.set_attribute(_STANDARD.get(name, f"braid.{name}"), value)

    def share(self, **attributes: Value) -> None:
        self._shared |= attributes
        self.note(**attributes)

    def usage(self, usage: Mapping[str, object]) -> None:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        self.note(
            input_tokens=_count(usage.get("prompt_tokens")),
            output_tokens=_count(usage.get("completion_tokens")),
            cache_read_tokens=_count(cached),
        )

    def heard(self, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Head | wire.Body | wire.GroupDone) and message.kv is not None:
            self._kv = message.kv
        match message:
            case wire.PrefillDone(status=200):
                self.note(prompt_tokens=message.prompt_tokens, cached_tokens=message.cached_tokens)
                self.end(status=200, compute_s=message.compute_s)
            case wire.PrefillDone():
                self.end(_failed(message.status), status=message.status)
            case wire.Head():
                self._error = _failed(message.status)
                self.note(status=message.status)
            case wire.Body(end=True):
                self.end("cut" if message.cut else self._error)
            case wire.GroupDone(status=200):
                self.note(prompt_tokens=message.prompt_tokens, cached_tokens=message.cached_tokens)
                self.end(status=200, completion_tokens=message.choice_tokens)
            case wire.GroupDone():
                self.end(_failed(message.status), status=message.status)

    def carry(self, headers: Headers) -> tuple[tuple[str, str], ...]:
        ours: dict[str, str] = {}
        _W3C.inject(ours, self._context)
        theirs = (pair for pair in headers if pair[0] not in _TRACE_HEADERS)
        return (*theirs, *ours.items())

    def end(self, error: str = "", fault: bool = True, **attributes: Value) -> None:
        if self._ended:
            return
        self._ended = True
        for child in self._children:
            child.end(cancelled=True)
        if self._kv is not None:
            self._transfer(self._kv)
        self.note(**attributes)
        if error:
            self._span.set_attribute("error.type", error)
            if fault:
                self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._clock.now())

    def _transfer(self, record: wire.KvRecord) -> None:
        """A child for what the decode worker tells of its KV, timed from the dispatch."""
        span = self._tracer.start_span("kv_transfer", self._context, start_time=self._began)
        for name, value in self._shared.items():
            if value is not None:
                span.set_attribute(f"braid.{name}", value)
        for name in record.__struct_fields__:
            span.set_attribute(f"braid.kv.{name}", getattr(record, name))
        span.end(self._began + round(1e9 * (record.queue_s + record.wait_s + record.wire_s)))


def _parent(headers: Headers) -> Context:
    """The client's span; an empty context if the headers name none, or several."""
    parents = [value for key, value in headers if key == "traceparent"]
    if len(parents) != 1:
        return Context()
    state = ",".join(value for key, value in headers if key == "tracestate")
    return _W3C.extract({"traceparent": parents[0], "tracestate": state}, Context())


def _failed(status: int) -> str:
    return "" if status < 400 else f"status_{status}"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
