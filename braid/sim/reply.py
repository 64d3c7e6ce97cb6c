"""Words samples as vLLM's OpenAI layer does; each reply says that it is simulated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from braid.sim.draws import Draw
from braid.sim.request import Ask

JSON_HEADERS = (("content-type", "application/json"),)
SSE_HEADERS = (("content-type", "text/event-stream; charset=utf-8"),)
DONE = b"data: [DONE]\n\n"

Json = dict[str, Any]


class Words:
    """Words the choices of one request.

    Args:
        model: the served name; it begins with ``sim``.
        fingerprint: of the worker; it begins with ``sim``.
    """

    def __init__(self, ask: Ask, model: str, request_id: str, fingerprint: str) -> None:
        self._ask = ask
        self._head: Json = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._chunk_head = {
            **self._head,
            "object": "chat.completion.chunk" if ask.chat else "text_completion",
        }

    def choice(self, index: int, draw: Draw, count: int, finish: str) -> Json:
        """The whole choice of a sample that ended after ``count`` tokens."""
        text = draw.said(count)
        said: Json = (
            {"message": {"role": "assistant", "content": text, "tool_calls": []}}
            if self._ask.chat
            else {"text": text}
        )
        choice = {
            "index": index,
            **said,
            "logprobs": self._logprobs(draw, 0, count),
            "finish_reason": finish,
            "stop_reason": None,
        }
        if self._ask.token_ids:
            choice["token_ids"] = draw.ids(count)
        return choice

    def whole(self, choices: Sequence[Json], usage: Json) -> bytes:
        """A reply that is not streamed."""
        return msgspec.json.encode({**self._head, "choices": list(choices), "usage": usage})

    def first(self, index: int) -> bytes:
        """The event that opens a chat's choice; completions have none."""
        if not self._ask.chat:
            return b""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def token(self, index: int, draw: Draw, i: int, finish: str | None) -> bytes:
        """The event of token ``i``; the last one carries the finish reason."""
        text = draw.piece(i)
        said: Json = {"delta": {"content": text}} if self._ask.chat else {"text": text}
        return self._event(index, said, self._logprobs(draw, i, i + 1), finish)

    def cut(self, index: int) -> bytes:
        """The event that ends an aborted sample."""
        said: Json = {"delta": {}} if self._ask.chat else {"text": ""}
        return self._event(index, said, None, "abort")

    def last(self, usage: Json) -> bytes:
        """What ends a stream."""
        if not self._ask.include_usage:
            return DONE
        return _sse({**self._chunk_head, "choices": [], "usage": usage}) + DONE

    def _event(self, index: int, said: Json, logprobs: Json | None, finish: str | None) -> bytes:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return _sse({**self._chunk_head, "choices": [choice]})

    def _logprobs(self, draw: Draw, first: int, last: int) -> Json | None:
        top = self._ask.logprobs
        if top is None:
            return None
        return (_chat_logprobs if self._ask.chat else _text_logprobs)(draw, first, last, top)


def usage(prompt: int, cached: int, generated: int) -> Json:
    """A usage object: the prompt's tokens, those of them found in the cache, and all samples' tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error(status: int, body: Mapping[str, Any]) -> bytes:
    """An error as the engine words it: its code is the status."""
    told = {**body["error"], "code": status}
    return msgspec.json.encode({"error": told})


def _sse(data: Json) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _chat_logprobs(draw: Draw, first: int, last: int, top: int) -> Json:
    return {
        "content": [
            {
                **_named(draw.piece(i), draw.logprob(i)),
                "top_logprobs": [_named(*pair) for pair in draw.top(i, top)],
            }
            for i in range(first, last)
        ]
    }


def _named(piece: str, logprob: float) -> Json:
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}


def _text_logprobs(draw: Draw, first: int, last: int, top: int) -> Json:
    places = range(first, last)
    return {
        "tokens": [draw.piece(i) for i in places],
        "token_logprobs": [draw.logprob(i) for i in places],
        "top_logprobs": [dict(draw.top(i, max(1, top))) for i in places],
        "text_offset": [i * len(draw.piece(0)) for i in places],
    }


def tokenized(prompt: Sequence[int], max_model_len: int) -> bytes:
    """The answer of ``/tokenize``."""
    return msgspec.json.encode({"count": len(prompt), "max_model_len": max_model_len, "tokens": list(prompt)})
