"""A Responses body as a chat body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from braid.errors import BadRequest
from router.responses.items import messages
from router.validate import check_internal

Json = dict[str, Any]

_SAME = frozenset(
    {"model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens"}
    | {"presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "ignore_eos"}
    | {"parallel_tool_calls", "skip_special_tokens", "include_stop_str_in_output", "structured_outputs"}
    | {"reasoning", "reasoning_effort", "include_reasoning", "chat_template_kwargs", "mm_processor_kwargs"}
    | {"user", "priority", "cache_salt", "vllm_xargs"}
)
"""Fields that a chat body has by the same name, with the same meaning."""
_HINTS = frozenset({"prompt_cache_key", "prompt_cache_retention", "safety_identifier"})
"""Fields that may be left unread: no answer depends on them."""
_OWN = frozenset(
    {"input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "stream", "stream_options"}
    | {"include", "top_logprobs", "metadata"}
)
_WITHOUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "store": (lambda v: v is False, "nothing is stored here: leave it out or send false"),
    "background": (lambda v: v is False, "there are no background responses here: wait for this one"),
    "previous_response_id": (lambda v: False, "nothing is stored here: send the earlier turns in input"),
    "conversation": (lambda v: False, "nothing is stored here: send the earlier turns in input"),
    "prompt": (lambda v: False, "there are no stored prompts here: send instructions and input"),
    "max_tool_calls": (lambda v: False, "it limits built-in tools, and there are none here"),
    "truncation": (lambda v: v == "disabled", "nothing is left out of a long input: send less"),
    "service_tier": (lambda v: v in ("auto", "default"), "there is one tier: auto or default"),
}
"""Fields whose promise is not kept here, with the values that promise nothing. Null is always one."""
_INCLUDED = frozenset({"message.output_text.logprobs", "reasoning.encrypted_content"})
"""What ``include`` may name. Reasoning is never encrypted: it comes as text whether or not it is named."""
MAX_METADATA = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """What the reply repeats of a request. ``fields`` are as the client sent them, checked."""

    fields: Mapping[str, Any]
    stream: bool


def translate(body: Json) -> tuple[Json, Asked]:
    """The chat body that asks the same, and what the reply repeats.

    Raises:
        BadRequest: a field is malformed, unknown, or promises what is not kept here.
    """
    check_internal(body)
    for field, (harmless, why) in _WITHOUT.items():
        if body.get(field) is not None and not harmless(body[field]):
            raise BadRequest(f"{field} is not supported: {why}.", param=field)
    if unknown := sorted(body.keys() - _SAME - _HINTS - _OWN - _WITHOUT.keys()):
        raise BadRequest("The Responses API here has no such field.", param=unknown[0][:100])
    chat: Json = {key: body[key] for key in _SAME & body.keys() if body[key] not in (None, {})}
    chat["messages"] = messages(body.get("instructions"), body.get("input"))
    if (limit := body.get("max_output_tokens")) is not None:
        chat["max_completion_tokens"] = limit
    chat |= _format(body.get("text")) | _tools(body.get("tools"), body.get("tool_choice")) | _logprobs(body)
    _check_metadata(body.get("metadata"))
    if not isinstance(body.get("stream"), bool | None):
        raise BadRequest("stream must be true or false.", param="stream")
    stream = bool(body.get("stream"))
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return chat, Asked(dict(body), stream)


def _format(text: Any) -> Json:
    """``text.format`` as ``response_format``."""
    if text is None:
        return {}
    if not isinstance(text, dict) or not text.keys() <= {"format", "verbosity"}:
        raise BadRequest("text must be an object with format.", param="text")
    if text.get("verbosity") not in (None, "medium"):
        raise BadRequest("text.verbosity is not supported: say it in instructions.", param="text.verbosity")
    wanted = text.get("format")
    if wanted is None:
        return {}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind in ("text", "json_object"):
        return {} if kind == "text" else {"response_format": {"type": "json_object"}}
    if kind != "json_schema":
        raise BadRequest("text.format must be of type text, json_object or json_schema.", param="text.format")
    schema = {key: wanted[key] for key in ("name", "schema", "strict", "description") if key in wanted}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", **schema}}}


def _tools(tools: Any, choice: Any) -> Json:
    """Function tools and the choice among them, one level deeper as chat has them."""
    found: Json = {}
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRequest("tools must be a list of objects.", param="tools")
        if any(tool.get("type") != "function" for tool in tools):
            raise BadRequest(
                "Only tools of type function are served: there are no built-in ones.", param="tools"
            )
        keys = ("name", "description", "parameters", "strict")
        found["tools"] = [
            {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}
            for tool in tools
        ]
    if isinstance(choice, dict):
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise BadRequest(
                "tool_choice must be auto, none, required or a function's name.", param="tool_choice"
            )
        choice = {"type": "function", "function": {"name": choice["name"]}}
    if choice is not None and (found or choice not in ("auto", "none")):
        found["tool_choice"] = choice
    return found


def _logprobs(body: Json) -> Json:
    include = body.get("include") or []
    if not isinstance(include, list) or not all(isinstance(one, str) and one in _INCLUDED for one in include):
        raise BadRequest(f"include may hold {' and '.join(sorted(_INCLUDED))} only.", param="include")
    if "message.output_text.logprobs" not in include:
        return {}
    return {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    texts = isinstance(metadata, dict) and all(
        isinstance(v, str) and len(v) <= 512 for v in metadata.values()
    )
    if not texts or len(metadata) > MAX_METADATA or any(len(key) > 64 for key in metadata):
        raise BadRequest(f"metadata must be at most {MAX_METADATA} short strings by name.", param="metadata")
