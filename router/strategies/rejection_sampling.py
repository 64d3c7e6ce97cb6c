"""Rejection sampling: draw until a sample passes a check."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from router.checks import conforms, matches
from router.equivalence import canonical
from router.extract import MAX_PATTERN
from router.sampler import Answer, Progress, Sampler
from router.schema import check_schema
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
    beta: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Soft form: all `n` are drawn, and one that passes the checks is accepted with probability
    exp((r - r_max) / beta), r being the mean log-probability of its tokens."""

    @model_validator(mode="after")
    def _can_be_checked(self) -> Self:
        if not any((self.beta, self.accept_regex, self.accept_schema is not None, self.expected)):
            raise ValueError("give accept_regex, accept_schema, expected or beta: else nothing is rejected")
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
    """The first accepted sample in submission order; the most confident one if none is, and it says so.

    Samples are checked after whole waves, so that short ones gain nothing. Used as a data generator (STaR,
    Zelikman et al. 2022, arXiv 2203.14465; RFT, Yuan et al. 2023, arXiv 2308.01825) ``accepted`` in the
    report lists what to keep. The soft form is statistical rejection sampling (RSO, Liu et al. 2023, arXiv
    2309.06657) with r_max over the samples that passed; its chance is drawn from the request's seed.
    """
    run = Run(sampler, options, progress)
    for field, check in (("accept_regex", options.accept_regex), ("accept_schema", options.accept_schema)):
        if check is not None:
            await _passes(field, check, "")  # an invalid one is refused before anything is generated
    key = None if options.expected is None else await canonical(options.expected)
    prompt, passed, wave = sampled(body, options), list[Scored](), 0
    while run.stopped is None and run.drawn < run.n:
        size = run.n if options.beta else min(options.size(wave), run.n - run.drawn)
        drawn = await run.draw(prompt, size)
        passed += [one for one in drawn if run.left_s > 0 and await _accepts(one, options, key)]
        wave += 1
        if options.early_stop and not options.beta and len(passed) >= options.wanted and run.drawn < run.n:
            run.stopped = run.stopped or "accepted"
    run.fail_unless_finished()
    accepted = _softly(passed, options.beta, body.get("seed")) if options.beta else passed
    note = {} if accepted else {"note": "no sample was accepted; the most confident one is returned"}
    chosen = accepted[0] if accepted else most_confident(run.finished)
    indices = [one.sample.index for one in accepted]
    return await conclude("rejection_sampling", run, chosen, accepted=indices, **note)


async def _passes(field: str, check: str | dict[str, Any], text: str) -> bool:
    field = f"reasoning.{field}"
    if isinstance(check, str):
        return await matches(check, text, field)
    return await conforms(check, text, field)


async def _accepts(one: Scored, options: RejectionSamplingOptions, key: str | None) -> bool:
    text = one.sample.text
    return (
        (key is None or one.key == key)
        and (options.accept_regex is None or await _passes("accept_regex", options.accept_regex, text))
        and (options.accept_schema is None or await _passes("accept_schema", options.accept_schema, text))
    )


def _softly(passed: list[Scored], beta: float, seed: Any) -> list[Scored]:
    """Those of ``passed`` that their reward lets through; the best always. An unknown reward never."""
    chance = random.Random(seed)
    known = [one for one in passed if math.isfinite(one.sample.mean_logprob)]
    best = max((one.sample.mean_logprob for one in known), default=0.0)
    return [one for one in known if chance.random() < math.exp((one.sample.mean_logprob - best) / beta)]
