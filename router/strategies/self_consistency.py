"""Self-consistency: a majority vote over sampled chains of thought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, collect, conclude, most_confident
from router.strategies.options import ManyOptions
from router.strategies.prompt import with_sampling, with_trigger
from router.strategies.voting import Ballot, Votes, confidence, is_decided, tally, weight_of


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

    def votes(so_far: Run) -> list[Votes]:
        return tally(
            Ballot(
                one.sample.index,
                one.answer,
                one.key,
                1.0 if options.weight == "uniform" else weight_of(one.sample.mean_logprob),
            )
            for one in so_far.ended
            if one.answer is not None and one.key is not None
        )

    got = await collect(
        sampler,
        with_sampling(with_trigger(body, options.trigger) if options.cot else body, options.n),
        options,
        progress,
        standing=lambda so_far: {"votes": [one.report() for one in votes(so_far)]},
        settled=lambda so_far: options.early_stop and is_decided(votes(so_far), so_far.outstanding),
    )
    cast = votes(got)
    if not cast:
        note = "no sample has an answer that the extractor finds; the most confident sample is returned"
        return await conclude(
            "self_consistency", got, options, progress, most_confident(got.finished), note=note
        )
    return await conclude(
        "self_consistency",
        got,
        options,
        progress,
        most_confident(one for one in got.finished if one.sample.index in cast[0].indices),
        answer=cast[0].answer,
        votes=[one.report() for one in cast],
        confidence=confidence(cast),
    )
