"""Adaptive consistency: waves of samples until the majority is unlikely to change."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import conclude_vote, decided, standing, votes_of
from router.strategies.collect import Run, collect_waves
from router.strategies.options import ManyOptions, WaveOptions
from router.strategies.prompt import sampled
from router.strategies.voting import Votes

WIDEST = 16
"""Largest wave where no size is given. A wave cut here costs time only: its first part could not stop."""


class AdaptiveConsistencyOptions(ManyOptions):
    """Options of ``adaptive_consistency``."""

    n: int = Field(40, ge=1, le=1024)
    """The most samples."""
    tau: float = Field(0.95, gt=0.5, lt=1)
    """Stopping level: the probability that the leading answer is the more frequent of the two that lead.
    It is no guarantee of accuracy."""
    wave: int | None = Field(None, ge=1, le=128)
    """Samples of the first wave. Not given: every wave is as large as the least number of samples after
    which the rule could stop, so that none is drawn in vain."""
    growth: float = Field(1.0, ge=1, le=4)
    """Each wave is so many times as large as the one before; goes with `wave`."""

    @property
    def fixed(self) -> WaveOptions | None:
        """The waves' sizes where they are given."""
        return WaveOptions(n=self.n, wave=self.wave, growth=self.growth) if self.wave else None

    @property
    def slots(self) -> int:
        """The largest wave that may run."""
        if not self.early_stop:
            return self.n
        return self.fixed.slots if self.fixed else min(self.n, WIDEST)


def certainty(v1: int, v2: int) -> float:
    """P = 1 - I_{1/2}(v1 + 1, v2 + 1) = 2^-n sum_{j <= v1} C(n, j) with n = v1 + v2 + 1, exactly rounded."""
    n = v1 + v2 + 1
    return sum(math.comb(n, j) for j in range(v1 + 1)) / (1 << n)


def counts(votes: Sequence[Votes]) -> tuple[int, int]:
    """The two largest counts."""
    first, second, *_ = (*(len(one.indices) for one in votes), 0, 0)
    return first, second


def least(votes: Sequence[Votes], tau: float, most: int) -> int:
    """The least number of further samples, 1 to ``most``, after which ``tau`` can be reached: all of them
    would have to agree with the leader."""
    v1, v2 = counts(votes)
    return 1 + bisect_left(range(1, most), tau, key=lambda more: certainty(v1 + more, v2))


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: AdaptiveConsistencyOptions, progress: Progress
) -> Answer:
    """The majority when P(v1, v2) reaches ``tau`` after a whole wave, at ``n`` samples otherwise.

    Aggarwal et al. 2023, "Let's Sample Step by Step" (arXiv 2305.11860), with their Beta criterion over the
    two largest counts v1 >= v2. The test looks at whole waves only: samples end in the order of their
    length, and a test in that order would favour short chains. Within a wave only an outcome that no
    sample up to ``n`` can change ends it.
    """
    run = Run(sampler, options, progress, standing)

    def size(wave: int) -> int:
        if not options.early_stop:
            return options.n
        if options.fixed:
            return options.fixed.size(wave)
        return min(WIDEST, least(votes_of(run.ended), options.tau, run.n - run.drawn))

    def agreed(so_far: Run) -> str | None:
        votes = votes_of(so_far.ended)
        enough = options.early_stop and votes and certainty(*counts(votes)) >= options.tau
        return "agreed" if enough else None

    within = decided if options.early_stop else None
    got = await collect_waves(run, sampled(body, options), size, between=agreed, within=within)
    votes = votes_of(got.ended)
    return await conclude_vote(
        "adaptive_consistency", got, votes, certainty=round(certainty(*counts(votes)), 6)
    )
