"""Votes of scored samples, for the strategies that choose by majority."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from router.sampler import Answer
from router.strategies.collect import Run, conclude
from router.strategies.scored import Scored, most_confident
from router.strategies.voting import Ballot, Votes, confidence, is_decided, tally

Weight = Callable[[Scored], float]
"""What a sample's vote weighs, 0 to 1."""


def votes_of(scored: Iterable[Scored], weight: Weight = lambda one: 1.0) -> list[Votes]:
    """The votes of those that have an answer, as :func:`router.strategies.voting.tally` orders them."""
    return tally(
        Ballot(one.sample.index, one.answer, one.key, weight(one))
        for one in scored
        if one.answer is not None and one.key is not None
    )


def standing(run: Run) -> dict[str, Any]:
    """The uniform votes so far, for progress events."""
    return {"votes": [one.report() for one in votes_of(run.ended)]}


def decided(run: Run) -> str | None:
    """``decided`` once no sample still to end can change the winner of the uniform vote."""
    return "decided" if is_decided(votes_of(run.ended), run.outstanding) else None


async def conclude_vote(
    name: str, run: Run, votes: Sequence[Votes], among: Sequence[Scored] | None = None, **fields: Any
) -> Answer:
    """The winner of ``votes`` in the words of the most confident sample that gives it; of all samples
    (``among`` these) where nobody voted, and the report says so."""
    if not votes:
        note = "no sample has an answer that the extractor finds; the most confident sample is returned"
        return await conclude(name, run, most_confident(among or run.finished), note=note, **fields)
    return await conclude(
        name,
        run,
        most_confident(one for one in run.finished if one.sample.index in votes[0].indices),
        answer=votes[0].answer,
        votes=[one.report() for one in votes],
        confidence=confidence(list(votes)),
        **fields,
    )
