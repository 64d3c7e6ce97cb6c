"""Beam search in one dispatch: vLLM's own, whose steps are many requests of one token over one prompt.

A dispatch of mode ``samples`` with ``use_beam_search`` answers with one sample, the best beam. The width is
``beam_width`` of the body's ``vllm_xargs``, so that a group of it is one sample to the router and is never
split over workers. The best beam's choice has all of them in ``beams``, best first: text, log-probability
(if the body asks for log-probabilities), tokens, finish reason.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError
from vllm.outputs import CompletionOutput, RequestOutput

from braid import wire

WIDTH = "beam_width"
_FLAG: TypeAdapter[bool | None] = TypeAdapter(bool | None)
"""As vLLM reads it: ``"no"`` is false."""


def searches(body: bytes) -> int:
    """How many beam searches a body asks for: one a prompt."""
    if b"use_beam_search" not in body:
        return 0
    fields = _object(body)
    try:
        asked = _FLAG.validate_python(fields.get("use_beam_search"))
    except ValidationError:  # vLLM refuses it
        return 0
    if not asked:
        return 0
    prompts = fields.get("prompt")
    if not isinstance(prompts, list) or all(isinstance(token, int) for token in prompts):
        return 1
    return len(prompts)


def widened(body: bytes) -> bytes:
    """The body as vLLM takes it: the width is its ``n``."""
    fields = _object(body)
    extra = dict(fields.get("vllm_xargs") or {})
    width = extra.pop(WIDTH, None)
    fields["vllm_xargs"] = extra or None
    return json.dumps({**fields, "n": width or fields.get("n"), "stream": False}).encode()


def best(ref: int, number: int, reply: bytes, tokens: int) -> wire.Sample:
    """The best beam of vLLM's reply as a sample. ``tokens``: all that the search has generated."""
    choices = _object(reply)["choices"]
    choice = {**choices[0], "beams": [_told(one) for one in choices]}
    finish = choice.get("finish_reason") or ""
    state: Any = "cancelled" if finish == "abort" else "finished"
    return wire.Sample(ref, number, state, json.dumps(choice).encode(), _text(choice), finish, tokens)


def aborted(request_id: str, prompt: Any) -> RequestOutput:
    """What a step that is no longer wanted answers: vLLM's search then ends with the beams it has."""
    nothing = CompletionOutput(0, "", [], None, None, finish_reason="abort")
    return RequestOutput(request_id, None, prompt.get("prompt_token_ids"), None, [nothing], True)


def _told(choice: dict[str, Any]) -> dict[str, Any]:
    told = choice.get("logprobs") or {}
    if "content" in told:
        values = [token.get("logprob") for token in told["content"] or ()]
    else:
        values = list(told.get("token_logprobs") or ())
    known = [value for value in values if value is not None]
    return {
        "text": _text(choice),
        "logprob": sum(known) if known else None,
        "tokens": len(values),
        "finish_reason": choice.get("finish_reason"),
    }


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    return (message.get("content") if message is not None else choice.get("text")) or ""


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
