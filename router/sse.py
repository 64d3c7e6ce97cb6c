"""Joining what several decode workers answer into one OpenAI response.

Everything here is pure: bytes in, bytes out. A joined stream has each choice under its number in the
whole request, one id, one usage chunk, one ``[DONE]``; the proof of path rides on the last chunk that
carries a finish reason, which is therefore held back until every share has ended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_USAGE_ONLY = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_ERROR = re.compile(rb'data:\s*\{\s*"error"\s*:')
_BOUNDARY = re.compile(rb"\r?\n\r?\n")

Json = dict[str, Any]


class Broken(ValueError):
    """A worker sent something that is not an OpenAI stream or response."""


def event(data: Mapping[str, Any]) -> bytes:
    """One SSE event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class Joiner:
    """Joins the streams of the shares of one request.

    ``feed`` returns what can be sent now. When every share has ended, ``finish`` returns the rest.
    With one share chunks pass through untouched but for the proof.
    """

    def __init__(self, firsts: Sequence[int], choices: int) -> None:
        """``firsts``: each share's first choice. ``choices``: how many finish reasons will come."""
        self.failed = False
        self._firsts = firsts
        self._missing = choices
        self._rest = [b""] * len(firsts)
        self._identity: Json = {}
        self._held: list[bytes] = []
        self._last: Json | None = None
        self._usage: dict[int, Json] = {}

    def feed(self, share: int, data: bytes) -> bytes:
        """Bytes of a share's stream, cut anywhere.

        Raises:
            Broken: an event is not a chunk.
        """
        *events, self._rest[share] = _BOUNDARY.split(self._rest[share] + data)
        ready = [self._event(share, raw) for raw in events if raw]
        return b"".join(ready)

    @property
    def usage(self) -> Json:
        """The usage of all shares that have told theirs; empty if none has."""
        return merge_usage([chunk["usage"] for chunk in self._usage.values()]) if self._usage else {}

    def finish(self, proof: Mapping[str, Any], **more: Any) -> bytes:
        """The last finish chunk with ``braid`` and ``more`` in it, merged usage, ``[DONE]``."""
        out = []
        if self._last is not None:
            out.append(event({**self._last, **more, "braid": proof}))
        out += self._held
        if self._usage:
            out.append(event(self._usage_chunk()))
        return b"".join(out) + (b"" if self.failed else DONE)

    def cut(self) -> bytes:
        """What was held back, for a stream that ends in an error: no proof, no ``[DONE]``."""
        held = [] if self._last is None else [event(self._last)]
        self._last = None
        return b"".join(held + self._held)

    def _event(self, share: int, raw: bytes) -> bytes:
        if raw.startswith(b"data: [DONE]") or raw == b"data:[DONE]":
            return b""
        if _ERROR.match(raw):
            self.failed = True
            return raw + b"\n\n"
        if len(self._firsts) > 1 or _FINISH.search(raw) or _USAGE_ONLY.search(raw):
            return self._chunk(share, raw)
        return self._pass(raw + b"\n\n")

    def _chunk(self, share: int, raw: bytes) -> bytes:
        chunk = parse_event(raw)
        if chunk is None:
            return self._pass(raw + b"\n\n")
        choices = chunk.get("choices") or []
        if not choices and chunk.get("usage"):
            self._usage[share] = chunk
            return b""
        self._renumber(share, chunk, choices)
        self._missing -= sum(1 for choice in choices if choice.get("finish_reason") is not None)
        if choices and self._missing <= 0 and self._last is None:
            self._last = chunk
            return b""
        return self._pass(event(chunk) if len(self._firsts) > 1 else raw + b"\n\n")

    def _renumber(self, share: int, chunk: Json, choices: list[Json]) -> None:
        if len(self._firsts) == 1:
            return
        for choice in choices:
            choice["index"] = choice.get("index", 0) + self._firsts[share]
        self._unify(chunk)

    def _unify(self, chunk: Json) -> None:
        if not self._identity:
            self._identity = {key: chunk[key] for key in ("id", "created") if key in chunk}
        chunk.update(self._identity)

    def _pass(self, raw: bytes) -> bytes:
        if self._last is not None:
            self._held.append(raw)
            return b""
        return raw

    def _usage_chunk(self) -> Json:
        chunks = [self._usage[share] for share in sorted(self._usage)]
        merged = {**chunks[0], "usage": merge_usage([chunk["usage"] for chunk in chunks])}
        if len(self._firsts) > 1:
            self._unify(merged)
        return merged


def parse_event(raw: bytes) -> Json | None:
    """The JSON of an SSE event, None if it carries no data (a comment).

    Raises:
        Broken: its data is not a JSON object.
    """
    lines = [line[5:].lstrip() for line in raw.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    return parse_object(b"\n".join(lines))


def parse_object(data: bytes) -> Json:
    """A JSON object that a worker sent; raises :class:`Broken`."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Broken("a worker's answer is not JSON") from None
    if not isinstance(value, dict):
        raise Broken("a worker's answer is not a JSON object")
    return value


def merge_usage(usages: Sequence[Mapping[str, Any]]) -> Json:
    """Usage of a request from its shares': the prompt once, every generated token."""
    merged = dict(usages[0])
    completion = sum(usage.get("completion_tokens") or 0 for usage in usages)
    merged["completion_tokens"] = completion
    merged["total_tokens"] = (merged.get("prompt_tokens") or 0) + completion
    details = [usage.get("completion_tokens_details") for usage in usages]
    known = [detail for detail in details if isinstance(detail, dict)]
    if known:
        merged["completion_tokens_details"] = {
            key: sum(detail.get(key) or 0 for detail in known) for key in known[0]
        }
    return merged


def join_bodies(shares: Sequence[tuple[int, Json]]) -> Json:
    """One response body from the shares' ``(first, body)``: choices in order, usage merged."""
    joined = dict(shares[0][1])
    if len(shares) == 1:
        return joined
    choices = []
    for first, share in shares:
        for choice in share.get("choices") or []:
            choices.append({**choice, "index": choice.get("index", 0) + first})
    joined["choices"] = sorted(choices, key=lambda choice: choice["index"])
    usages = [share["usage"] for _, share in shares if isinstance(share.get("usage"), dict)]
    if usages:
        joined["usage"] = merge_usage(usages)
    return joined
