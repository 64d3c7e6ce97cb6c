"""GenRM: each sample is verified by chains of thought, and the most probably right one wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from braid.errors import BadRequest
from braid.services import NAME
from router.sampler import Answer, Progress, Sampler
from router.strategies import verified
from router.strategies.ballots import conclude_vote, votes_of
from router.strategies.collect import Run, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored
from router.verifiers import GenerativeVerifier
from router.verifiers.generative import Chain

MOST_AT_ONCE = 64


class GenrmOptions(ManyOptions):
    """Options of ``genrm``."""

    n: int = Field(8, ge=1, le=128)
    """Samples of the prompt; each is verified."""
    k: int = Field(4, ge=1, le=64)
    """Verification chains a sample."""
    select: Literal["max", "sum"] = "max"
    """`max` returns the sample with the highest score, `sum` the answer whose scores add up to the most."""
    verifier: str = Field("self", pattern=NAME)
    """Which generative verifier of the router reads the samples; `self` is the model that answers."""

    @property
    def slots(self) -> int:
        """Verifications run side by side, up to 64 of them."""
        return max(self.n, min(self.n * self.k, MOST_AT_ONCE))


async def run(sampler: Sampler, body: Mapping[str, Any], options: GenrmOptions, progress: Progress) -> Answer:
    """argmax r_i over n samples, or argmax over answers of the sum of their r; r_i is the mean over k
    verification chains of p("Yes") at the verdict. Chains without a verdict drop out.

    Zhang et al. 2024, "Generative Verifiers: Reward Modeling as Next-Token Prediction" (arXiv 2408.15240).
    A sample without a single verdict has no score and is not chosen. At a bound those verified so far
    decide; where no sample has a score the majority of answers does, and it says so. At equal compute
    self-consistency beats GenRM in places (Singhi et al. 2025, arXiv 2504.01005).
    """
    verifier = verified.named(sampler, options.verifier)
    if not isinstance(verifier, GenerativeVerifier):
        raise BadRequest("genrm needs a generative verifier, such as self", param="reasoning.verifier")
    verifier = verifier.with_chains(options.k)
    run = Run(sampler, options, progress)
    question = sampled(body, options)
    answers = await run.draw(question, options.n, keep=verifier.goes_on)
    run.fail_unless_finished()
    chains = await verifier.chains(run, question, answers)
    scores = _means(answers, chains)
    told = {"samples": _entries(run, answers, chains, scores), "select": options.select}
    best = verified.highest(answers, scores)
    if best is None:
        note = {"note": f"{verified.UNVERIFIED}; the majority is returned"} if votes_of(answers) else {}
        return await conclude_vote("genrm", run, votes_of(answers), answers, **told, **note)
    if options.select == "max":
        return await conclude("genrm", run, best, score=round(scores[best.sample.index], 6), **told)
    known = [one for one in answers if one.sample.index in scores]
    votes = votes_of(known, lambda one: scores[one.sample.index])
    return await conclude_vote("genrm", run, votes, known, **told)


def _means(answers: Sequence[Scored], chains: Sequence[Sequence[Chain]]) -> dict[int, float]:
    """r of each sample that has a verdict."""
    found = {}
    for one, verdicts in zip(answers, chains, strict=True):
        known = [chain.p_yes for chain in verdicts if chain.p_yes is not None]
        if known:
            found[one.sample.index] = fmean(known)
    return found


def _entries(
    run: Run, answers: Sequence[Scored], chains: Sequence[Sequence[Chain]], scores: Mapping[int, float]
) -> list[dict[str, Any]]:
    """The report's samples: answers with their score, verifications with what they are ``of``."""
    entries = {entry["index"]: entry for entry in verified.with_scores(run, scores)}
    for one, verdicts in zip(answers, chains, strict=True):
        for chain in verdicts:
            entry = entries[chain.sample.sample.index]
            entry["of"] = one.sample.index
            entry["p_yes"] = None if chain.p_yes is None else round(chain.p_yes, 6)
    return list(entries.values())
