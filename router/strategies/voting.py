"""Votes over classes of equal answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sample's vote: its submission index, answer, the answer's canonical key, and a weight in
    0..1."""

    index: int
    answer: str
    key: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Votes:
    """A class of equal answers. ``answer`` is as its first voter wrote it; ``indices`` are sorted."""

    answer: str
    weight: float
    indices: tuple[int, ...]

    def report(self) -> dict[str, Any]:
        """As in the reply."""
        return {
            "answer": self.answer,
            "votes": len(self.indices),
            "weight": round(self.weight, 6),
            "samples": list(self.indices),
        }


def tally(ballots: Iterable[Ballot]) -> list[Votes]:
    """Classes by falling weight; a tie goes to the class with the lowest submission index.

    The order of ``ballots`` does not matter: sums are exact to the last bit.
    """
    classes: dict[str, list[Ballot]] = {}
    for ballot in sorted(ballots, key=lambda ballot: ballot.index):
        classes.setdefault(ballot.key, []).append(ballot)
    votes = [
        Votes(same[0].answer, math.fsum(b.weight for b in same), tuple(b.index for b in same))
        for same in classes.values()
    ]
    return sorted(votes, key=lambda votes: (-votes.weight, votes.indices))


def is_decided(votes: list[Votes], outstanding: int) -> bool:
    """Whether no outcome of the ``outstanding`` samples can change the winner: v1 - v2 > outstanding.

    Holds in any completion order, as a sample weighs at most 1.
    """
    if not votes:
        return False
    second = votes[1].weight if len(votes) > 1 else 0.0
    return votes[0].weight - second > outstanding + 1e-9  # more than the rounding of the subtraction


def confidence(votes: list[Votes]) -> float | None:
    """The winner's share of all weight cast, None if there is none."""
    cast = math.fsum(v.weight for v in votes)
    return round(votes[0].weight / cast, 6) if cast > 0 else None


def weight_of(mean_logprob: float) -> float:
    """exp(mean log-probability), the geometric mean probability of a token; 0 where it is unknown."""
    return math.exp(min(0.0, mean_logprob)) if mean_logprob == mean_logprob else 0.0
