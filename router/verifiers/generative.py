"""Generative verifier: a model reads the answer and says whether it is right (GenRM)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from braid import services
from braid.wire import Verdict
from router.verifiers import prompts
from router.verifiers.base import Check

if TYPE_CHECKING:
    from router.strategies.branches import Branch
    from router.strategies.run import Run
    from router.strategies.scored import Scored

ROLE = "verification"
"""Role in the report of the samples that verify."""
PLAIN_TOKENS = 512
"""Longest chain after a plain prompt, unless configured."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A verification chain of one sample: p(Yes) at its verdict, None if it has none."""

    sample: Scored
    p_yes: float | None


@dataclass(frozen=True, slots=True)
class GenerativeVerifier:
    """A :class:`router.verifiers.Critic`: r = the mean of p(Yes) over ``settings.k`` chains.

    Zhang et al. 2024, "Generative Verifiers: Reward Modeling as Next-Token Prediction" (arXiv 2408.15240).
    Chains without a verdict drop out. A chain goes on from the tokens of the answer, on the worker that
    made it, where the answer was drawn with ``keep`` and the same model verifies in a turn that follows.
    """

    name: str
    settings: services.GenerativeVerifier = field(default_factory=services.GenerativeVerifier)

    @property
    def goes_on(self) -> bool:
        """Whether it continues from answers, which are then worth keeping."""
        return not self.settings.model and "{answer}" not in self.settings.template

    def with_chains(self, k: int) -> GenerativeVerifier:
        """The same with ``k`` chains a sample."""
        return replace(self, settings=self.settings.model_copy(update={"k": k}))

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        return [check.score for check in await self.check(run, body, samples)]

    async def check(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[Check]:
        """The feedback is the text of the chain that likes the answer least."""
        return [_check(chains) for chains in await self.chains(run, body, samples)]

    async def chains(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[list[Chain]]:
        """The chains of each sample that ended; fewer than ``k`` where a bound came first. Samples are
        verified in the order given, as many at the same time as the run has slots for."""
        from router.strategies.branches import fork  # strategies import verifiers

        asked = [(place, prompts.answer(one.sample.text)) for place, one in enumerate(samples)]
        asked = [(place, said) for place, said in asked if said.strip()]
        found: list[list[Chain]] = [[] for _ in samples]
        width = max(1, run.options.slots // self.settings.k)
        for begin in range(0, len(asked), width):
            wave = asked[begin : begin + width]
            branches = [self._branch(run, body, samples[place], said) for place, said in wave]
            first = run.drawn
            count = len(wave) * self.settings.k
            for ended in await run.draw(fork(branches), count, role=ROLE, watch=self._verdict()):
                place, _ = wave[(ended.sample.index - first) // self.settings.k]
                found[place].append(Chain(ended, ended.sample.confidence))
        return found

    def _verdict(self) -> Verdict:
        """What the workers look for; they have the candidates of every token at hand."""
        return Verdict(tuple(self.settings.yes), tuple(self.settings.no), self.settings.top_logprobs)

    def _branch(self, run: Run, body: Mapping[str, Any], scored: Scored, said: str) -> Branch:
        from router.strategies.branches import Branch

        after = scored.sample if self.goes_on else None
        return Branch(self._request(run, body, said), self.settings.k, after)

    def _request(self, run: Run, body: Mapping[str, Any], said: str) -> dict[str, Any]:
        settings = self.settings
        bare = prompts.bare(body)
        if "{answer}" in settings.template:
            filling = {"{question}": prompts.question(body, run), "{answer}": said}
            prompt = re.sub(r"\{(?:question|answer)\}", lambda found: filling[found[0]], settings.template)
            request = prompts.alone(bare, prompt)
        else:
            request = prompts.followed(bare, said, settings.template)
        temperature = settings.temperature
        if temperature is None:
            temperature = 0.0 if settings.k == 1 else 1.0
        request["temperature"] = temperature
        if settings.max_tokens is not None:
            request["max_tokens"] = settings.max_tokens
        if settings.model:
            request["model"] = settings.model
        return request if "messages" in request else {"max_tokens": PLAIN_TOKENS, **request}


def _check(chains: Sequence[Chain]) -> Check:
    known = [(chain.p_yes, chain.sample.sample.text) for chain in chains if chain.p_yes is not None]
    if not known:
        return Check()
    _, least = min(known, key=lambda pair: pair[0])
    return Check(fmean(p for p, _ in known), prompts.answer(least).strip())
