"""Auto: reasoning effort and bounds choose among the other strategies by a calibrated table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationInfo, model_validator

from braid.errors import BadRequest
from router import efforts, strategies
from router.efforts import Choice, Level, Row, Table
from router.sampler import Answer, Progress, Sampler
from router.strategies.options import TRIGGER, Options
from router.strategies.spec import StrategySpec


class AutoOptions(Options):
    """Options of ``auto``; those of all strategies hold for the one that is chosen."""

    n: int = Field(1024, ge=1, le=1024)
    """A bound: a strategy of the table that draws more samples is not chosen."""
    effort: Level = efforts.DEFAULT
    """How far up the table it may go: OpenAI's `reasoning_effort`."""
    trigger: str = Field(TRIGGER, min_length=1, max_length=2000)
    """What makes the model reason (default: the router's setting)."""
    _table: Table = PrivateAttr()

    @model_validator(mode="after")
    def _by_the_routers_table(self, info: ValidationInfo) -> Self:
        self._table = (info.context or {}).get("efforts") or efforts.shipped()
        return self

    @property
    def slots(self) -> int:
        """Those of the strategy that is chosen."""
        return self.inner(self.choose().row)[1].slots

    def choose(self, greedy: bool = False) -> Choice:
        """The row; one of a single sample if the request is ``greedy``."""
        return self._table.choose(self.effort, self.budget_tokens, self.deadline_s, self.n, greedy)

    def inner(self, row: Row) -> tuple[StrategySpec, Options]:
        """The strategy of a row, with its options and those given for all."""
        spec = strategies.get(row.reasoning["strategy"])
        given = {name: getattr(self, name) for name in self.model_fields_set - {"n", "effort"}}
        takes = spec.options.model_fields
        return spec, spec.parse(
            {**{name: value for name, value in given.items() if name in takes}, **row.reasoning}
        )

    def told(self, choice: Choice) -> dict[str, Any]:
        """What the report says of the choice."""
        row = choice.row
        expected = {"accuracy": row.accuracy, "tokens": row.tokens, "latency_s": row.latency_s}
        of = {"source": self._table.source, "model": self._table.model}
        return {"effort": self.effort, "chosen": row.name, "why": choice.why, "expected": expected, **of}


def fields(row: Row, body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` with the row's fields where the client says nothing."""
    given = {key: value for key, value in body.items() if value is not None}
    return {**body, **{key: value for key, value in row.request.items() if key != "reasoning"}, **given}


def check(table: Table) -> None:
    """Raise :class:`ValueError` if a row can't be run."""
    for row in table.rows:
        try:
            if row.reasoning.get("strategy") == "auto":
                raise BadRequest("auto can't choose itself")
            AutoOptions().inner(row)
        except BadRequest as error:
            raise ValueError(f"effort_table: row {row.name!r}: {error.message}") from None


async def run(sampler: Sampler, body: Mapping[str, Any], options: AutoOptions, progress: Progress) -> Answer:
    """The answer of the table's strategy for this effort, within the bounds; its report, with what was chosen
    and why (``auto``).

    Snell et al. 2024, "Scaling LLM Test-Time Compute Optimally" (arXiv 2408.03314) choose the strategy by
    compute budget and difficulty; this goes by the budget alone. What is expected of a strategy is its mean
    over the problems that the table was calibrated on.
    """
    choice = options.choose(greedy=body.get("temperature") == 0)
    spec, inner = options.inner(choice.row)
    answer = await spec.run(sampler, fields(choice.row, body), inner, progress)
    told = {"strategy": "auto", "then": spec.name, "auto": options.told(choice)}
    return Answer(answer.choice, {**answer.report, **told}, answer.usages, answer.tokens)
