"""Early-stopping self-consistency (ESC): windows of samples until one of them agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import conclude_vote, standing, votes_of
from router.strategies.collect import Run, collect_waves
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored


class EarlyStoppingConsistencyOptions(ManyOptions):
    """Options of ``early_stopping_consistency``."""

    n: int = Field(40, ge=1, le=1024)
    """The most samples (L in the paper)."""
    window: int = Field(5, ge=2, le=128)
    """Samples of a window (w in the paper)."""

    @property
    def slots(self) -> int:
        """A window, or all where no window may end it."""
        return min(self.n, self.window) if self.early_stop else self.n


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: EarlyStoppingConsistencyOptions, progress: Progress
) -> Answer:
    """The answer of the first window whose samples all give the same; the majority of all without one.

    Li et al. 2024, "Escape Sky-high Cost: Early-stopping Self-Consistency for Multi-step Reasoning" (arXiv
    2401.10480), with its w = 5 and L = 40. A sample without an answer agrees with none, so its window does
    not end the run, and neither does a last window that ``n`` cuts short.
    """

    def last_window(so_far: Run) -> list[Scored]:
        return so_far.in_order()[(so_far.drawn - 1) // options.window * options.window :]

    def agrees(so_far: Run) -> bool:
        votes = votes_of(last_window(so_far))
        return options.early_stop and len(votes) == 1 and len(votes[0].indices) == options.window

    got = await collect_waves(
        Run(sampler, options, progress, standing),
        sampled(body, options),
        size=lambda wave: options.window if options.early_stop else options.n,
        between=lambda so_far: "agreed" if agrees(so_far) else None,
    )
    votes = votes_of(last_window(got) if agrees(got) else got.ended)
    return await conclude_vote("early_stopping_consistency", got, votes)
