"""One HTTP exchange: reading within limits, answering within a write timeout, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, TypeVar

import msgspec

from braid.errors import BadRequest, BraidError, ClientGone, TooLarge
from braid.log import GROUP
from braid.settings import RouterSettings
from router.history import Entry
from router.link import SlowReader
from router.sse import event
from router.tracing import OFF, Trace
from router.validate import check_group, check_request_id

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[str, str]]

_T = TypeVar("_T")

JSON = ("content-type", "application/json")
_HOP_BY_HOP = {
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_NOT_TO_WORKERS = _HOP_BY_HOP | {
    "accept-encoding",
    "authorization",
    "content-encoding",
    "content-type",
    "cookie",
    "expect",
    "host",
    "x-request-id",
    "x-braid-group",
}
_NOT_TO_CLIENTS = _HOP_BY_HOP | {"date", "server", "x-request-id"}
_REFUSED = "x-data-parallel-rank"
REPLY_S = 0.02
"""Part of a deadline that is left for the reply to be worded and sent; a tenth of a short one."""
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class Call:
    """A request and its response. Answers once: :meth:`respond`, or :meth:`start` and :meth:`write` until
    the last bytes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: RouterSettings) -> None:
        self.started = False
        self.ended = False
        self.outcome = "completed"
        self.status = 0
        self.error: BraidError | None = None
        self.trace: Trace = OFF
        self.received = asyncio.get_running_loop().time()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        self.request_id = secrets.token_hex(16)
        self.group = ""
        self.entry: Entry | None = None
        self._receive = receive
        self._send = send
        self._settings = settings
        self._sse = False

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def check_headers(self) -> None:
        """Refuse what can't be served safely and take the client's request id.

        Raises:
            BadRequest: ambiguous framing, an unusable id of request or group, or an internal header.
        """
        names = [key for key, _ in self.headers]
        if names.count("content-length") > 1 or ("content-length" in names and "transfer-encoding" in names):
            raise BadRequest("Send one Content-Length or Transfer-Encoding, not both.")
        if _REFUSED in names:
            raise BadRequest("X-data-parallel-rank is internal to the cluster and is refused from clients.")
        given = self.header("x-request-id")
        if given is not None:
            self.request_id = check_request_id(given)
        if (wanted := self.header("x-braid-group")) is not None:
            check_group(wanted)

    def due(self, seconds: float | None) -> float | None:
        """When an answer leaves that the client is to have ``seconds`` after it asked, on the event loop's
        clock: a little sooner, as it has a way to go."""
        return None if seconds is None else self.received + seconds - min(REPLY_S, seconds / 10)

    def begin_group(self) -> str:
        """The id of the group that answers, the client's own or a new one; the reply carries it."""
        self.group = self.header("x-braid-group") or secrets.token_hex(16)
        GROUP.set(self.group)
        self.trace.share(group=self.group)
        return self.group

    def headers_for_workers(self) -> tuple[tuple[str, str], ...]:
        """The client's headers without those of this connection and without its secrets."""
        return tuple((key, value) for key, value in self.headers if key not in _NOT_TO_WORKERS)

    async def read_body(self) -> bytes:
        """The whole body; raises :class:`TooLarge` over the cap, :class:`ClientGone` if it ends early."""
        cap = self._settings.max_body_bytes
        length = self.header("content-length")
        if length is not None and (len(length) >= 20 or int(length) > cap):
            raise TooLarge(f"The request body is over the cap of {cap} bytes.")
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("The client left while it sent the body.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > cap:
                raise TooLarge(f"The request body is over the cap of {cap} bytes.")
            if not message.get("more_body"):
                return b"".join(parts)

    async def while_connected(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work``; cancel it as soon as the client is gone. Call after :meth:`read_body`.

        Raises:
            ClientGone: the client left first; ``work`` has ended when this is raised.
        """
        task = asyncio.create_task(work)
        watch = asyncio.create_task(self._disconnected())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientGone("The client left.")
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        await self.start(status, [*headers, ("content-length", str(len(body)))])
        await self.write(body, more=False)

    async def respond_json(self, data: Any, status: int = 200, headers: Headers = ()) -> None:
        await self.respond(
            status, [JSON, ("x-request-id", self.request_id), *headers], msgspec.json.encode(data)
        )

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self.status = status
        self._sse = any(k == "content-type" and v.startswith("text/event-stream") for k, v in headers)
        if self.group:
            headers = [*headers, ("x-braid-group", self.group)]
        raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        await self._deliver({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, more: bool = True) -> None:
        """Send body bytes; waits while the client is behind. Whoever has the last ones finds the entry ended.

        Raises:
            SlowReader: for longer than the write timeout.
        """
        self.ended = not more
        if self.ended and self.entry is not None and self.entry.running:
            self.entry.end(self.outcome)
        await self._deliver({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: BraidError) -> None:
        """Answer with an error: as the response, or as the last event of a stream that has begun."""
        self.error = error
        if self.ended or isinstance(error, ClientGone):
            return
        if not self.started:
            headers = [] if error.retry_after_s is None else [("retry-after", f"{error.retry_after_s:.0f}")]
            if error.status == 401:
                headers.append(("www-authenticate", "Bearer"))
            await self.respond_json(error.body(), error.status, headers)
        elif self._sse:
            await self.write(event(error.body()), more=False)

    def end_trace(self) -> None:
        """End the exchange's span, whatever has become of it."""
        error = "" if self.outcome == "completed" else self.outcome
        code = self.status
        if self.error is not None:
            error, code = self.error.label, self.error.status
        elif code >= 400:
            error = str(code)
        self.trace.end(
            error,
            fault=not 400 <= code < 500,
            request_id=self.request_id,
            http_status=self.status or None,
            cancelled=None if self.ended else True,
        )

    async def _deliver(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                await self._send(message)
        except TimeoutError:
            raise SlowReader("The client stopped reading.") from None


def headers_for_clients(headers: Headers) -> list[tuple[str, str]]:
    """A worker's response headers without those of its own connection and without malformed ones."""
    return [
        (key.lower(), value)
        for key, value in headers
        if key.lower() not in _NOT_TO_CLIENTS
        and not key.lower().startswith("x-braid-")
        and _HEADER_VALUE.fullmatch(value)
    ]
