"""Samplers and verifiers by script for the strategies that go on from partial answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from router.sampler import Sample
from router.strategies.run import Run
from router.strategies.scored import Scored
from tests.router.strategies.scripted import Scripted, sample


def step(index: int, text: str, tokens: int = 10, **fields: Any) -> Sample:
    """A sample whose text is a step if it ends in ``|``, else the end of an answer; one that ends in ``...``
    was cut at its limit of tokens."""
    reason, stop = "stop", None
    if text.endswith("|"):
        text, stop = text[:-1], "\n\n"
    elif text.endswith("..."):
        text, reason = text[:-3], "length"
    made = sample(index, text, tokens=tokens, finish_reason=reason, **fields)
    return made if made.state != "finished" else chose(made, stop_reason=stop)


def chose(made: Sample, **fields: Any) -> Sample:
    """``made`` with more in its choice."""
    made.choice.update(fields)  # type: ignore[attr-defined]
    return made


def steps(*texts: str | None, **fields: Any) -> list[Sample]:
    """Steps by number; None is a sample that failed."""
    return [
        sample(index, state="failed", error="lost", tokens=0) if text is None else step(index, text, **fields)
        for index, text in enumerate(texts)
    ]


class Oracle:
    """A verifier that knows the score of each last step by its first word.

    ``draws``: it asks the model once a sample, so that its tokens count. ``asked``: what it was asked of.
    """

    name = "self"

    def __init__(self, scores: Mapping[str, float | None], draws: bool = False) -> None:
        self.scores = scores
        self.draws = draws
        self.asked: list[list[str]] = []

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        self.asked.append([one.sample.text for one in samples])
        found: list[float | None] = []
        for one in samples:
            drawn = (
                await run.draw({**body, "check": one.sample.text}, 1, role="check") if self.draws else [one]
            )
            last = one.sample.text.strip().rpartition("\n\n")[2].split()
            found.append(self.scores.get(last[0] if last else "") if drawn else None)
        return found


class Stepping(Scripted):
    """A scripted sampler with a verifier."""

    def __init__(
        self, samples: Sequence[Sample], scores: Mapping[str, float | None] | None = None, **more: Any
    ):
        self.oracle = Oracle(scores or {}, more.pop("draws", False))
        super().__init__(samples, **more)
        self.verifiers["self"] = self.oracle

    @property
    def begun(self) -> list[str]:
        """What each group goes on from: the text of the assistant's message, empty at the beginning."""
        last = [body["messages"][-1] for body, _ in self.opened]
        return [message["content"] if message["role"] == "assistant" else "" for message in last]


def tree_of(report: Mapping[str, Any]) -> list[tuple[int, int | None, int, float | None, bool]]:
    """The nodes of a report: number, parent, step, score, whether it has ended."""
    return [(n["index"], n["parent"], n["step"], n["score"], n["ended"]) for n in report["tree"]]


def with_logprobs(made: Sample, tokens: Sequence[tuple[str, Mapping[str, float]]]) -> Sample:
    """``made`` with log-probabilities: of each token the probabilities of the most probable ones."""
    content = [
        {
            "token": token,
            "logprob": math.log(tops.get(token, 1e-9)),
            "top_logprobs": [{"token": top, "logprob": math.log(p)} for top, p in tops.items()],
        }
        for token, tops in tokens
    ]
    return chose(made, logprobs={"content": content})
