"""Which samples pass: a pattern, a schema, an expected answer, a verifier's score; and by chance."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from router.checks import conforms, matches
from router.equivalence import canonical
from router.sampler import Sampler
from router.strategies import verified
from router.strategies.collect import Run
from router.strategies.scored import Scored
from router.verifiers import Verifier


class Checks(Protocol):
    """The options that a gate goes by; None: no such check."""

    @property
    def accept_regex(self) -> str | None: ...
    @property
    def accept_schema(self) -> dict[str, Any] | None: ...
    @property
    def expected(self) -> str | None: ...
    @property
    def verifier(self) -> str | None: ...
    @property
    def threshold(self) -> float: ...
    @property
    def beta(self) -> float | None: ...


class Gate:
    """Lets samples of ``prompt`` through. ``scores`` are the verifier's, by index, of those it was asked of:
    it is asked only where the other checks pass."""

    def __init__(
        self,
        run: Run,
        prompt: Mapping[str, Any],
        checks: Checks,
        verifier: Verifier | None,
        key: str | None,
    ) -> None:
        self.prompt = prompt
        self.scores: dict[int, float] = {}
        self._run = run
        self._checks = checks
        self._verifier = verifier
        self._key = key

    @classmethod
    async def of(cls, sampler: Sampler, run: Run, prompt: Mapping[str, Any], checks: Checks) -> Gate:
        """Raises :class:`braid.errors.BadRequest` if a check can't be made: before anything is generated."""
        verifier = verified.named(sampler, checks.verifier) if checks.verifier else None
        key = None if checks.expected is None else await canonical(checks.expected)
        gate = cls(run, prompt, checks, verifier, key)
        await gate._matches("")
        await gate._conforms("")
        return gate

    @property
    def keep(self) -> bool:
        """Whether the verifier goes on from samples."""
        return self._verifier is not None and verified.reads_on(self._verifier)

    async def let_through(self, samples: Sequence[Scored]) -> list[Scored]:
        """Those of these finished ``samples`` that pass every check; none once the deadline is past."""
        fitting = [one for one in samples if self._run.left_s > 0 and await self._fits(one)]
        if self._verifier is None:
            return fitting
        scores = await verified.scores_of(self._run, self._verifier, self.prompt, fitting)
        self.scores |= scores
        least = 0.0 if self._checks.beta else self._checks.threshold
        return [one for one in fitting if scores.get(one.sample.index, -1.0) >= least]

    def reward(self, one: Scored) -> float:
        """The verifier's score; without a verifier the mean log-probability, -inf where it is unknown."""
        return one.sample.mean_logprob if self._verifier is None else self.scores[one.sample.index]

    async def _fits(self, one: Scored) -> bool:
        text = one.sample.text
        known = self._key is None or one.key == self._key
        return known and await self._matches(text) and await self._conforms(text)

    async def _matches(self, text: str) -> bool:
        pattern = self._checks.accept_regex
        return pattern is None or await matches(pattern, text, "reasoning.accept_regex")

    async def _conforms(self, text: str) -> bool:
        schema = self._checks.accept_schema
        return schema is None or await conforms(schema, text, "reasoning.accept_schema")


def softly(
    passed: Sequence[Scored], reward: Callable[[Scored], float], beta: float, seed: Any
) -> list[Scored]:
    """Those of ``passed`` that chance lets through, with probability exp((r - r_max) / beta); the best
    always, one whose reward is unknown never."""
    chance = random.Random(seed)
    known = [one for one in passed if math.isfinite(reward(one))]
    best = max((reward(one) for one in known), default=0.0)
    return [one for one in known if chance.random() < math.exp((reward(one) - best) / beta)]
