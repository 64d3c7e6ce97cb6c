"""Best of N: the sample with the highest reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, collect, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import finite, most_confident


class BestOfNOptions(ManyOptions):
    """Options of ``best_of_n``."""

    reward: Literal["mean_logprob"] = "mean_logprob"
    """What the best sample has most of: the mean log-probability of its tokens."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: BestOfNOptions, progress: Progress
) -> Answer:
    """argmax of r(x, y_i) over the samples that finished; a tie goes to the lowest submission index.

    Selection by reward is from Stiennon et al. 2020 (arXiv 2009.01325) and Cobbe et al. 2021 (arXiv
    2110.14168); the length-normalised log-probability as the reward is the "sample and rank" of Adiwardana
    et al. 2020 (arXiv 2001.09977). All samples are heard: none can be ruled out before it ends.
    """

    def best(so_far: Run) -> dict[str, Any]:
        return {"best": most_confident(so_far.finished).sample.index if so_far.finished else None}

    got = await collect(
        sampler,
        sampled(body, options),
        options,
        progress,
        standing=best,
    )
    chosen = most_confident(got.finished)
    fields: dict[str, Any] = {"reward": finite(chosen.sample.mean_logprob)}
    if fields["reward"] is None:
        fields["note"] = "no sample's log-probability is known; the first that finished is returned"
    return await conclude("best_of_n", got, chosen, **fields)
