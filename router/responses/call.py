"""A call of ``/v1/responses``: what the rest of the router answers as chat leaves as a response."""

from __future__ import annotations

import re

import msgspec

from braid.errors import BraidError, UpstreamFailed
from router.http import Call, Headers
from router.responses.reply import Wording
from router.responses.request import Asked
from router.responses.stream import Events
from router.sse import Broken, parse_object

_PARAMS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


class ResponsesCall(Call):
    """Words successes as :class:`Wording` and :class:`Events` do; errors pass through."""

    _wording: Wording | None = None
    _events: Events | None = None

    def word_as(self, asked: Asked) -> None:
        """What the reply repeats. To be said before it is answered."""
        self._wording = Wording(asked, self.request_id)

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        if status == 200 and self._wording is not None:
            try:
                body = msgspec.json.encode(self._wording.whole(parse_object(body)))
            except (Broken, LookupError, TypeError, AttributeError):
                raise UpstreamFailed("A worker's answer is no chat completion.") from None
        await super().respond(status, headers, body)

    async def start(self, status: int, headers: Headers) -> None:
        await super().start(status, headers)
        if self._sse and self._wording is not None:
            self._events = Events(self._wording)

    async def write(self, data: bytes, more: bool = True) -> None:
        if self._events is not None:
            data = self._events.feed(data)
        if data or not more:
            await super().write(data, more)

    async def fail(self, error: BraidError) -> None:
        name = re.split(r"[.\[]", error.param or "", maxsplit=1)[0]  # messages are not numbered as items are
        error.param = _PARAMS.get(name, error.param)
        await super().fail(error)
