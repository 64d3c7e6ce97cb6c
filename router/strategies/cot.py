"""Zero-shot chain of thought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import collect, conclude
from router.strategies.options import TRIGGER, SingleOptions
from router.strategies.prompt import with_trigger


class CotOptions(SingleOptions):
    """Options of ``cot``."""

    trigger: str = Field(TRIGGER, min_length=1, max_length=2000)
    """What makes the model reason (default: the router's setting)."""


async def run(sampler: Sampler, body: Mapping[str, Any], options: CotOptions, progress: Progress) -> Answer:
    """One sample of the prompt and a trigger ("Let's think step by step.") that makes the model reason.

    Kojima et al. 2022, "Large Language Models are Zero-Shot Reasoners" (arXiv 2205.11916), in one call:
    the answer is extracted from the reasoning instead of asked for in a second prompt.
    """
    got = await collect(sampler, with_trigger(body, options.trigger), options, progress)
    return await conclude("cot", got, got.finished[0])
