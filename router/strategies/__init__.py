"""Reasoning strategies: each is one file with an options model and a short async function ``run``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from braid.errors import BadRequest
from router.sampler import Answer
from router.strategies import best_of_n, cot, direct, self_consistency
from router.strategies.options import Options


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """A strategy as the router sees it.

    Attributes:
        name: what a request calls it.
        options: the model of its options; its JSON schema documents them.
        run: ``async run(sampler, body, options, progress) -> Answer``.
    """

    name: str
    options: type[Options]
    run: Callable[..., Awaitable[Answer]]

    def parse(self, reasoning: Mapping[str, Any]) -> Options:
        """The options in a request's ``reasoning`` (its ``strategy`` is passed over).

        Raises:
            BadRequest: naming the field, and never its value.
        """
        given = {key: value for key, value in reasoning.items() if key != "strategy"}
        try:
            return self.options.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(["reasoning", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            takes = ", ".join(sorted(self.options.model_fields))
            raise BadRequest(f"{self.name} takes no such option; it takes {takes}", param=field[:200])
        raise BadRequest(f"{field}: {first['msg']}", param=field)


_SPECS = {
    spec.name: spec
    for spec in (
        StrategySpec("direct", direct.DirectOptions, direct.run),
        StrategySpec("cot", cot.CotOptions, cot.run),
        StrategySpec("self_consistency", self_consistency.SelfConsistencyOptions, self_consistency.run),
        StrategySpec("best_of_n", best_of_n.BestOfNOptions, best_of_n.run),
    )
}


def names() -> tuple[str, ...]:
    """The strategies a request may name."""
    return tuple(_SPECS)


def get(name: str) -> StrategySpec:
    """The strategy called ``name``.

    Raises:
        BadRequest: there is none.
    """
    spec = _SPECS.get(name) if isinstance(name, str) else None
    if spec is None:
        raise BadRequest(
            f"no such strategy; there are {', '.join(_SPECS)}", param="reasoning.strategy", code="strategy"
        )
    return spec
