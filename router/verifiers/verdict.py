"""p(Yes) of one verification chain: where its verdict stands, and how probable a yes was there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from router.extract import without_thinking
from router.sampler import Sample

_AROUND = " \t\r\n*_`~\"'“”‘’.,:;!?()[]{}<>|▁Ġ"
"""What may stand around a verdict within its token."""
_MARK = r"(?:verification|verdict)\W{0,8}"
_TAIL = 64
"""Characters of the text that must be found again among the tokens, before its verdict and after it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token: its text, and the candidates in its place with their log-probabilities."""

    token: str
    candidates: tuple[tuple[str, float], ...]


def p_yes(chain: Sample, yes: Sequence[str], no: Sequence[str]) -> float | None:
    """The probability of all ``yes`` variants at the verdict of ``chain``, 0 to 1; None where the chain has
    no verdict, or tells no candidates. Zhang et al. 2024 (arXiv 2408.15240), equation 7."""
    verdict = verdict_at(chain.text, [*yes, *no], chain.finish_reason == "length")
    if verdict is None:
        return None
    step = _step_at(steps(chain), chain.text, verdict)
    if step is None or not step.candidates:
        return None
    return min(1.0, math.fsum(math.exp(logprob) for text, logprob in step.candidates if says(text, yes, no)))


def verdict_at(text: str, words: Iterable[str], truncated: bool = False) -> int | None:
    """Where in ``text`` the verdict begins: one of ``words`` after the last ``Verification:`` or
    ``Verdict:``, else as the very last word (of a text that was not cut off)."""
    thought = len(text) - len(without_thinking(text))
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    marked = re.compile(rf"(?i:{_MARK}({either}))(?!\w)")
    last = re.compile(rf"(?i:(?<!\w)({either}))\W{{0,{_TAIL}}}\Z")
    found = list(marked.finditer(text, thought))
    if found:
        return found[-1].start(1)
    ending = None if truncated else last.search(text, max(thought, len(text) - 2 * _TAIL))
    return None if ending is None else ending.start(1)


def says(token: str, yes: Iterable[str], no: Iterable[str]) -> bool:
    """Whether ``token`` is a yes, in any case and with signs around it, or the beginning of a yes that no
    ``no`` shares."""
    word = token.strip(_AROUND).casefold()
    if not word:
        return False
    return any(one.casefold().startswith(word) for one in yes) and not any(
        one.casefold().startswith(word) for one in no
    )


def steps(sample: Sample) -> list[Step]:
    """The tokens of an OpenAI choice with logprobs, of chat or of completions; empty if it has none."""
    told = sample.choice.get("logprobs") or {}
    if "content" in told:
        return [
            _step(
                entry["token"],
                entry.get("logprob"),
                [(top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()],
            )
            for entry in told["content"] or ()
        ]
    columns = [told.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs")]
    return [
        _step(token, logprob, list((top or {}).items()))
        for token, logprob, top in zip(*columns, strict=False)
    ]


def _step(token: str, logprob: Any, top: list[tuple[str, float]]) -> Step:
    """The sampled token is a candidate too, if it is not among the listed ones."""
    if logprob is not None and all(text != token for text, _ in top):
        top = [*top, (token, logprob)]
    return Step(token, tuple(top))


def _step_at(generated: Sequence[Step], text: str, place: int) -> Step | None:
    """The token that holds the character of ``text`` at ``place``. The tokens' text may differ from it: they
    hold thinking that a parser split off, and the signs that end a reply."""
    joined = "".join(step.token for step in generated)
    begin = max(0, place - _TAIL)
    around = text[begin : place + _TAIL]
    at = joined.rfind(around)
    if not around or at < 0:
        return None
    at += place - begin
    for step in generated:
        if at < len(step.token):
            return step
        at -= len(step.token)
    return None
