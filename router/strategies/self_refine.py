"""Self-refine: the model criticises its answer and writes it again, until it has nothing to add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from router.extract import without_thinking
from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, conclude
from router.strategies.options import TRIGGER, SingleOptions
from router.strategies.prompt import in_prose, with_trigger, with_turn

FEEDBACK = (
    "Check the answer above step by step. If it is right and complete, reply with {accept} only. "
    "Otherwise say precisely what is wrong and how to correct it."
)
REFINE = "Feedback on your answer:\n{feedback}\n\nWrite the complete answer again, corrected accordingly."


class SelfRefineOptions(SingleOptions):
    """Options of ``self_refine``."""

    rounds: int = Field(3, ge=1, le=16)
    """The most rounds of feedback and refinement."""
    feedback: str = Field(FEEDBACK, min_length=1, max_length=4000)
    """How feedback is asked for; `{accept}` stands for `accept`."""
    refine: str = Field(REFINE, min_length=1, max_length=4000)
    """How the next version is asked for; `{feedback}` stands for the feedback."""
    accept: str = Field("[ACCEPTED]", min_length=1, max_length=100)
    """Feedback that contains this accepts the answer."""
    cot: bool = True
    """Append `trigger` to the question."""
    trigger: str = Field(TRIGGER, min_length=1, max_length=2000)
    """What makes the model reason (default: the router's setting)."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: SelfRefineOptions, progress: Progress
) -> Answer:
    """y <- LLM(x, y, feedback) until the feedback accepts y, for at most ``rounds`` rounds.

    Madaan et al. 2023, "Self-Refine: Iterative Refinement with Self-Feedback" (arXiv 2303.17651). Each call
    is a new prompt that holds the question, the latest answer and the request as text: what the workers'
    prefix caches have of it is not computed again, the answer itself is. At a bound, or if a call fails,
    the latest answer is returned.
    """
    question = with_trigger(body, options.trigger) if options.cot else dict(body)
    run = Run(sampler, options, progress)
    latest = await run.draw(question, 1, role="draft")
    run.fail_unless_finished()
    rounds, accepted = 0, False
    asks = options.feedback.replace("{accept}", options.accept)
    while rounds < options.rounds:
        text = without_thinking(latest[0].sample.text).strip()
        told = await run.draw(with_turn(in_prose(question), text, asks), 1, role="feedback")
        if not told:
            break
        feedback = without_thinking(told[0].sample.text).strip()
        accepted = options.early_stop and options.accept in feedback
        if accepted:
            break
        again = with_turn(question, text, options.refine.replace("{feedback}", feedback))
        refined = await run.draw(again, 1, role="refinement")
        if not refined:
            break
        latest, rounds = refined, rounds + 1
    if accepted and run.stopped is None:
        run.stopped = "accepted"
    return await conclude("self_refine", run, latest[0], rounds=rounds, accepted=accepted)
