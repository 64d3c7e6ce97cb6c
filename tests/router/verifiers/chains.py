"""Samples with token log-probabilities, and running a verifier by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from braid.verdict import Step, p_yes
from router.sampler import Sample
from router.strategies.options import ManyOptions, Options
from router.strategies.run import Run
from router.strategies.scored import Scored
from router.verifiers import Verifier
from tests.router.strategies.scripted import Scripted, sample

CHAT: Mapping[str, Any] = {"messages": [{"role": "user", "content": "2+2?"}]}


def chain(
    index: int, tokens: Sequence[str], verdict: Mapping[str, float] | None = None, **more: Any
) -> Sample:
    """A verification as a worker measures it: its tokens, and the probabilities of the candidates in place
    of the last one."""
    told = [Step(token, ()) for token in tokens]
    if verdict is not None:
        told[-1] = Step(tokens[-1], tuple((token, math.log(p)) for token, p in verdict.items()))
    text = more.pop("text", "".join(tokens))
    return sample(index, text, confidence=p_yes(text, False, told, ["yes"], ["no"]), **more)


def verdict(index: int, p: float, said: str = " Yes", **more: Any) -> Sample:
    """A verification that ends in ``said``, and in a yes with probability ``p``."""
    return chain(index, ["ok.\n\n", "Verification", ":", said], {" Yes": p, " No": 1 - p}, **more)


async def quiet(event: Mapping[str, Any]) -> None:
    """A Progress that nobody watches."""


def run_of(sampler: Scripted, options: Options | None = None) -> Run:
    return Run(sampler, options or ManyOptions(n=len(sampler.samples)), quiet)


async def scores(
    verifier: Verifier, texts: Sequence[str], run: Run | None = None, body: Mapping[str, Any] = CHAT
) -> list[float | None]:
    """What ``verifier`` makes of samples with these texts."""
    samples = [Scored(sample(index, text)) for index, text in enumerate(texts)]
    return await verifier.score(run or run_of(Scripted([sample(0)])), body, samples)
