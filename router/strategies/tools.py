"""Tools: an external check runs on the candidates; its result selects one, or has it corrected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from braid.services import NAME
from braid.thinking import without_thinking
from router.sampler import Answer, Progress, Sampler
from router.strategies import verified
from router.strategies.collect import Run, conclude, most_confident
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled, with_turn
from router.verifiers import Check

CORRECT = (
    "A check of your answer found:\n{feedback}\n\nWrite the complete answer again, corrected accordingly."
)


class ToolsOptions(ManyOptions):
    """Options of ``tools``."""

    n: int = Field(4, ge=1, le=128)
    """Candidates that are checked."""
    verifier: str = Field("arithmetic", pattern=NAME)
    """The check: a verifier of the router by its name; `arithmetic` recomputes the equations in a text."""
    threshold: float = Field(1.0, ge=0, le=1)
    """The least score that passes."""
    rounds: int = Field(1, ge=0, le=8)
    """The most corrections, if no candidate passes. 0: the check only selects."""
    correct: str = Field(CORRECT, min_length=1, max_length=4000)
    """How a correction is asked for; `{feedback}` stands for what the check found."""


async def run(sampler: Sampler, body: Mapping[str, Any], options: ToolsOptions, progress: Progress) -> Answer:
    """The candidate that a check scores highest; if none passes, the best one is corrected by what the check
    found, and checked again, for at most ``rounds`` rounds.

    Gou et al. 2023, "CRITIC: Large Language Models Can Self-Correct with Tool-Interactive Critiquing" (arXiv
    2305.11738), here over ``n`` candidates. Candidates of equal score are chosen among by log-probability. A
    check that fails leaves a score unknown; where all are, the most confident candidate is returned.
    """
    verifier = verified.named(sampler, options.verifier)
    run = Run(sampler, options, progress)
    question = sampled(body, options)
    latest = tried = await run.draw(question, options.n, keep=True)
    run.fail_unless_finished()
    checks: dict[int, Check] = {}
    rounds = 0
    while True:
        checks |= await verified.checks_of(run, verifier, question, latest)
        scores = {index: said.score or 0.0 for index, said in checks.items()}
        best = verified.highest(tried, scores)
        passed = best is not None and scores[best.sample.index] >= options.threshold
        if best is None or passed or rounds == options.rounds:
            break
        told = checks[best.sample.index].feedback or verified.in_words(scores[best.sample.index])
        said = without_thinking(best.sample.text)
        again = with_turn(question, said, options.correct.replace("{feedback}", told))
        latest = await run.draw(again, 1, role="correction", keep=True, after=best.sample)
        if not latest:
            break
        tried, rounds = [*tried, *latest], rounds + 1
    if passed and rounds < options.rounds and run.stopped is None:
        run.stopped = "accepted"
    fields: dict[str, Any] = {
        "samples": verified.with_scores(run, scores),
        "passed": passed,
        "rounds": rounds,
    }
    if best is None:
        fields["note"] = f"{verified.UNVERIFIED}; the most confident is returned"
    return await conclude("tools", run, best or most_confident(tried), **fields)
