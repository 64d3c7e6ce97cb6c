"""The verdict of a sample that verifies, so that log-probabilities needn't leave the worker."""

from __future__ import annotations

from typing import Any

from braid import wire
from braid.verdict import Step, p_yes
from decode_server.pieces import Pieces


def probability(completion: Any, verdict: wire.Verdict, pieces: Pieces) -> float | None:
    """p(Yes) at the verdict of a finished ``CompletionOutput``; None if it has none."""
    text, truncated = completion.text, completion.finish_reason == "length"
    return p_yes(text, truncated, _steps(completion, pieces), verdict.yes, verdict.no)


def _steps(completion: Any, pieces: Pieces) -> list[Step]:
    texts = pieces.spell(completion.token_ids)
    return [
        Step(text, tuple((pieces[token], one.logprob) for token, one in candidates.items()))
        for text, candidates in zip(texts, completion.logprobs or (), strict=False)
    ]
