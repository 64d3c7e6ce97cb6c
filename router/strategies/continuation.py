r"""Going on from a partial answer: the request body that does it, and the choice that it adds up to.

The text so far is repeated as text. The decode worker that made the part puts its own tokens back; elsewhere
the tokeniser sees the text anew. What comes out are the sampled tokens wherever these are how the tokeniser
writes their text, which is the usual case. A text that was cut inside a word or a run of spaces may come out
as other tokens, and the model then continues a sequence it did not write. A cut at a blank line is safe where
the tokeniser has the sentence's end and the blank line as one token, since both are repeated. Bytes of a
character that the limit cut in half are left out of the text, and are generated again.

A chat template may strip the end of the last message (Llama's does). The model then writes the blank line
itself, which as a stop string would end the step before it began: see ``skip_separator``.

Penalties count from the last continuation on, as what came before is the engine's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from braid.errors import BadRequest
from router.sampler import Sample

_RESTART = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice")
_REFUSED = (*_RESTART, "tools", "functions", "echo", "suffix", "prompt_logprobs", "use_beam_search")


def check_continuable(body: Mapping[str, Any]) -> None:
    """Raise :class:`BadRequest` if answers to ``body`` can't be continued as text: a grammar would begin
    anew with each step, a tool call is no text, and token ids can't be joined with one."""
    for field in _REFUSED:
        if body.get(field) and not (field == "tools" and body.get("tool_choice") == "none"):
            raise BadRequest(f"a strategy that continues its samples can't do so with {field}", param=field)
    if "messages" not in body:
        _joined_prompt(body.get("prompt"), "")


def continued(body: Mapping[str, Any], text: str) -> dict[str, Any]:
    """``body`` with the answer begun by ``text``; as it is if that is empty.

    Raises:
        BadRequest: the prompt is not one text.
    """
    if not text:
        return dict(body)
    if "messages" not in body:
        return {**body, "prompt": _joined_prompt(body.get("prompt"), text)}
    messages = list(body["messages"])
    if body.get("continue_final_message"):  # the client's own beginning of the answer
        messages[-1] = {**messages[-1], "content": _joined_content(messages[-1].get("content"), text)}
    else:
        messages.append({"role": "assistant", "content": text})
    return {**body, "messages": messages, "add_generation_prompt": False, "continue_final_message": True}


def limited(body: Mapping[str, Any], max_tokens: int | None, done: int = 0) -> dict[str, Any]:
    """``body`` with this limit of generated tokens, or none; of the least number that the client wants,
    ``done`` have been generated."""
    body = {key: value for key, value in body.items() if key not in ("max_tokens", "max_completion_tokens")}
    if body.get("min_tokens"):
        least = max(0, body["min_tokens"] - done)
        body["min_tokens"] = least if max_tokens is None else min(least, max_tokens)
    return body if max_tokens is None else {**body, "max_tokens": max_tokens}


def extended(body: Mapping[str, Any], text: str, max_tokens: int | None, done: int = 0) -> dict[str, Any]:
    """``body`` with the answer begun by ``text``, as :func:`continued`, and a limit, as :func:`limited`."""
    return limited(continued(body, text), max_tokens, done)


def limit_of(body: Mapping[str, Any]) -> int | None:
    """The most tokens that the client wants generated, None if it does not say."""
    for field in ("max_completion_tokens", "max_tokens"):
        if body.get(field) is not None:
            return int(body[field])
    return None


def stopping(body: Mapping[str, Any], separator: str, skip_separator: bool = False) -> dict[str, Any]:
    """``body`` stopping at ``separator`` too. ``skip_separator``: not with the very first token, which a
    prompt without the separator at its end begins with."""
    given = body.get("stop") or []
    stops = [separator, *([given] if isinstance(given, str) else given)]
    body = {**body, "stop": list(dict.fromkeys(stops)), "include_stop_str_in_output": False}
    return {**body, "min_tokens": max(1, body.get("min_tokens") or 0)} if skip_separator else body


def joined_text(before: str, text: str, separator: str) -> str:
    """Two parts of an answer; one separator where both sides have it (the template stripped the first)."""
    if text.startswith(separator) and before.endswith(separator):
        return before.removesuffix(separator) + text
    return before + text


def joined_choice(before: Mapping[str, Any], choice: Mapping[str, Any], text: str) -> dict[str, Any]:
    """``choice`` of the last part as that of the whole answer ``text``; ``before`` is that of what came
    before it, empty if nothing did."""
    whole = {**choice}
    if "message" in choice:
        whole["message"] = {**(choice["message"] or {}), "content": text}
    else:
        whole["text"] = text
    if before.get("token_ids") and choice.get("token_ids"):
        whole["token_ids"] = [*before["token_ids"], *choice["token_ids"]]
    if before.get("prompt_token_ids"):
        whole["prompt_token_ids"] = before["prompt_token_ids"]
    earlier, later = before.get("logprobs"), choice.get("logprobs")
    if earlier and later:
        shift = sum(map(len, earlier.get("tokens") or ()))
        later = {**later, "text_offset": [shift + place for place in later.get("text_offset") or ()]}
        lists = {key: [*(earlier.get(key) or ()), *(value or ())] for key, value in later.items()}
        whole["logprobs"] = {key: lists[key] for key in choice["logprobs"]}
    return whole


def joined(before: Sample, sample: Sample, text: str, finish_reason: str = "") -> Sample:
    """``sample``, which went on from ``before``, as one of the whole answer ``text``: tokens,
    log-probability and choice are of both, ``finish_reason`` is its own if none is given."""
    finish_reason = finish_reason or sample.finish_reason
    known = before.logprob is not None and sample.logprob is not None
    choice = joined_choice(before.choice, sample.choice, text)
    return replace(
        sample,
        text=text,
        finish_reason=finish_reason,
        tokens=before.tokens + sample.tokens,
        logprob=(before.logprob or 0.0) + (sample.logprob or 0.0) if known else None,
        choice={**choice, "finish_reason": finish_reason},
    )


NOTHING = Sample(-1, "finished", logprob=0.0)
"""What the first part of an answer goes on from."""


def check_not_thinking(sample: Sample) -> None:
    """Raise :class:`BadRequest` if the engine has split thinking off ``sample``'s text: without it the text
    can't be continued."""
    message = sample.choice.get("message") or {}
    if message.get("reasoning") or message.get("reasoning_content"):
        raise BadRequest(
            "the engine splits this model's thinking off, so its text can't be continued: turn thinking "
            'off (chat_template_kwargs, usually {"enable_thinking": false})',
            param="reasoning.strategy",
        )


def _joined_prompt(prompt: Any, text: str) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("only a prompt of one text can be continued: send one string", param="prompt")
    return prompt + text


def _joined_content(content: Any, text: str) -> Any:
    if isinstance(content, str):
        return content + text
    last = content[-1] if isinstance(content, list) and content else None
    if not (isinstance(last, Mapping) and isinstance(last.get("text"), str)):
        raise BadRequest("the message to continue must end in text", param="messages")
    return [*content[:-1], {**last, "text": last["text"] + text}]
