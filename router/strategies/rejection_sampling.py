"""Rejection sampling: draw until a sample passes a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from braid.services import NAME
from router.extract import MAX_PATTERN
from router.sampler import Answer, Progress, Sampler
from router.schema import check_schema
from router.strategies import verified
from router.strategies.acceptance import Gate, softly
from router.strategies.collect import Run, conclude
from router.strategies.options import WaveOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored, most_confident


class RejectionSamplingOptions(WaveOptions):
    """Options of ``rejection_sampling``; a sample must pass every check that is given."""

    n: int = Field(16, ge=1, le=1024)
    """The most samples."""
    wanted: int = Field(1, ge=1, le=1024)
    """So many accepted samples end it."""
    accept_regex: str | None = Field(None, min_length=1, max_length=MAX_PATTERN)
    """Accept a text in which this regular expression (Python's `re`) is found."""
    accept_schema: dict[str, Any] | None = None
    """Accept a text (or its last fenced block) that is JSON of this schema, draft 2020-12."""
    expected: str | None = Field(None, min_length=1, max_length=500)
    """Accept an answer equal to this one: numbers by value, expressions by their simplified form."""
    verifier: str | None = Field(None, pattern=NAME)
    """Accept a sample that this verifier of the router scores `threshold` or more."""
    threshold: float = Field(0.5, ge=0, le=1)
    """The least score that `verifier` accepts."""
    beta: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Soft form: all `n` are drawn, and one that passes the checks is accepted with probability
    exp((r - r_max) / beta), r being the score of `verifier`, else the mean log-probability of its tokens."""

    @model_validator(mode="after")
    def _can_be_checked(self) -> Self:
        checks = (self.beta, self.accept_regex, self.accept_schema is not None, self.expected, self.verifier)
        if not any(checks):
            raise ValueError(
                "give accept_regex, accept_schema, expected, verifier or beta: else nothing is rejected"
            )
        if self.accept_schema is not None and (problem := check_schema(self.accept_schema)):
            raise ValueError(f"accept_schema {problem}")
        return self

    @property
    def slots(self) -> int:
        """As of waves; the soft form draws all at once."""
        return self.n if self.beta else super().slots


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: RejectionSamplingOptions, progress: Progress
) -> Answer:
    """The first accepted sample in submission order; if none is, the one with the highest score or else
    log-probability, and it says so.

    Samples are checked after whole waves, so that short ones gain nothing. Used as a data generator (STaR,
    Zelikman et al. 2022, arXiv 2203.14465; RFT, Yuan et al. 2023, arXiv 2308.01825) ``accepted`` in the
    report lists what to keep. The soft form is statistical rejection sampling (RSO, Liu et al. 2023, arXiv
    2309.06657) with r_max over the samples that passed; its chance is drawn from the request's seed.
    """
    run = Run(sampler, options, progress)
    gate = await Gate.of(sampler, run, sampled(body, options), options)
    answers, passed, wave = list[Scored](), list[Scored](), 0
    drawn = 0
    while run.stopped is None and drawn < run.n:
        size = run.n if options.beta else min(options.size(wave), run.n - drawn)
        ended = await run.draw(gate.prompt, size, keep=gate.keep)
        answers, drawn, wave = answers + ended, drawn + size, wave + 1
        passed += await gate.let_through(ended)
        if options.early_stop and not options.beta and len(passed) >= options.wanted and drawn < run.n:
            run.stopped = run.stopped or "accepted"
    run.fail_unless_finished()
    accepted = softly(passed, gate.reward, options.beta, body.get("seed")) if options.beta else passed
    fields: dict[str, Any] = {"accepted": [one.sample.index for one in accepted]}
    if not accepted:
        fields["note"] = "no sample was accepted; the best of them is returned"
    if options.verifier is not None:
        fields["samples"] = verified.with_scores(run, gate.scores)
    chosen = accepted[0] if accepted else verified.highest(answers, gate.scores) or most_confident(answers)
    return await conclude("rejection_sampling", run, chosen, **fields)
