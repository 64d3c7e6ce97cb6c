"""The verdict of a sample that verifies, so that log-probabilities needn't leave the worker."""

from __future__ import annotations

from typing import Any

from braid import wire
from braid.verdict import Step, p_yes


def probability(completion: Any, verdict: wire.Verdict) -> float | None:
    """p(Yes) at the verdict of a finished ``CompletionOutput``; None if it has none."""
    text, truncated = completion.text, completion.finish_reason == "length"
    return p_yes(text, truncated, _steps(completion), verdict.yes, verdict.no)


def _steps(completion: Any) -> list[Step]:
    steps = []
    for token, candidates in zip(completion.token_ids, completion.logprobs or (), strict=False):
        known = tuple((one.decoded_token or "", one.logprob) for one in candidates.values())
        own = candidates.get(token)
        steps.append(Step((own.decoded_token if own else "") or "", known))
    return steps
