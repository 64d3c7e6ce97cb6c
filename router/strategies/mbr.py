"""Minimum Bayes risk: the sample that is most like all the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from braid.thinking import without_thinking
from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import collect, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored
from router.strategies.utility import Name, expected


class MbrOptions(ManyOptions):
    """Options of ``mbr``."""

    n: int = Field(8, ge=1, le=64)
    """Samples of the prompt: each is compared with each."""
    utility: Name = "rouge_l"
    """What samples are compared by: `exact` (equal or not), `token_f1` (words in common), `rouge_l` (longest
    common subsequence of words)."""
    over: Literal["text", "answer"] = "text"
    """What of a sample is compared: its whole text without its thinking, or its extracted answer in
    canonical form; a sample without an answer then takes no part."""


async def run(sampler: Sampler, body: Mapping[str, Any], options: MbrOptions, progress: Progress) -> Answer:
    """argmax over samples y of the mean of u(y, r) over all samples r; a tie goes to the lowest index.

    Kumar & Byrne 2004 (ACL, N04-1022) and Eikema & Aziz 2020 (arXiv 2005.10283): samples stand for the
    model's distribution, as hypotheses and as references. Utilities compare the last 1,024 words. With
    ``exact`` over answers it is a majority vote.
    """
    got = await collect(sampler, sampled(body, options), options, progress)
    compared = [one for one in got.finished if options.over == "text" or one.key is not None]
    note = {} if compared else {"note": "no sample has an answer; whole texts are compared"}
    compared = compared or got.finished
    texts = [_text(one, options.over == "answer" and not note) for one in compared]
    late = False

    def stop() -> bool:
        nonlocal late
        late = got.left_s <= 0
        return late

    means = await expected(texts, options.utility, stop)
    best = max(range(len(compared)), key=lambda place: (means[place], -place))
    if late and got.stopped is None:
        got.stopped = "deadline"
    utilities = {one.sample.index: round(mean, 6) for one, mean in zip(compared, means, strict=True)}
    return await conclude("mbr", got, compared[best], utilities=utilities, **note)


def _text(one: Scored, answer: bool) -> str:
    return one.key or "" if answer else without_thinking(one.sample.text)
