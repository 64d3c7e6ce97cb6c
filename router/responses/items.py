"""Items of a Responses input as chat messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from braid.errors import BadRequest

Json = dict[str, Any]


def messages(instructions: Any, given: Any) -> list[Json]:
    """The conversation that ``instructions`` and ``input`` tell. Function calls become part of the assistant
    message before them; a reasoning item goes with the assistant message after it.

    Raises:
        BadRequest: an item is malformed, or of a type that needs stored responses or built-in tools.
    """
    told = _Told()
    if instructions is not None:
        if not isinstance(instructions, str):
            raise BadRequest("instructions must be a string.", param="instructions")
        told.messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadRequest("input must be a string or a list of at least one item.", param="input")
    for position, item in enumerate(given):
        told.take(f"input[{position}]", item)
    return told.messages


class _Told:
    """The messages so far. ``_thought``: reasoning that waits for its assistant message."""

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._thought = ""
        self._takers: dict[str, Callable[[str, Json], None]] = {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._output,
            "reasoning": self._reasoning,
        }

    def take(self, where: str, item: Any) -> None:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        taker = self._takers.get(kind) if isinstance(kind, str) else None
        if taker is None:
            raise BadRequest(f"An item must be one of {', '.join(self._takers)}.", param=where)
        taker(where, item)

    def _message(self, where: str, item: Json) -> None:
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str):
            raise BadRequest("A message needs a role.", param=f"{where}.role")
        if role == "assistant":
            self._assistant()["content"] = _text(f"{where}.content", content)
        else:
            self.messages.append({"role": role, "content": _content(f"{where}.content", content)})

    def _call(self, where: str, item: Json) -> None:
        if not all(isinstance(item.get(key), str) for key in ("call_id", "name", "arguments")):
            raise BadRequest("A function call needs call_id, name and arguments.", param=where)
        last = self.messages[-1] if self.messages else {}
        message = last if last.get("role") == "assistant" and not self._thought else self._assistant()
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)

    def _output(self, where: str, item: Json) -> None:
        if not isinstance(item.get("call_id"), str):
            raise BadRequest("A function call's output needs its call_id.", param=where)
        said = _text(f"{where}.output", item.get("output"))
        self.messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": said})

    def _reasoning(self, where: str, item: Json) -> None:
        parts = item.get("content") or item.get("summary") or []
        self._thought = _text(f"{where}.content", parts) if parts else ""

    def _assistant(self) -> Json:
        message: Json = {"role": "assistant", "content": None}
        if self._thought:
            message["reasoning"], self._thought = self._thought, ""
        self.messages.append(message)
        return message


_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _content(where: str, content: Any) -> Any:
    """A message's content; a lone text as a string, as templates like it best."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadRequest("content must be a string or a list of parts.", param=where)
    parts = [_part(where, part) for part in content]
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    found = _content(where, content)
    parts = [{"text": found}] if isinstance(found, str) else found
    if not all("text" in part for part in parts):
        raise BadRequest("Only text can stand here.", param=where)
    return "".join(part["text"] for part in parts)


def _part(where: str, part: Any) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}
    raise BadRequest("A part must be a text or an image with its URL: no files are stored here.", param=where)
