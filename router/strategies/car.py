"""Certainty-based adaptive routing (CAR): reason at length only where the short answer is uncertain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, conclude
from router.strategies.options import TRIGGER, SingleOptions
from router.strategies.prompt import with_trigger
from router.strategies.scored import finite


class Boundary(BaseModel):
    """Normal distributions of the short answers' perplexity, right and wrong ones apart, as a calibration
    set gives them. Uncertain is what is more likely a wrong answer's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    mean_right: float = Field(ge=1)
    mean_wrong: float = Field(ge=1)
    std_right: float = Field(gt=0)
    std_wrong: float = Field(gt=0)
    prior_right: float = Field(0.5, gt=0, lt=1)
    """Share of right short answers."""

    @model_validator(mode="after")
    def _wrong_is_less_certain(self) -> Self:
        if self.mean_wrong <= self.mean_right:
            raise ValueError("mean_wrong must be over mean_right: else perplexity tells nothing")
        return self

    def uncertain(self, ppl: float) -> bool:
        """Whether p(wrong | ppl) > p(right | ppl). Outside the two means the nearer one decides: the tails
        of a wider curve say nothing."""
        if not self.mean_right < ppl < self.mean_wrong:
            return ppl >= self.mean_wrong
        right = _log_normal(ppl, self.mean_right, self.std_right) + math.log(self.prior_right)
        wrong = _log_normal(ppl, self.mean_wrong, self.std_wrong) + math.log(1 - self.prior_right)
        return wrong > right


def calibrate(right: Sequence[float], wrong: Sequence[float]) -> Boundary:
    """The boundary of a calibration set: perplexities of its right and of its wrong short answers, neither
    empty. Raises :class:`ValueError` where they don't separate."""
    return Boundary(
        mean_right=fmean(right),
        mean_wrong=fmean(wrong),
        std_right=pstdev(right) or 1e-6,
        std_wrong=pstdev(wrong) or 1e-6,
        prior_right=len(right) / (len(right) + len(wrong)),
    )


def _log_normal(x: float, mean: float, std: float) -> float:
    return -(((x - mean) / std) ** 2) / 2 - math.log(std)


class CarOptions(SingleOptions):
    """Options of ``car``."""

    threshold: float = Field(1.1, ge=1, allow_inf_nan=False)
    """Perplexity over which the short answer is uncertain, best the 75th percentile of a calibration set's.
    The default is calibrated for no model."""
    boundary: Boundary | None = None
    """A calibrated boundary of two normal distributions, used instead of `threshold`."""
    short: str = Field("Answer with the final answer only, without any explanation.", max_length=2000)
    """What makes the model answer shortly."""
    trigger: str = Field(TRIGGER, min_length=1, max_length=2000)
    """What makes the model reason (default: the router's setting)."""


async def run(sampler: Sampler, body: Mapping[str, Any], options: CarOptions, progress: Progress) -> Answer:
    """A short answer; long reasoning only if its perplexity exp(-mean log p) is over the boundary.

    Lu et al. 2025, "Prolonged Reasoning Is Not All You Need: Certainty-Based Adaptive Routing" (arXiv
    2505.15154). An unknown perplexity counts as uncertain. At a bound the short answer is returned.
    """
    run = Run(sampler, options, progress)
    chosen = await run.draw(with_trigger(body, options.short) if options.short else body, 1, role="short")
    ppl = math.exp(min(700.0, -chosen[0].sample.mean_logprob)) if chosen else math.inf
    uncertain = options.boundary.uncertain(ppl) if options.boundary else ppl > options.threshold
    if uncertain:
        chosen = await run.draw(with_trigger(body, options.trigger), 1, role="long") or chosen
    run.fail_unless_finished()
    return await conclude("car", run, chosen[0], perplexity=finite(ppl), route=chosen[0].role)
