"""Self-consistency: a majority vote over sampled chains of thought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import conclude_vote, votes_of
from router.strategies.collect import Run, collect
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored
from router.strategies.voting import Votes, is_decided, weight_of


class SelfConsistencyOptions(ManyOptions):
    """Options of ``self_consistency``."""

    weight: Literal["uniform", "mean_logprob"] = "uniform"
    """What a vote weighs: 1, or exp(mean log-probability of the sample's tokens)."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: SelfConsistencyOptions, progress: Progress
) -> Answer:
    """The answer that most samples agree on, in the words of the most confident sample that gives it.

    Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (arXiv
    2203.11171): argmax over a of the sum of w_i where a_i = a. Samples without an answer and failed ones
    don't vote; a tie goes to the lowest submission index. ``early_stop`` cancels the rest once they
    cannot change the winner (v1 - v2 > outstanding), which is safe in any completion order.
    """

    def weight(one: Scored) -> float:
        return 1.0 if options.weight == "uniform" else weight_of(one.sample.mean_logprob)

    def votes(so_far: Run) -> list[Votes]:
        return votes_of(so_far.ended, weight)

    def settled(so_far: Run) -> str | None:
        return "decided" if is_decided(votes(so_far), so_far.outstanding) else None

    got = await collect(
        sampler,
        sampled(body, options),
        options,
        progress,
        standing=lambda so_far: {"votes": [one.report() for one in votes(so_far)]},
        settled=settled if options.early_stop else None,
    )
    return await conclude_vote("self_consistency", got, votes(got))
