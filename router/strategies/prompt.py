"""What strategies change in a request's body. Each function returns a new body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braid.errors import BadRequest


def with_trigger(body: Mapping[str, Any], trigger: str) -> dict[str, Any]:
    """``body`` with ``trigger`` on a line of its own after the last user message, or after the prompt.

    Raises:
        BadRequest: there is no such text to append to.
    """
    if "messages" not in body:
        return {**body, "prompt": _prompt(body.get("prompt"), trigger)}
    messages = list(body["messages"]) if isinstance(body["messages"], list) else []
    for at in reversed(range(len(messages))):
        message = messages[at]
        if isinstance(message, Mapping) and message.get("role") == "user":
            messages[at] = {**message, "content": _content(message.get("content"), trigger)}
            return {**body, "messages": messages}
    raise BadRequest("the trigger needs a user message to follow: add one", param="messages")


def _prompt(prompt: Any, trigger: str) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest(
            "a trigger can be appended to one prompt of text only: send one string, "
            "or set reasoning.cot to false",
            param="prompt",
        )
    return f"{prompt}\n{trigger}"


def _content(content: Any, trigger: str) -> Any:
    if isinstance(content, str):
        return f"{content}\n{trigger}"
    if not isinstance(content, list):
        raise BadRequest("content must be a string or a list of parts", param="messages")
    last = content[-1] if content else None
    if isinstance(last, Mapping) and last.get("type") == "text" and isinstance(last.get("text"), str):
        return [*content[:-1], {**last, "text": f"{last['text']}\n{trigger}"}]
    return [*content, {"type": "text", "text": trigger}]


def with_sampling(body: Mapping[str, Any], n: int) -> dict[str, Any]:
    """``body`` with OpenAI's default temperature of 1.0 where it gives none, whatever the model's own
    default is: samples must differ for a choice among them to mean something.

    Raises:
        BadRequest: it asks for several greedy samples, which would all be the same.
    """
    temperature = body.get("temperature")
    if temperature is None:
        return {**body, "temperature": 1.0}
    if n > 1 and temperature == 0:
        raise BadRequest(
            f"{n} samples at temperature 0 are all the same: raise temperature (1.0 is usual), "
            "leave it out, or use the strategy cot",
            param="temperature",
        )
    return dict(body)
