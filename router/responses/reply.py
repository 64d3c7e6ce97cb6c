"""A chat completion as a Responses object. Pure: JSON objects in, JSON objects out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from router.responses.request import Asked

Json = dict[str, Any]

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Finish reasons that leave an answer incomplete, in the words of ``incomplete_details``."""
_REPEATED = ("instructions", "max_output_tokens", "temperature", "top_p", "user", "top_logprobs", "text")


class Wording:
    """Words the one response of a request."""

    def __init__(self, asked: Asked, request_id: str) -> None:
        self.id = f"resp_{request_id}"
        self._asked = asked.fields
        self._created = int(time.time())
        self.model = str(asked.fields.get("model") or "")

    def item_id(self, kind: str, place: int) -> str:
        """The id of the output item at ``place``; OpenAI's prefixes say the kind."""
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        return f"{prefix}_{self.id.removeprefix('resp_')}_{place}"

    def whole(self, completion: Mapping[str, Any]) -> Json:
        """The response that a chat completion is."""
        self.model = completion.get("model") or self.model
        choice = completion["choices"][0]
        return self.response(
            self._items(choice),
            finish=choice.get("finish_reason") or "stop",
            usage=completion.get("usage"),
            report=completion.get("reasoning"),
            proof=completion.get("braid"),
        )

    def response(
        self,
        output: Sequence[Json] = (),
        *,
        status: str = "",
        finish: str = "",
        usage: Any = None,
        report: Any = None,
        proof: Any = None,
        error: Json | None = None,
    ) -> Json:
        """A Responses object. ``status`` follows from ``finish`` unless it is given."""
        asked, reason = self._asked, _INCOMPLETE.get(finish)
        status = status or ("incomplete" if reason else "completed")
        given = asked.get("reasoning")
        wanted = given if isinstance(given, Mapping) else {}
        effort = wanted.get("effort", asked.get("reasoning_effort"))
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": reason} if reason else None,
            "model": self.model,
            "output": list(output),
            "usage": words_of_usage(usage),
            "reasoning": {"effort": effort, "summary": None, **(report or {})},
            **({} if proof is None else {"braid": proof}),
            **{field: asked.get(field) for field in _REPEATED},
            "metadata": asked.get("metadata") or {},
            "tools": asked.get("tools") or [],
            "tool_choice": asked.get("tool_choice") or "auto",
            "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
            "truncation": "disabled",
            "service_tier": "default",
            "previous_response_id": None,
            "background": False,
            "store": False,
        }

    def message(self, place: int, text: str, logprobs: Any = None, status: str = "completed") -> Json:
        """An output message."""
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}
        told = {"id": self.item_id("message", place), "type": "message", "role": "assistant"}
        return {**told, "status": status, "content": [part]}

    def thought(self, place: int, text: str, status: str = "completed") -> Json:
        """A reasoning item: the thinking as the engine's parser split it off."""
        content = [{"type": "reasoning_text", "text": text}]
        told = {"id": self.item_id("reasoning", place), "type": "reasoning", "summary": []}
        return {**told, "content": content, "status": status}

    def call(self, place: int, call: Mapping[str, Any], status: str = "completed") -> Json:
        """A function call from a chat's tool call."""
        function = call.get("function") or {}
        told = {"id": self.item_id("function_call", place), "type": "function_call", "status": status}
        names = {"call_id": call.get("id") or "", "name": function.get("name") or ""}
        return {**told, **names, "arguments": function.get("arguments") or ""}

    def _items(self, choice: Mapping[str, Any]) -> list[Json]:
        message, items = choice.get("message") or {}, list[Json]()
        if thinking := message.get("reasoning") or message.get("reasoning_content"):
            items.append(self.thought(len(items), thinking))
        calls = message.get("tool_calls") or []
        if message.get("content") or not calls:
            told = (choice.get("logprobs") or {}).get("content")
            status = "incomplete" if choice.get("finish_reason") in _INCOMPLETE else "completed"
            items.append(self.message(len(items), message.get("content") or "", told, status))
        for call in calls:
            items.append(self.call(len(items), call))
        return items


def words_of_usage(usage: Any) -> Json | None:
    """A chat's usage in the words of the Responses API, None if there is none."""
    if not isinstance(usage, Mapping):
        return None
    read, made = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    more = {key: value for key, value in read.items() if value is not None}
    return {
        "input_tokens": usage.get("prompt_tokens") or 0,
        "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0, **more},
        "output_tokens": usage.get("completion_tokens") or 0,
        "output_tokens_details": {"reasoning_tokens": made.get("reasoning_tokens") or 0},
        "total_tokens": usage.get("total_tokens") or 0,
    }
