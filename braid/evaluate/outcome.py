"""One problem answered by one method, and how a reply is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import httpx

from braid.client import Reply, refusal
from router.sampler import Sample
from router.strategies.options import Options
from router.strategies.scored import score


@dataclass(frozen=True, slots=True)
class Outcome:
    """A line of the file of outcomes.

    Attributes:
        method: the name of the method.
        id: of the problem.
        right: whether the answer equals the gold one.
        answer: what was found in the text, None if nothing was.
        samples: drawn for this reply, of all prompts.
        stopped_early: the strategy's reason, None where it went to its end.
        latency_s: from the request to the whole reply, of the attempt that was answered.
        path: how the KV came (``remote``, ``local``, ``recomputed``), empty where the server does not say.
        error: why there is no reply that can be judged, empty if there is one.
    """

    method: str
    id: str
    right: bool = False
    answer: str | None = None
    confidence: float | None = None
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    samples: int = 0
    stopped_early: str | None = None
    kv_bytes: int = 0
    kv_transfers: int = 0
    path: str = ""
    latency_s: float = 0.0
    attempts: int = 1
    request_id: str = ""
    status: int = 0
    error: str = ""

    def line(self) -> dict[str, Any]:
        """As it is written."""
        return {**asdict(self), "latency_s": round(self.latency_s, 6)}


_FIELDS = {field.name for field in fields(Outcome)}


def read(line: Mapping[str, Any]) -> Outcome:
    """The outcome of a line; raises :class:`ValueError` if it is none."""
    if not line.keys() <= _FIELDS or not {"method", "id", "right"} <= line.keys():
        raise ValueError("not an outcome")
    return Outcome(**line)


async def judge(method: str, problem: str, key: str, gold: str, options: Options, reply: Reply) -> Outcome:
    """The outcome of a reply: its answer is found and compared as the strategies do it.

    Args:
        key: the canonical key of ``gold``, the right answer.
        options: with the extractor and its pattern.

    Raises:
        BadRequest: the pattern is refused.
    """
    response = reply.response
    asked: dict[str, Any] = {"method": method, "id": problem, "attempts": reply.attempts}
    asked["latency_s"] = reply.seconds
    if response is None:
        return Outcome(**asked, error=reply.error)
    asked |= {"status": response.status_code, "request_id": response.headers.get("x-request-id", "")}
    if not response.is_success:
        return Outcome(**asked, error=refusal(response))
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        costs = _costs(body, response.headers)
    except (ValueError, LookupError, TypeError, AttributeError):
        return Outcome(**asked, error="the reply is no chat completion")
    finish = str(choice.get("finish_reason") or "")
    sample = Sample(0, "finished", text=str(text), finish_reason=finish, choice=choice)
    one = await score(sample, options, left_s=10.0)
    right = one.key is not None and (one.key == key or (one.key.startswith("tool_") and one.answer == gold))
    return Outcome(**asked, **costs, right=right, answer=one.answer, text=str(text), finish_reason=finish)


def _costs(body: Mapping[str, Any], headers: httpx.Headers) -> dict[str, Any]:
    """What the reply tells of tokens, samples and KV."""
    usage, report = body.get("usage") or {}, body.get("reasoning") or {}
    proof = body.get("braid") or {}
    details = usage.get("prompt_tokens_details") or {}
    return {
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "cached_tokens": int(details.get("cached_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
        "samples": len(report.get("samples") or ()) or 1,
        "stopped_early": report.get("stopped_early"),
        "confidence": report.get("confidence"),
        "kv_bytes": int(proof.get("kv_bytes", headers.get("x-braid-kv-bytes")) or 0),
        "kv_transfers": int(proof.get("kv_transfers", headers.get("x-braid-kv-transfers")) or 0),
        "path": str(proof.get("path") or headers.get("x-braid-path") or ""),
    }
