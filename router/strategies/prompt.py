"""What strategies change in a request's body. Each function returns a new body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braid.errors import BadRequest
from router.strategies.options import ManyOptions, ReasonedOptions


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


def reasoned(body: Mapping[str, Any], options: ReasonedOptions) -> dict[str, Any]:
    """``body`` with the trigger if ``cot`` is on; raises as :func:`with_trigger`."""
    return with_trigger(body, options.trigger) if options.cot else dict(body)


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


def with_context(body: Mapping[str, Any], context: str) -> dict[str, Any]:
    """``body`` with ``context`` right before the text of the last user message, or before the prompt.

    Raises:
        BadRequest: there is no such text.
    """
    if "messages" not in body:
        prompt = body.get("prompt")
        prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        if not isinstance(prompt, str):
            raise BadRequest("documents can be put before one prompt of text only", param="prompt")
        return {**body, "prompt": context + prompt}
    messages = list(body["messages"])
    for at in reversed(range(len(messages))):
        if messages[at].get("role") == "user":
            content = messages[at].get("content")
            text = content if isinstance(content, str) else None
            parts = context + text if text is not None else [{"type": "text", "text": context}, *content]
            messages[at] = {**messages[at], "content": parts}
            return {**body, "messages": messages}
    raise BadRequest("documents need a user message to go before: add one", param="messages")


def sampled(body: Mapping[str, Any], options: ManyOptions) -> dict[str, Any]:
    """The body of N samples to choose from: the trigger if ``cot`` is on, and a temperature."""
    return with_sampling(reasoned(body, options), options.n)


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


_SHAPE = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "functions")


def in_prose(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` without what forces the shape of the client's answer (tools, a schema, stop strings): for
    calls whose answer the strategy reads itself."""
    return {key: value for key, value in body.items() if key not in (*_SHAPE, "stop", "min_tokens")}


def with_turn(body: Mapping[str, Any], said: str, reply: str) -> dict[str, Any]:
    """``body`` followed by ``said`` in the model's name and by ``reply`` in the user's.

    Raises:
        BadRequest: the prompt is not one text.
    """
    if "messages" in body:
        turns = [{"role": "assistant", "content": said}, {"role": "user", "content": reply}]
        return {**body, "messages": [*body["messages"], *turns]}
    return {**body, "prompt": _prompt(body.get("prompt"), f"{said}\n\n{reply}\n")}
