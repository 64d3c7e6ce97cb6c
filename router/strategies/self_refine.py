"""Self-refine: the model criticises its answer and writes it again, until it has nothing to add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from braid.services import NAME
from braid.thinking import without_thinking
from router.sampler import Answer, Progress, Sampler
from router.strategies import verified
from router.strategies.collect import Run, conclude
from router.strategies.options import ReasonedOptions, SingleOptions
from router.strategies.prompt import in_prose, reasoned, with_turn
from router.strategies.scored import Scored
from router.verifiers import Verifier

FEEDBACK = (
    "Check the answer above step by step. If it is right and complete, reply with {accept} only. "
    "Otherwise say precisely what is wrong and how to correct it."
)
REFINE = "Feedback on your answer:\n{feedback}\n\nWrite the complete answer again, corrected accordingly."


class SelfRefineOptions(SingleOptions, ReasonedOptions):
    """Options of ``self_refine``."""

    rounds: int = Field(3, ge=1, le=16)
    """The most rounds of feedback and refinement."""
    feedback: str = Field(FEEDBACK, min_length=1, max_length=4000)
    """How feedback is asked for; `{accept}` stands for `accept`."""
    refine: str = Field(REFINE, min_length=1, max_length=4000)
    """How the next version is asked for; `{feedback}` stands for the feedback."""
    accept: str = Field("[ACCEPTED]", min_length=1, max_length=100)
    """Feedback that contains this accepts the answer."""
    verifier: str | None = Field(None, pattern=NAME)
    """A verifier of the router that gives the feedback and accepts, instead of the model, by its name."""
    threshold: float = Field(0.5, ge=0, le=1)
    """The least score that `verifier` accepts."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: SelfRefineOptions, progress: Progress
) -> Answer:
    """y <- LLM(x, y, feedback) until the feedback accepts y, for at most ``rounds`` rounds.

    Madaan et al. 2023, "Self-Refine: Iterative Refinement with Self-Feedback" (arXiv 2303.17651). Each call
    is a new prompt that holds the question, the latest answer and the request as text: what the workers'
    prefix caches have of it is not computed again. With a ``verifier`` its words are the feedback, and its
    score accepts; where it has no score there is nothing to go by, and the answer stands. At a bound, or if a
    call fails, the latest answer is returned.
    """
    verifier = verified.named(sampler, options.verifier) if options.verifier else None
    question = reasoned(body, options)
    run = Run(sampler, options, progress)
    latest = await run.draw(question, 1, role="draft", keep=True)
    run.fail_unless_finished()
    rounds, accepted, scores = 0, False, dict[int, float]()
    while rounds < options.rounds:
        told = await _feedback(run, question, latest[0], options, verifier, scores)
        accepted = told is not None and told[1] and options.early_stop
        if told is None or accepted:
            break
        text = without_thinking(latest[0].sample.text).strip()
        again = with_turn(question, text, options.refine.replace("{feedback}", told[0]))
        refined = await run.draw(again, 1, role="refinement", keep=True, after=latest[0].sample)
        if not refined:
            break
        latest, rounds = refined, rounds + 1
    if accepted and run.stopped is None:
        run.stopped = "accepted"
    told_scores = {"samples": verified.with_scores(run, scores)} if verifier else {}
    return await conclude("self_refine", run, latest[0], rounds=rounds, accepted=accepted, **told_scores)


async def _feedback(
    run: Run,
    question: Mapping[str, Any],
    latest: Scored,
    options: SelfRefineOptions,
    verifier: Verifier | None,
    scores: dict[int, float],
) -> tuple[str, bool] | None:
    """Feedback on ``latest``, and whether it accepts; None if there is none to be had. Adds to ``scores``."""
    if verifier is not None:
        checks = await verified.checks_of(run, verifier, question, [latest])
        if not checks:
            return None
        said = checks[latest.sample.index]
        scores[latest.sample.index] = score = said.score or 0.0
        return said.feedback or verified.in_words(score), score >= options.threshold
    asks = options.feedback.replace("{accept}", options.accept)
    text = without_thinking(latest.sample.text).strip()
    asked = with_turn(in_prose(question), text, asks)
    told = await run.draw(asked, 1, role="feedback", after=latest.sample)
    if not told:
        return None
    feedback = without_thinking(told[0].sample.text).strip()
    return feedback, options.accept in feedback
