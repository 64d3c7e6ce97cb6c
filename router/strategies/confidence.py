"""How sure a model was of its tokens, read from the log-probabilities of a sample's choice."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Measure = Literal["lowest_group", "bottom_groups", "tail", "mean"]
MAX_TOP = 20
"""The most log-probabilities of a position that an engine gives by default."""


@dataclass(frozen=True, slots=True)
class Position:
    """A generated token and the most probable tokens at its place, by falling natural log-probability.

    The engine puts the sampled token first and cuts the list after it, so of k asked for the k - 1 most
    probable are sure to be there, and all k where the sampled one is among them.
    """

    token: str
    top: tuple[tuple[str, float], ...]


def with_top(body: Mapping[str, Any], top: int) -> dict[str, Any]:
    """``body`` asking for at least ``top`` log-probabilities at each position."""
    if "messages" in body:
        return {**body, "logprobs": True, "top_logprobs": max(top, body.get("top_logprobs") or 0)}
    return {**body, "logprobs": max(top, body.get("logprobs") or 0)}


def as_asked(choice: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """``choice`` without log-probabilities if the client's ``body`` asks for none."""
    given = body.get("logprobs")  # 0 is none but the sampled token's
    return {**choice, "logprobs": None} if given is None or given is False else {**choice}


def positions(choice: Mapping[str, Any]) -> list[Position]:
    """Of each generated token, the end of the sequence among them; empty if the choice has no
    log-probabilities. Reads those of chat and of completions."""
    told = choice.get("logprobs") or {}
    if "content" in told:
        return [
            _position(one["token"], [(top["token"], top["logprob"]) for top in one.get("top_logprobs") or ()])
            for one in told["content"] or ()
        ]
    tops = told.get("top_logprobs") or ()
    return [
        _position(token, list((top or {}).items()))
        for token, top in zip(told.get("tokens") or (), tops, strict=False)
    ]


def _position(token: str, top: list[tuple[str, float]]) -> Position:
    return Position(token, tuple(sorted(top, key=lambda one: -one[1])))


# DeepConf (Fu et al. 2025, arXiv 2508.15260)


def token_confidence(logprobs: Sequence[float], k: int) -> float:
    """C_t = -(1/k) sum over the k most probable tokens of log P(j); over fewer where fewer are given.
    Higher is surer: the rest of a peaked distribution is improbable. 0 where none is given."""
    most = sorted(logprobs, reverse=True)[:k]
    return -fmean(most) if most else 0.0


def confidences(choice: Mapping[str, Any], k: int) -> list[float]:
    """C_t of each token of a choice."""
    return [token_confidence([logprob for _, logprob in one.top], k) for one in positions(choice)]


def group_confidences(tokens: Sequence[float], window: int) -> list[float]:
    """C_G of each run of ``window`` tokens, the mean of theirs; of all tokens where there are fewer."""
    if len(tokens) <= window:
        return [fmean(tokens)] if tokens else []
    sums = [math.fsum(tokens[:window])]
    for leaves, comes in zip(tokens, tokens[window:], strict=False):
        sums.append(sums[-1] + comes - leaves)
    return [total / window for total in sums]


def trace_confidence(tokens: Sequence[float], measure: Measure, window: int, share: float = 0.1) -> float:
    """A sample's confidence; 0 if it has no tokens.

    ``lowest_group``: the least C_G; ``bottom_groups``: the mean of the lowest ``share`` of them (one at
    least); ``tail``: of the last ``window`` tokens; ``mean``: of all tokens.
    """
    if not tokens:
        return 0.0
    if measure == "mean":
        return fmean(tokens)
    if measure == "tail":
        return fmean(tokens[-window:])
    groups = sorted(group_confidences(tokens, window))
    return groups[0] if measure == "lowest_group" else fmean(groups[: max(1, int(len(groups) * share))])


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of ``values``, which are not empty, with linear interpolation."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


# CoT decoding (Wang & Zhou 2024, arXiv 2402.10200)


def margin(position: Position) -> float:
    """p(token) - p(the most probable other): p(top1) - p(top2) where the token is the most probable."""
    own = next((math.exp(logprob) for token, logprob in position.top if token == position.token), 0.0)
    return own - max((math.exp(lp) for token, lp in position.top if token != position.token), default=0.0)


def answer_margin(path: Sequence[Position], answer: str) -> float | None:
    """Delta: the mean margin over the tokens that ``answer`` is written with, where it stands last in the
    text of ``path``; None if it does not stand there."""
    text = "".join(one.token for one in path)
    span = last_span(text, answer)
    if span is None:
        return None
    margins, end = [], 0
    for one in path:
        start, end = end, end + len(one.token)
        if start < span[1] and end > span[0]:
            margins.append(margin(one))
    return fmean(margins)


def last_span(text: str, answer: str) -> tuple[int, int] | None:
    """Where ``answer`` stands last in ``text``, as a word of its own if it does anywhere."""
    whole = list(re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text))
    if whole:
        return whole[-1].span()
    start = text.rfind(answer) if answer else -1
    return None if start < 0 else (start, start + len(answer))
