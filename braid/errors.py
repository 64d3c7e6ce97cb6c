"""One exception tree, mapped once to HTTP status, OpenAI body and metric label.

Messages of user-caused errors say what to do next and never echo the request's content.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar


class BraidError(Exception):
    """Base of every error that ends a request.

    Attributes:
        status: HTTP status.
        kind: OpenAI's ``type``.
        label: value of the ``error`` label in metrics.
        param: the offending field, or None.
        retry_after_s: seconds for ``Retry-After``, or None.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    label: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(BraidError):
    """400: the request can't be served as it is."""

    status, kind, label = 400, "invalid_request_error", "bad_request"


class Unauthorized(BraidError):
    """401: no key, or a wrong one."""

    status, kind, label = 401, "invalid_request_error", "unauthorized"


class NotFound(BraidError):
    """404: no such model or path."""

    status, kind, label = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(BraidError):
    """405."""

    status, kind, label = 405, "invalid_request_error", "method_not_allowed"


class TooLarge(BraidError):
    """413: the body is over the cap."""

    status, kind, label = 413, "invalid_request_error", "too_large"


class Overloaded(BraidError):
    """429: the queue is full; try again after ``Retry-After``."""

    status, kind, label = 429, "rate_limit_error", "overloaded"


class Unavailable(BraidError):
    """503: no worker can serve this now."""

    status, kind, label = 503, "server_error", "unavailable"


class UpstreamFailed(BraidError):
    """502: a worker answered with something that can't be used, or died with the request."""

    status, kind, label = 502, "server_error", "upstream_failed"


class DeadlineExceeded(BraidError):
    """504: the request's deadline passed."""

    status, kind, label = 504, "server_error", "deadline"


def no_sample_in_time() -> DeadlineExceeded:
    """A strategy's deadline came before any of its samples had finished."""
    return DeadlineExceeded(
        "no sample finished within deadline_s: raise it, or lower max_tokens", param="reasoning.deadline_s"
    )


class ClientGone(BraidError):
    """499: the client closed the connection; never sent, only counted."""

    status, kind, label = 499, "server_error", "client_gone"


def error_body(message: str) -> bytes:
    """OpenAI's error body of a failure on our side, as JSON."""
    return json.dumps(BraidError(message).body()).encode()
