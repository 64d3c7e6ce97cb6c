"""How alike two texts are, 0 to 1, and the text that is most like the others."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

Name = Literal["exact", "token_f1", "rouge_l"]
Words = tuple[str, ...]
MAX_WORDS = 1024
"""Only so many words at the end of a text are compared."""

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> Words:
    """Words and signs, without case; the last :data:`MAX_WORDS` of them."""
    return tuple(_WORD.findall(text.casefold())[-MAX_WORDS:])


def exact(one: Words, other: Words) -> float:
    """1 if equal word by word."""
    return float(one == other)


def token_f1(one: Words, other: Words) -> float:
    """F1 of the words in common, as bags (the measure of SQuAD, Rajpurkar et al. 2016)."""
    return _f1((Counter(one) & Counter(other)).total(), one, other)


def rouge_l(one: Words, other: Words) -> float:
    """F1 of the longest common subsequence (Lin 2004)."""
    return _f1(_common(one, other), one, other)


UTILITIES: dict[Name, Callable[[Words, Words], float]] = {
    "exact": exact,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def _f1(common: int, one: Words, other: Words) -> float:
    total = len(one) + len(other)
    return 2 * common / total if total else 1.0


def _common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): a word of ``other`` a step."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(one) - row.bit_count()


async def expected(texts: Sequence[str], utility: Name, stop: Callable[[], bool] = bool) -> list[float]:
    """mean_r u(y, r) of each text y over all texts r, itself among them. Symmetric utilities only.

    Lets other tasks run after each pair. Once ``stop`` says so, the mean is over the references so far.
    """
    split, measure = [words(text) for text in texts], UTILITIES[utility]
    sums, heard = [0.0] * len(split), 0
    for reference in split:
        for place, one in enumerate(split):
            sums[place] += measure(one, reference)
            await asyncio.sleep(0)
        heard += 1
        if stop():
            break
    return [total / heard for total in sums]
