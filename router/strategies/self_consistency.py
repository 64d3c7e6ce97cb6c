"""Self-consistency: a majority vote over sampled chains of thought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from braid.services import NAME
from router.sampler import Answer, Progress, Sampler
from router.strategies import verified
from router.strategies.ballots import conclude_vote, votes_of
from router.strategies.collect import Run, collect
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored
from router.strategies.voting import Votes, is_decided, weight_of


class SelfConsistencyOptions(ManyOptions):
    """Options of ``self_consistency``."""

    weight: str = Field("uniform", pattern=NAME)
    """What a vote weighs: 1 (`uniform`), exp(mean log-probability of the sample's tokens) (`mean_logprob`),
    or the score of a verifier of the router, by its name."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: SelfConsistencyOptions, progress: Progress
) -> Answer:
    """The answer that most samples agree on, in the words of the most confident sample that gives it.

    Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (arXiv
    2203.11171): argmax over a of the sum of w_i where a_i = a. Samples without an answer and failed ones
    don't vote; a tie goes to the lowest submission index. ``early_stop`` cancels the rest once they
    cannot change the winner (v1 - v2 > outstanding), which is safe in any completion order. Weighted by a
    verifier (Cobbe et al. 2021, arXiv 2110.14168; Li et al. 2023, arXiv 2206.02336) all samples are drawn
    first; those without a score don't vote, and with ``early_stop`` nothing is verified where all agree.
    """
    if options.weight not in ("uniform", "mean_logprob"):
        return await _weighted(sampler, body, options, progress)

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


async def _weighted(
    sampler: Sampler, body: Mapping[str, Any], options: SelfConsistencyOptions, progress: Progress
) -> Answer:
    verifier = verified.named(sampler, options.weight, "weight")
    run, question = Run(sampler, options, progress), sampled(body, options)
    answers = await run.draw(question, options.n, keep=verified.reads_on(verifier))
    run.fail_unless_finished()
    plain = votes_of(answers)
    if len(plain) < 2 and options.early_stop:
        return await conclude_vote("self_consistency", run, plain, answers)
    voters = [one for one in answers if one.key is not None]
    scores = await verified.scores_of(run, verifier, question, voters)
    known = [one for one in voters if one.sample.index in scores]
    fields: dict[str, Any] = {"samples": verified.with_scores(run, scores)}
    if voters and not known:
        note = f"{verified.UNVERIFIED}; all votes weigh the same"
        return await conclude_vote("self_consistency", run, plain, answers, note=note, **fields)
    votes = votes_of(known, lambda one: scores[one.sample.index])
    return await conclude_vote("self_consistency", run, votes, answers, **fields)
