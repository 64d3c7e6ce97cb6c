"""One model of a cascade: what came of it, and how sure its answer is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.strategies import verified
from router.strategies.ballots import votes_of
from router.strategies.run import Run, Settled
from router.strategies.scored import Scored, most_confident
from router.strategies.several import Metered
from router.strategies.voting import Votes, is_decided, weight_of
from router.verifiers import Verifier


@dataclass(slots=True)
class Level:
    """``numbers``: of its samples. ``last``: no model is dearer, so its answer is accepted as it is.
    ``score``: how sure its answer is, None where it is unknown or not asked for. ``error``: why it could not
    be served."""

    model: str
    numbers: range
    last: bool
    answers: Sequence[Scored] = field(default_factory=list)
    score: float | None = None
    accepted: bool = False
    error: str = ""

    @property
    def votes(self) -> list[Votes]:
        return votes_of(self.answers)

    def accept(self, threshold: float) -> None:
        """Accept its answer if it has one and that is sure enough."""
        sure = self.last or (self.score is not None and self.score >= threshold)
        self.accepted = bool(self.answers) and sure

    def of(self, samples: Iterable[Scored]) -> list[Scored]:
        """Those of ``samples`` that are the model's."""
        return [one for one in samples if one.sample.index in self.numbers]

    def share(self, votes: Sequence[Votes]) -> float:
        """The leading answer's share of all samples asked for, also those that failed or have no answer."""
        return len(votes[0].indices) / len(self.numbers) if votes else 0.0

    def best(self) -> Scored:
        """The most confident sample of the leading answer, of all samples where none has an answer."""
        leading = self.votes[0].indices if self.votes else ()
        return most_confident([one for one in self.answers if one.sample.index in leading] or self.answers)

    def report(self, metered: Metered) -> dict[str, Any]:
        """As in the reply's ``models``."""
        told = {"model": self.model, "samples": len(self.numbers), "tokens": metered.tokens(self.model)}
        told |= {"answer": self.votes[0].answer if self.votes else None, "accepted": self.accepted}
        told |= {"score": None if self.score is None else round(self.score, 6)}
        return told | ({"error": self.error} if self.error else {})


def settling(level: Level, agreement: float) -> Settled:
    """What says, while a level's samples come, that the rest can't undo that its answer is accepted: the
    last level's as it is, another's for a share of ``agreement``."""

    def settled(run: Run) -> str | None:
        ended = level.of(run.ended)
        votes = votes_of(ended)
        sure = level.last or level.share(votes) >= agreement
        decided = sure and is_decided(votes, len(level.numbers) - len(ended))
        return ("decided" if level.last else "accepted") if decided else None

    return settled


async def judged(
    run: Run, level: Level, question: Mapping[str, Any], by: str, verifier: Verifier | None
) -> float | None:
    """How sure the answer of a level that has samples is, 0 to 1; None if the verifier can't tell."""
    if verifier is not None:
        best = level.best()
        return (await verified.scores_of(run, verifier, question, [best])).get(best.sample.index)
    return level.share(level.votes) if by == "agreement" else weight_of(level.best().sample.mean_logprob)
