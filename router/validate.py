"""Requests that can't be served as they are, found without the model.

What needs the model (context length, vocabulary, templates) is left to the engine behind, whose errors
pass through. Messages say what to do and never echo the input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from braid.errors import BadRequest
from router.schema import check_schema

MAX_DEPTH = 128
MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_STOP_CHARS = 4096
MAX_BIASES = 1024
MAX_TOKENS = 2**31 - 1
MAX_MODEL_CHARS = 256
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

Endpoint = Literal["chat", "completions"]
Json = Mapping[str, Any]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_GROUP = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN_KEY = re.compile(r"[0-9]{1,10}")
_INTERNAL = ("kv_transfer_params", "ec_transfer_params", "kv_hints", "request_id")
_ASSISTANT_WITHOUT_CONTENT = (
    "tool_calls",
    "function_call",
    "refusal",
    "audio",
    "reasoning",
    "reasoning_content",
)


@dataclass(frozen=True, slots=True)
class Request:
    """What the router needs to know of a valid body.

    Attributes:
        n: samples a prompt, None where the client did not say.
        prompts: prompts in the body.
        chars: characters of the prompt; for token ids, their number.
        unshareable: whether a remote prefill can't serve it.
    """

    body: dict[str, Any]
    model: str | None
    n: int | None
    prompts: int
    chars: int
    stream: bool
    unshareable: bool


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request body, strictly.

    Raises:
        BadRequest: it is not valid UTF-8 JSON (so no NaN, no number out of range, no lone surrogate),
            not an object, or nested too deep.
    """
    if not raw.strip():
        raise BadRequest("The request body is empty; send a JSON object.", code="invalid_json")
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except msgspec.ValidationError:
        raise BadRequest("A number in the body is out of range.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadRequest("The request body is not valid UTF-8 JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("The request body must be a JSON object.", code="invalid_json")
    # Fewer brackets than the limit can't nest deeper than it: the walk is for the rest.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth_over(value, MAX_DEPTH):
        raise _too_deep()
    return value


def check_request_id(value: str) -> str:
    """The client's request id; raises :class:`BadRequest` if it can't be used."""
    if not _REQUEST_ID.fullmatch(value):
        raise BadRequest("X-Request-Id must be 1 to 128 characters of A-Z a-z 0-9 . _ -")
    return value


def check_group(value: str) -> str:
    """The client's id of a group; raises :class:`BadRequest` if it can't be used."""
    if not _GROUP.fullmatch(value):
        raise BadRequest(
            "X-Braid-Group must be 1 to 64 characters of A-Z a-z 0-9 . _ -", param="X-Braid-Group"
        )
    return value


def validate(endpoint: Endpoint, body: dict[str, Any], max_n: int) -> Request:
    """Check a chat or completion body; raises :class:`BadRequest`."""
    check_internal(body)
    model = body.get("model")
    if model is not None and not (isinstance(model, str) and 0 < len(model) <= MAX_MODEL_CHARS):
        raise _bad("model", "must be a model's name")
    _check_numbers(body, max_n)
    _check_stop(body)
    _check_bias(body)
    _check_stream(body)
    _check_logprobs(endpoint, body)
    _check_response_format(body)
    if endpoint == "chat":
        _check_tools(body)
        prompts, chars = 1, _check_messages(body.get("messages"))
    else:
        prompts, chars = _check_prompt(body.get("prompt"))
    return Request(
        body=body,
        model=model,
        n=body.get("n"),
        prompts=prompts,
        chars=chars,
        stream=body.get("stream") is True,
        unshareable=bool(body.get("echo") or body.get("suffix") or body.get("prompt_logprobs") is not None),
    )


def prompt_chars(body: Json) -> int:
    """Characters of a body's prompt, or its token ids; raises :class:`BadRequest` if it has none."""
    return _check_messages(body["messages"]) if "messages" in body else _check_prompt(body.get("prompt"))[1]


# Rules of single fields


def integer(value: object, low: int, high: int) -> bool:
    """Whether it is an integer (not a bool) within the bounds."""
    return type(value) is int and low <= value <= high


def number(value: object, low: float, high: float) -> bool:
    """Whether it is a number (not a bool) within the bounds."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


_INT64 = 2**63
_Rule = tuple[Callable[[object], bool], str]
_RULES: dict[str, _Rule] = {
    "temperature": (lambda v: number(v, 0, 2), "must be a number from 0 to 2"),
    "top_p": (lambda v: number(v, 0, 1) and v != 0, "must be a number over 0, at most 1"),
    "min_p": (lambda v: number(v, 0, 1), "must be a number from 0 to 1"),
    "top_k": (lambda v: integer(v, -1, MAX_TOKENS), "must be an integer: -1, 0 (both off) or more"),
    "presence_penalty": (lambda v: number(v, -2, 2), "must be a number from -2 to 2"),
    "frequency_penalty": (lambda v: number(v, -2, 2), "must be a number from -2 to 2"),
    "repetition_penalty": (lambda v: number(v, 0, 1e6) and v != 0, "must be a number over 0"),
    "max_tokens": (lambda v: integer(v, 1, MAX_TOKENS), "must be a positive integer"),
    "max_completion_tokens": (lambda v: integer(v, 1, MAX_TOKENS), "must be a positive integer"),
    "min_tokens": (lambda v: integer(v, 0, MAX_TOKENS), "must be an integer, 0 or more"),
    "priority": (lambda v: integer(v, -MAX_TOKENS, MAX_TOKENS), "must be a 32-bit integer"),
    "seed": (lambda v: integer(v, -_INT64, _INT64 - 1), "must be a 64-bit integer"),
    "prompt_logprobs": (lambda v: integer(v, -1, MAX_TOKENS), "must be an integer, -1 or more"),
    "top_logprobs": (lambda v: integer(v, -1, MAX_TOKENS), "must be an integer, 0 or more"),
    "echo": (lambda v: isinstance(v, bool), "must be true or false"),
    "ignore_eos": (lambda v: isinstance(v, bool), "must be true or false"),
    "suffix": (lambda v: isinstance(v, str), "must be a string"),
    "user": (lambda v: isinstance(v, str), "must be a string"),
    "stop_token_ids": (
        lambda v: isinstance(v, list) and all(integer(i, 0, MAX_TOKENS) for i in v),
        "must be a list of token ids",
    ),
}


def _check_numbers(body: Json, max_n: int) -> None:
    for field, (fits, message) in _RULES.items():
        value = body.get(field)
        if value is not None and not fits(value):
            raise _bad(field, message)
    n = body.get("n")
    if n is not None and not integer(n, 1, max_n):
        raise _bad("n", f"must be an integer from 1 to {max_n}")


def check_internal(body: Json) -> None:
    """Raise :class:`BadRequest` if ``body`` has a field that only the cluster itself may set."""
    for field in _INTERNAL:
        if field in body:
            raise _bad(field, "is internal to the cluster and is refused from clients")
    extra = body.get("vllm_xargs")
    if extra is not None and not isinstance(extra, dict):
        raise _bad("vllm_xargs", "must be an object")
    if extra and "kv_transfer_params" in extra:
        raise _bad("vllm_xargs", "must not hold kv_transfer_params: it is internal to the cluster")
    kwargs = body.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise _bad("chat_template_kwargs", "must be an object")
    if kwargs and "chat_template" in kwargs:
        raise _bad("chat_template_kwargs", "must not hold chat_template: it is not taken from clients")
    if body.get("chat_template") is not None:
        raise _bad("chat_template", "is not taken from clients")


def _check_stop(body: Json) -> None:
    stop = body.get("stop")
    if stop is None:
        return
    stops = stop if isinstance(stop, list) else [stop]
    if not 1 <= len(stops) <= MAX_STOPS:
        raise _bad("stop", f"must be one to {MAX_STOPS} strings")
    if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise _bad("stop", f"must be strings of 1 to {MAX_STOP_CHARS} characters")


def _check_bias(body: Json) -> None:
    bias = body.get("logit_bias")
    if bias is None:
        return
    if not isinstance(bias, dict) or len(bias) > MAX_BIASES:
        raise _bad("logit_bias", f"must be an object of at most {MAX_BIASES} entries")
    if not all(_TOKEN_KEY.fullmatch(key) and number(value, -100, 100) for key, value in bias.items()):
        raise _bad("logit_bias", "must map token ids to numbers from -100 to 100")


def _check_stream(body: Json) -> None:
    if not isinstance(body.get("stream"), bool | None):
        raise _bad("stream", "must be true or false")
    options = body.get("stream_options")
    if options is None:
        return
    if not body.get("stream"):
        raise _bad("stream_options", "needs stream to be true")
    if not isinstance(options, dict) or not all(isinstance(value, bool | None) for value in options.values()):
        raise _bad("stream_options", "must be an object of true or false values")


def _check_logprobs(endpoint: Endpoint, body: Json) -> None:
    logprobs = body.get("logprobs")
    if endpoint == "completions":
        if logprobs is not None and not integer(logprobs, -1, MAX_TOKENS):
            raise _bad("logprobs", "must be an integer, 0 or more")
        return
    if not isinstance(logprobs, bool | None):
        raise _bad("logprobs", "must be true or false")
    if body.get("top_logprobs") and not logprobs:
        raise _bad("top_logprobs", "needs logprobs to be true")


def _check_response_format(body: Json) -> None:
    response_format = body.get("response_format")
    if response_format is None:
        return
    if not isinstance(response_format, dict) or not isinstance(response_format.get("type"), str):
        raise _bad("response_format", "must be an object with a type")
    if response_format["type"] != "json_schema":
        return
    wrapper = response_format.get("json_schema")
    schema = wrapper.get("schema", wrapper.get("json_schema")) if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        raise _bad("response_format", "of type json_schema needs json_schema.schema, an object")
    problem = check_schema(schema)
    if problem:
        raise _bad("response_format", problem)


def _check_tools(body: Json) -> None:
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise _bad("tools", "must be a list of objects")
        for tool in tools:
            function = tool.get("function")
            schema = function.get("parameters") if isinstance(function, dict) else None
            problem = check_schema(schema) if isinstance(schema, dict) else ""
            if problem:
                raise _bad("tools", problem)
    choice = body.get("tool_choice")
    if choice is not None and choice != "none" and not tools:
        raise _bad("tool_choice", "needs tools")


def _check_messages(messages: object) -> int:
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "must be a list of at least one message")
    return sum(_check_message(position, message) for position, message in enumerate(messages))


def _check_message(position: int, message: object) -> int:
    where = f"messages[{position}]"
    if not isinstance(message, dict):
        raise _bad(where, "must be an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(f"{where}.role", f"must be one of {', '.join(sorted(ROLES))}")
    content = message.get("content")
    if content is None:
        if role == "assistant" and any(message.get(key) for key in _ASSISTANT_WITHOUT_CONTENT):
            return 0
        raise _bad(f"{where}.content", "must not be null")
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise _bad(f"{where}.content", "must be a string or a list of content parts")
    return sum(_check_part(f"{where}.content", part) for part in content)


def _check_part(where: str, part: Json) -> int:
    if not isinstance(part.get("type"), str):
        raise _bad(where, "parts need a type")
    text = part.get("text")
    if part["type"] == "text" and not isinstance(text, str):
        raise _bad(where, "parts of type text need a text")
    return len(text) if isinstance(text, str) else 0


def _check_prompt(prompt: object) -> tuple[int, int]:
    """Prompts and characters (or token ids)."""
    if isinstance(prompt, str) and prompt:
        return 1, len(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise _bad("prompt", "must be a text or a list of token ids, or a list of either; not empty")
    if isinstance(prompt[0], str):
        if not all(isinstance(text, str) and text for text in prompt):
            raise _bad("prompt", "must be texts, none empty, in a list that begins with one")
        return _count_prompts(prompt), sum(map(len, prompt))
    if isinstance(prompt[0], list):
        if not all(isinstance(ids, list) and ids and _are_token_ids(ids) for ids in prompt):
            raise _bad("prompt", "must be lists of token ids, none empty, in a list that begins with one")
        return _count_prompts(prompt), sum(map(len, prompt))
    if not _are_token_ids(prompt):
        raise _bad(
            "prompt", "must hold token ids only, integers of 0 or more, in a list that begins with one"
        )
    return 1, len(prompt)


def _count_prompts(prompts: list[Any]) -> int:
    if len(prompts) > MAX_PROMPTS:
        raise _bad("prompt", f"must be at most {MAX_PROMPTS} prompts")
    return len(prompts)


def _are_token_ids(ids: list[Any]) -> bool:
    return all(type(i) is int for i in ids) and min(ids) >= 0 and max(ids) <= MAX_TOKENS


def _depth_over(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        below: list[object] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            below += [child for child in children if isinstance(child, dict | list)]  # type: ignore[attr-defined]
        if not below:
            return False
        level = below
    return True


def _too_deep() -> BadRequest:
    return BadRequest(f"The request body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _bad(field: str, message: str) -> BadRequest:
    return BadRequest(f"{field} {message}.", param=field)
