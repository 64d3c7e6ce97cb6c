"""A stream of chat chunks as the events of a streamed response. Pure: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from router.responses.reply import Json, Wording
from router.sse import parse_event

Emit = Callable[..., None]
"""Sends an event of this type with these fields."""
Kind = Literal["message", "reasoning", "function_call"]


class Events:
    """Words the stream of one response; feed it whole SSE events of chat chunks.

    ``response.in_progress`` comes once more for each event of a strategy, with the event as ``reasoning``;
    otherwise the types are used as OpenAI uses them. The last is ``response.completed``, ``.incomplete`` or
    ``.failed``; there is no ``[DONE]``.
    """

    def __init__(self, wording: Wording) -> None:
        self._wording = wording
        self._out: list[bytes] = []
        self._number = 0
        self._items: list[Json] = []
        self._open: _Item | None = None
        self._finish = ""
        self._final: dict[str, Any] = {}
        self._ended = False

    def feed(self, data: bytes) -> bytes:
        """The events that these chunks are; raises :class:`router.sse.Broken` for what is none."""
        for raw in data.split(b"\n\n"):
            if raw.startswith(b"data: [DONE]"):
                self._end()
            elif not self._ended and (chunk := parse_event(raw)) is not None:
                self._begin()
                self._take(chunk)
        ready, self._out = b"".join(self._out), []
        return ready

    def _emit(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        self._out.append(f"event: {kind}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n")

    def _begin(self) -> None:
        if self._number == 0:
            for kind in ("response.created", "response.in_progress"):
                self._emit(kind, response=self._wording.response(status="in_progress"))

    def _take(self, chunk: Json) -> None:
        if isinstance(chunk.get("error"), dict):
            self._fail(chunk["error"])
            return
        self._wording.model = chunk.get("model") or self._wording.model
        told = chunk.get("reasoning")
        if isinstance(told, Mapping) and "event" in told:
            now = self._wording.response(status="in_progress")
            self._emit("response.in_progress", response=now, reasoning=told)
        final = {"report": None if told and "event" in told else told}
        final |= {"proof": chunk.get("braid"), "usage": chunk.get("usage")}
        self._final |= {name: value for name, value in final.items() if value}
        for choice in chunk.get("choices") or ():
            self._delta(choice.get("delta") or {}, (choice.get("logprobs") or {}).get("content"))
            self._finish = choice.get("finish_reason") or self._finish

    def _delta(self, delta: Json, logprobs: Any) -> None:
        if thinking := delta.get("reasoning") or delta.get("reasoning_content"):
            self._into("reasoning").grow(thinking)
        if text := delta.get("content"):
            self._into("message").grow(text, logprobs)
        for call in delta.get("tool_calls") or ():
            arguments = (call.get("function") or {}).get("arguments") or ""
            self._into("function_call", call.get("index") or 0, call).grow(arguments)

    def _into(self, kind: Kind, number: int = 0, call: Json | None = None) -> _Item:
        """The open item of this kind; another one is closed first."""
        if self._open is None or (self._open.kind, self._open.number) != (kind, number):
            self._close()
            self._open = _Item(self._emit, self._wording, kind, len(self._items), number, call or {})
        return self._open

    def _close(self, status: str = "completed") -> None:
        if self._open is not None:
            self._items.append(self._open.close(status))
            self._open = None

    def _end(self) -> None:
        if self._ended:
            return
        self._begin()
        if not self._items and self._open is None:
            self._into("message")  # an empty answer is an answer
        response = self._wording.response(finish=self._finish or "stop", **self._final)
        self._close(response["status"])
        self._ended = True
        self._emit(f"response.{response['status']}", response={**response, "output": self._items})

    def _fail(self, error: Json) -> None:
        self._ended = True
        self._close("incomplete")
        told = {"code": str(error.get("code") or error.get("type") or "server_error")}
        told["message"] = str(error.get("message") or "The response could not be finished.")
        response = self._wording.response(self._items, status="failed", error=told, **self._final)
        self._emit("response.failed", response=response)


class _Item:
    """An output item that grows: its events, from ``added`` to ``done``."""

    def __init__(self, emit: Emit, wording: Wording, kind: Kind, place: int, number: int, call: Json) -> None:
        self.kind = kind
        self.number = number
        self._emit = emit
        self._wording = wording
        self._place = place
        self._call = call
        self._parts: list[str] = []
        self._logprobs: list[Any] = []
        self._at = {"item_id": wording.item_id(kind, place), "output_index": place}
        begun = self._item("", "in_progress")
        self._emit("response.output_item.added", output_index=place, item={**begun, **self._empty()})
        if kind != "function_call":
            self._at["content_index"] = 0
            self._emit("response.content_part.added", **self._at, part=begun["content"][0])

    def grow(self, text: str, logprobs: Any = None) -> None:
        """Add to its text or arguments."""
        if not text:
            return
        self._parts.append(text)
        self._logprobs += logprobs or []
        more = {"logprobs": logprobs or []} if self.kind == "message" else {}
        self._emit(f"{self._channel}.delta", **self._at, delta=text, **more)

    def close(self, status: str) -> Json:
        """Tell that it is done; returns it as it is now."""
        text = "".join(self._parts)
        item = self._item(text, status)
        if self.kind == "function_call":
            self._emit(f"{self._channel}.done", **self._at, arguments=text, name=item["name"])
        else:
            more = {"logprobs": self._logprobs} if self.kind == "message" else {}
            self._emit(f"{self._channel}.done", **self._at, text=text, **more)
            self._emit("response.content_part.done", **self._at, part=item["content"][0])
        self._emit("response.output_item.done", output_index=self._place, item=item)
        return item

    @property
    def _channel(self) -> str:
        names = {"message": "output_text", "reasoning": "reasoning_text"}
        return f"response.{names.get(self.kind, 'function_call_arguments')}"

    def _empty(self) -> Json:
        return {} if self.kind == "function_call" else {"content": []}

    def _item(self, text: str, status: str) -> Json:
        if self.kind == "message":
            return self._wording.message(self._place, text, self._logprobs, status)
        if self.kind == "reasoning":
            return self._wording.thought(self._place, text, status)
        function = {**(self._call.get("function") or {}), "arguments": text}
        return self._wording.call(self._place, {**self._call, "function": function}, status)
