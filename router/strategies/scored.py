"""Samples with their answers: reading, reporting, and the most confident of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from router import toolcalls
from router.equivalence import canonical
from router.extract import ExtractorName, extract
from router.sampler import Sample
from router.strategies.options import Options
from router.toolcalls import ToolPart


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with its answer and the answer's canonical key, both None if it has none.

    ``role`` says what it was drawn for, where a strategy sends more than one prompt.
    """

    sample: Sample
    answer: str | None = None
    key: str | None = None
    role: str = ""

    def report(self, with_text: bool) -> dict[str, Any]:
        """As in the reply."""
        sample = self.sample
        entry: dict[str, Any] = {
            "index": sample.index,
            "state": sample.state,
            "answer": self.answer,
            "tokens": sample.tokens,
            "mean_logprob": finite(sample.mean_logprob),
            "finish_reason": sample.finish_reason or None,
        }
        if self.role:
            entry["role"] = self.role
        if sample.error:
            entry["error"] = sample.error
        if with_text:
            entry["text"] = sample.text
        return entry

    def event(self) -> dict[str, Any]:
        """As in the progress of a stream."""
        sample = self.sample
        told = {"index": sample.index, "state": sample.state, "answer": self.answer, "tokens": sample.tokens}
        return {"event": "sample", **told} | ({"role": self.role} if self.role else {})


def finite(value: float) -> float | None:
    """Rounded for a report, None if it is not finite: JSON has no infinity."""
    return round(value, 6) if math.isfinite(value) else None


async def score(sample: Sample, options: Options, left_s: float, role: str = "") -> Scored:
    """``sample`` with its answer, found as ``options.extractor`` says. ``left_s`` bounds the algebra.

    Raises:
        BadRequest: the caller's pattern is refused.
    """
    if sample.state != "finished":
        return Scored(sample, role=role)
    part = _part(options.extractor, sample)
    if part is not None:
        answer, key = toolcalls.read(sample.choice, part) or (None, None)
        return Scored(sample, answer, key, role)
    truncated = sample.finish_reason == "length"
    name = cast("ExtractorName", options.extractor)
    answer = await extract(sample.text, name, options.pattern, truncated)
    key = None if answer is None else await canonical(answer, min(10.0, left_s))
    return Scored(sample, answer, key, role)


def _part(extractor: str, sample: Sample) -> ToolPart | None:
    """Which part of its tool calls is the sample's answer, None if its text holds it."""
    if extractor in toolcalls.TOOL_PARTS:
        return cast("ToolPart", extractor)
    return "tool_call" if extractor == "auto" and toolcalls.called(sample.choice) else None


def most_confident(scored: Iterable[Scored]) -> Scored:
    """The sample with the highest mean log-probability; a tie goes to the lowest submission index."""
    return max(scored, key=lambda one: (one.sample.mean_logprob, -one.sample.index))
