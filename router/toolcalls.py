"""Tool calls as answers: which tool a sample calls, with which arguments, or both.

Two calls are the same when names are equal and arguments are equal as JSON values: the order of keys and
the spelling of numbers (``1.0`` = ``1``) don't matter, nor does the order of parallel calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

ToolPart = Literal["tool_name", "tool_arguments", "tool_call"]
TOOL_PARTS: tuple[str, ...] = get_args(ToolPart)
MAX_ARGUMENTS = 32_768
"""Longer arguments, in characters, have no vote."""
MAX_CALLS = 32
"""More parallel calls than these have no vote."""


def read(choice: Mapping[str, Any], part: ToolPart) -> tuple[str, str] | None:
    """The answer and its canonical key in an OpenAI chat choice; None if it calls no tool, or where the
    arguments matter and are not valid JSON."""
    calls = called(choice)
    if not 0 < len(calls) <= MAX_CALLS:
        return None
    try:
        parts = sorted(_part(call, part) for call in calls)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return "; ".join(parts), f"{part}:{json.dumps(parts)}"


def called(choice: Mapping[str, Any]) -> list[Any]:
    """The tool calls of a choice."""
    message = choice.get("message")
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    return calls if isinstance(calls, list) else []


def _part(call: Any, part: ToolPart) -> str:
    function = call["function"]
    name = function["name"]
    if not isinstance(name, str) or not name:
        raise ValueError("a call needs a name")
    if part == "tool_name":
        return name
    arguments = _arguments(function.get("arguments") or "{}")
    return arguments if part == "tool_arguments" else f"{name}({arguments})"


def _arguments(text: Any) -> str:
    if not isinstance(text, str) or len(text) > MAX_ARGUMENTS:
        raise ValueError("arguments are a text of bounded length")
    value = json.loads(text, parse_float=_number, parse_constant=_refuse)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("out of range")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
