"""Cascade: models from cheap to dear; a cheaper one's answer is kept if it is sure enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from braid.errors import BraidError, DeadlineExceeded
from braid.services import NAME
from router.sampler import Answer, Progress, Sampler
from router.strategies import verified
from router.strategies.ballots import conclude_vote
from router.strategies.collect import Run
from router.strategies.levels import Level, judged, settling
from router.strategies.prompt import reasoned, sampled
from router.strategies.several import Metered, SeveralOptions, entries
from router.verifiers import Verifier


class CascadeOptions(SeveralOptions):
    """Options of ``cascade``."""

    n: int = Field(4, ge=1, le=128)
    """Samples of each model but the last. A single one is greedy where the request gives no temperature."""
    final_n: int = Field(1, ge=1, le=128)
    """Samples of the last model, likewise."""
    by: str = Field("agreement", pattern=NAME)
    """What an answer is judged by: the share of the model's samples that give it (`agreement`), the geometric
    mean probability of a token of its most confident sample (`margin`), or what a verifier of the router, by
    its name, scores that sample."""
    threshold: float = Field(0.75, ge=0, le=1, allow_inf_nan=False)
    """The least of it, 0 to 1, that an answer is accepted with. The default is calibrated for no model."""

    @property
    def slots(self) -> int:
        """One model runs at a time."""
        return max(self.n, self.final_n)

    @model_validator(mode="after")
    def _one_sample_agrees_with_itself(self) -> Self:
        if self.by == "agreement" and self.n == 1:
            raise ValueError("agreement needs an n of 2 or more; judge one sample by margin or a verifier")
        return self


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: CascadeOptions, progress: Progress
) -> Answer:
    """The first model's answer that is judged at least ``threshold``, else the last model's.

    Chen et al. 2023, "FrugalGPT" (arXiv 2305.05176); judged by agreement as in Yue et al. 2023 (arXiv
    2310.03094), or by a verifier as in AutoMix (Aggarwal et al. 2023, arXiv 2310.12963). Samples without an
    answer agree with none. With ``early_stop`` a model's samples are cancelled once the rest can't undo that
    its answer is accepted, which is safe in any order. A model that can't be served is passed over; at a
    bound the dearest one that has answered counts.
    """
    models = options.order()
    verifier = None if options.by in ("agreement", "margin") else verified.named(sampler, options.by, "by")
    metered, levels = Metered(sampler), list[Level]()
    run = Run(metered, options, progress)
    for model in models:
        last = model == models[-1]
        level = Level(model, range(run.drawn, run.drawn + (options.final_n if last else options.n)), last)
        levels.append(level)
        await _ask(run, level, _question(body, options, level), options, verifier)
        if level.accepted or run.stopped is not None:
            break
    run.fail_unless_finished()
    chosen = next(level for level in reversed(levels) if level.answers)
    model_of = {number: level.model for level in levels for number in level.numbers}
    told = {"models": [level.report(metered) for level in levels], "model": chosen.model}
    samples = entries(run, model_of)
    return await conclude_vote("cascade", run, chosen.votes, chosen.answers, samples=samples, **told)


def _question(body: Mapping[str, Any], options: CascadeOptions, level: Level) -> dict[str, Any]:
    body = {**body, "model": level.model}
    if len(level.numbers) > 1:
        return sampled(body, options)
    return {"temperature": 0.0, **reasoned(body, options)}


async def _ask(
    run: Run, level: Level, question: Mapping[str, Any], options: CascadeOptions, verifier: Verifier | None
) -> None:
    """Draw the model's samples and judge its answer."""
    agreement = options.threshold if options.by == "agreement" else float("inf")
    stop = settling(level, agreement) if options.early_stop else None
    keep = verifier is not None and verified.reads_on(verifier) and not level.last
    try:
        level.answers = await run.draw(question, len(level.numbers), settled=stop, keep=keep)
        if run.stopped == "failed" and not level.last:  # this model's samples, not the run
            run.stopped = None
            level.error = next((one.sample.error for one in level.of(run.ended) if one.sample.error), "")
        if level.answers and not level.last:
            level.score = await judged(run, level, question, options.by, verifier)
    except BraidError as error:
        if level.last or options.on_failure == "all" or isinstance(error, DeadlineExceeded):
            raise
        level.error = error.message
    level.accept(options.threshold)
