"""First finish: the samples that end first answer, the others are cancelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import conclude_vote, votes_of
from router.strategies.collect import Run, collect
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored


class FirstFinishOptions(ManyOptions):
    """Options of ``first_finish``."""

    finishers: int = Field(1, ge=1, le=1024)
    """So many samples are waited for; they vote."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: FirstFinishOptions, progress: Progress
) -> Answer:
    """The majority of the first ``finishers`` of ``n`` samples to finish; a tie goes to the lowest index.

    With 1: Agarwal et al. 2025, "First Finish Search" (arXiv 2505.18149); with m: short-m@k of Hassid et al.
    2025, "Don't Overthink it" (arXiv 2505.17813). It stops in completion order, on purpose: short chains are
    favoured, so its answers are not those of a vote over exchangeable samples, and they depend on timing.
    """

    def finishers(so_far: Run) -> list[Scored]:
        in_time = [one for one in so_far.ended if one.sample.state == "finished"]
        return in_time[: options.finishers]

    def settled(so_far: Run) -> str | None:
        return "first_finish" if len(finishers(so_far)) >= options.finishers else None

    got = await collect(
        sampler,
        sampled(body, options),
        options,
        progress,
        standing=lambda so_far: {"votes": [one.report() for one in votes_of(finishers(so_far))]},
        settled=settled if options.early_stop else None,
    )
    first = finishers(got)
    indices = [one.sample.index for one in first]
    return await conclude_vote("first_finish", got, votes_of(first), finishers=indices, among=first)
