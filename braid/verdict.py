"""p(Yes) of one verification chain: where its verdict stands, and how probable a yes was there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from braid.thinking import without_thinking

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


def p_yes(
    text: str, truncated: bool, generated: Sequence[Step], yes: Sequence[str], no: Sequence[str]
) -> float | None:
    """The probability of all ``yes`` variants at the verdict of a chain, 0 to 1; None where it has no
    verdict, or there are no candidates. Zhang et al. 2024 (arXiv 2408.15240), equation 7.

    Args:
        text: the chain as it is read.
        truncated: it was cut off at its limit.
        generated: its tokens.
    """
    verdict = verdict_at(text, [*yes, *no], truncated)
    if verdict is None:
        return None
    step = _step_at(generated, text, verdict)
    if step is None or not step.candidates:
        return None
    return min(
        1.0, math.fsum(math.exp(logprob) for token, logprob in step.candidates if says(token, yes, no))
    )


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
