"""A plain request: the body as it is, once. Every sampling adapter of the engine passes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import collect, conclude
from router.strategies.options import SingleOptions


class DirectOptions(SingleOptions):
    """Options of ``direct``."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: DirectOptions, progress: Progress
) -> Answer:
    """One sample of the prompt."""
    got = await collect(sampler, body, options, progress)
    return await conclude("direct", got, got.finished[0])
