"""Best of N: the sample with the highest reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from braid.services import NAME
from router.sampler import Answer, Progress, Sampler
from router.strategies import verified
from router.strategies.collect import Run, collect, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import finite, most_confident


class BestOfNOptions(ManyOptions):
    """Options of ``best_of_n``."""

    reward: str = Field("mean_logprob", pattern=NAME)
    """What the best sample has most of: `mean_logprob` of its tokens, or the score of a verifier of the
    router, by its name."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: BestOfNOptions, progress: Progress
) -> Answer:
    """argmax of r(x, y_i) over the samples that finished; a tie goes to the lowest submission index.

    Selection by reward is from Stiennon et al. 2020 (arXiv 2009.01325) and Cobbe et al. 2021 (arXiv
    2110.14168); the length-normalised log-probability as the reward is the "sample and rank" of Adiwardana
    et al. 2020 (arXiv 2001.09977). All samples are heard: none can be ruled out before it ends. Samples that
    a verifier gives no score can't win; if it gives none at all, the log-probability decides.
    """
    if options.reward != "mean_logprob":
        return await _by_verifier(sampler, body, options, progress)

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


async def _by_verifier(
    sampler: Sampler, body: Mapping[str, Any], options: BestOfNOptions, progress: Progress
) -> Answer:
    verifier = verified.named(sampler, options.reward, "reward")
    run, question = Run(sampler, options, progress), sampled(body, options)
    answers = await run.draw(question, options.n, keep=verified.reads_on(verifier))
    run.fail_unless_finished()
    scores = await verified.scores_of(run, verifier, question, answers)
    best = verified.highest(answers, scores)
    fields: dict[str, Any] = {"samples": verified.with_scores(run, scores)}
    if best is None:
        note = f"{verified.UNVERIFIED}; the most confident is returned"
        return await conclude("best_of_n", run, most_confident(answers), reward=None, note=note, **fields)
    return await conclude("best_of_n", run, best, reward=round(scores[best.sample.index], 6), **fields)
