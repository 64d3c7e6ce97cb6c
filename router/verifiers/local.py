"""Verifiers that ask nobody: the answer's own probability, and exact arithmetic."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from router.verifiers import prompts
from router.verifiers.base import Check
from router.verifiers.equations import equations, plain

if TYPE_CHECKING:
    from router.strategies.run import Run
    from router.strategies.scored import Scored

MOST_TOLD = 8
"""Wrong equations that the feedback names."""


@dataclass(frozen=True, slots=True)
class LogprobVerifier:
    """exp of the mean log-probability: the geometric mean probability of the sample's tokens."""

    name: str = "logprob"

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        means = [one.sample.mean_logprob for one in samples]
        return [math.exp(min(0.0, mean)) if math.isfinite(mean) else None for mean in means]


@dataclass(frozen=True, slots=True)
class ArithmeticVerifier:
    """The share of equations in the answer that hold (:mod:`router.verifiers.equations`); unknown where
    there is none."""

    name: str = "arithmetic"

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        return [check.score for check in await self.check(run, body, samples)]

    async def check(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[Check]:
        """The feedback names what does not hold, and what it should be."""
        found = []
        for one in samples:
            found.append(_check(prompts.answer(one.sample.text)))
            await asyncio.sleep(0)  # a long text takes milliseconds: others have their turn in between
        return found


def _check(text: str) -> Check:
    all_of_them = equations(text)
    if not all_of_them:
        return Check()
    wrong = [one for one in all_of_them if not one.holds]
    told = [f"{one.left} = {plain(one.value)}, not {one.right}." for one in wrong[:MOST_TOLD]]
    return Check(1 - len(wrong) / len(all_of_them), "\n".join(told))
