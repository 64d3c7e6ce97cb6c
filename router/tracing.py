"""Spans of requests, where an OTLP endpoint is set.

The router alone makes spans: it sees every attempt, and the decode workers report what their transfers
took. Where no endpoint is set, :data:`OFF` stands for every span and OpenTelemetry is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from braid import wire
from braid.settings import RouterSettings

Value = str | int | float | bool | None
Headers = Sequence[tuple[str, str]]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own variables. The second names a collector, to which the exporter adds the path."""


class Trace:
    """A span that is not recorded: all that is done to it does nothing.

    Attribute ``name`` of a recorded one (:mod:`router.otel`) is exported as ``braid.name``, unless
    OpenTelemetry has its own word for it; None and empty strings are left out.
    """

    id = ""
    """The trace's id in hex; empty if nothing is recorded."""

    def begin(self, name: str, **attributes: Value) -> Trace:
        """Begin a child. It ends with its parent at the latest, then with ``cancelled``."""
        return self

    def note(self, **attributes: Value) -> None:
        """Add attributes."""

    def share(self, **attributes: Value) -> None:
        """Add attributes to this span and to all that are begun below it from now on."""

    def usage(self, usage: Mapping[str, object]) -> None:
        """Add what is known of the request's tokens, in OpenAI's words."""

    def heard(self, message: wire.FromWorker) -> None:
        """What a worker says of this span's dispatch; its terminal message ends the span."""

    def carry(self, headers: Headers) -> tuple[tuple[str, str], ...]:
        """The headers with this span as parent of what the receiver traces."""
        return tuple(headers)

    def end(self, error: str = "", fault: bool = True, **attributes: Value) -> None:
        """End the span and its children; only the first call counts.

        Args:
            error: a short word (``error.type``), empty if it went well.
            fault: whether the error counts as one of the service.
        """


OFF = Trace()


class Tracer:
    """Makes no spans."""

    def request(self, name: str, headers: Headers) -> Trace:
        """Begin the span of a request, below the client's if ``headers`` tell of one."""
        return OFF

    async def stop(self) -> None:
        """Export what is left, for a few seconds at most. Idempotent."""


def make_tracer(settings: RouterSettings) -> Tracer:
    """A tracer that exports to the endpoint of the settings or of OpenTelemetry's variables.

    Raises:
        ValueError: OpenTelemetry is not installed, and an endpoint is set.
    """
    if not settings.otlp_traces_endpoint and not any(map(os.environ.get, _ENDPOINTS)):
        return Tracer()
    try:
        from router.otel import OtelTracer
    except ModuleNotFoundError as error:
        raise ValueError(
            f"an OTLP endpoint is set, and {error.name} is not installed: install the extra `tracing` "
            "(opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http), or unset otlp_traces_endpoint "
            f"and {' and '.join(_ENDPOINTS)}"
        ) from None
    return OtelTracer(settings.otlp_traces_endpoint)
