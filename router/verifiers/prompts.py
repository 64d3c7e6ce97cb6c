"""The prompts of verifications."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from braid.errors import BadRequest
from braid.thinking import without_thinking

if TYPE_CHECKING:
    from router.strategies.run import Run

_PREFIX = ("model", "messages", "prompt", "tools", "documents", "chat_template_kwargs", "add_special_tokens")
"""Fields that decide the prompt's tokens, which must be the same for their KV to be used again."""
_KEPT = (*_PREFIX, "seed", "cache_salt", "priority")


def bare(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` without the client's way of sampling and the shape of its answer."""
    kept = {key: body[key] for key in _KEPT if body.get(key) is not None}
    return kept | ({"tool_choice": "none"} if kept.get("tools") else {})


def followed(body: Mapping[str, Any], said: str, request: str) -> dict[str, Any]:
    """``body`` after the model said ``said``, followed by the user's ``request``. The text of the prompt is
    repeated as it was, so that its tokens are.

    Raises:
        BadRequest: the prompt is not one text.
    """
    if "messages" in body:
        turns = [{"role": "assistant", "content": said}, {"role": "user", "content": request}]
        return {**body, "messages": [*body["messages"], *turns]}
    return {**body, "prompt": f"{_text(body.get('prompt'))}{said}\n\n{request}\n"}


def alone(body: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """``body`` with ``prompt`` as all that is asked."""
    rest = {key: value for key, value in body.items() if key not in ("messages", "tools", "tool_choice")}
    if "messages" in body:
        return {**rest, "messages": [{"role": "user", "content": prompt}]}
    return {**rest, "prompt": prompt}


def question(body: Mapping[str, Any], run: Run | None = None) -> str:
    """The text of the last user message, or the prompt; without the trigger that ``run``, if it is given,
    appended.

    Raises:
        BadRequest: there is none.
    """
    text = _asked(body)
    options = None if run is None else run.options
    trigger = getattr(options, "trigger", None) if getattr(options, "cot", True) else None
    return text.removesuffix(f"\n{trigger}") if trigger else text


def answer(text: str) -> str:
    """What is verified of a sample: its text without its thinking."""
    return without_thinking(text)


def _asked(body: Mapping[str, Any]) -> str:
    if "messages" not in body:
        return _text(body.get("prompt"))
    for message in reversed(body["messages"]):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = [part.get("text") for part in content or () if part.get("type") == "text"]
            return "\n".join(part for part in parts if part)
    raise BadRequest("there is no user message: add one", param="messages")


def _text(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("a verifier or retriever reads one prompt of text only", param="prompt")
    return prompt
