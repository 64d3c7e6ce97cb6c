"""Reasoning effort: a word of a request that the engine reads, or that chooses a strategy by a table.

The table is data: rows of strategies with what they were measured to cost and to bring, on the front where
nothing is better and cheaper, and the row that each level of effort may go up to. ``braid calibrate`` makes
one of an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from braid.errors import BadRequest

Effort = Literal["pass", "auto"]
"""What a bare effort does: it goes to the engine, or it chooses the strategy."""
Level = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
LEVELS: tuple[str, ...] = get_args(Level)
"""OpenAI's words, the least effort first."""
DEFAULT: Level = "medium"
_SHIPPED = Path(__file__).with_name("efforts.json")
_OPENAI = frozenset({"effort", "summary", "generate_summary", "context", "mode"})
"""Fields of OpenAI's own ``reasoning`` object."""


class Row(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A strategy that was measured.

    Attributes:
        name: what the evaluation calls it.
        request: fields of a request, ``reasoning`` with its strategy among them.
        accuracy: share of the problems that it answered right.
        tokens: mean of the tokens generated for a problem, over all samples and calls.
        latency_s: median time of a whole reply, None if it was not measured.
    """

    name: str
    request: dict[str, Any]
    accuracy: float
    tokens: float
    latency_s: float | None = None

    @property
    def reasoning(self) -> dict[str, Any]:
        """The strategy and its options."""
        return dict(self.request.get("reasoning") or {"strategy": "direct"})


class Choice(msgspec.Struct, frozen=True):
    """A row, and why it."""

    row: Row
    why: str


class Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A calibrated table. ``rows``: by rising tokens and accuracy; ``levels``: the name of each level's row;
    ``model`` and ``source`` say what was measured, and how."""

    model: str
    source: str
    rows: list[Row]
    levels: dict[Level, str]
    format: Literal[1] = 1

    def check(self) -> None:
        """Raise :class:`ValueError` if it can't be used."""
        names = [row.name for row in self.rows]
        if not names or len(set(names)) < len(names):
            raise ValueError("rows must be one or more, each with a name of its own")
        if sorted(self.rows, key=lambda row: row.tokens) != self.rows:
            raise ValueError("rows must be ordered by tokens")
        if missing := [level for level in LEVELS if self.levels.get(level) not in names]:  # type: ignore[call-overload]
            raise ValueError(f"level {missing[0]} names no row")

    def choose(
        self,
        level: str,
        tokens: float | None = None,
        seconds: float | None = None,
        samples: int | None = None,
        greedy: bool = False,
    ) -> Choice:
        """The most accurate row up to that of ``level`` that is expected to keep the bounds: ``tokens``
        generated, ``seconds``, ``samples``; ``greedy``: one sample only. The first row where none does."""
        names = [row.name for row in self.rows]
        upto = self.rows[: names.index(self.levels[level]) + 1]  # type: ignore[index]
        most = 1 if greedy else samples
        fitting = [row for row in upto if _fits(row, tokens, seconds, most)]
        if not fitting:
            return Choice(upto[0], "no row is expected to keep the bounds: the cheapest is taken")
        best = max(fitting, key=lambda row: (row.accuracy, -row.tokens))
        if best is upto[-1]:
            return Choice(best, f"the table's row for effort {level}")
        if upto[-1] in fitting:
            return Choice(best, f"more accurate than the table's row for effort {level}, and cheaper")
        return Choice(best, f"the most accurate up to effort {level} that is expected to keep the bounds")


def _fits(row: Row, tokens: float | None, seconds: float | None, samples: int | None) -> bool:
    late = seconds is not None and row.latency_s is not None and row.latency_s > seconds
    many = samples is not None and (row.reasoning.get("n") or 1) > samples
    return not (late or many or (tokens is not None and row.tokens > tokens))


def read(raw: bytes) -> Table:
    """A table from its JSON; raises :class:`ValueError` if it is none."""
    try:
        table = msgspec.json.decode(raw, type=Table)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    table.check()
    return table


def load(path: Path | None) -> Table:
    """The operator's table, or the one that ships with the router (calibrated for the demo model).

    Raises:
        ValueError: it can't be read.
    """
    if path is None:
        return read(_SHIPPED.read_bytes())
    try:
        return read(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"effort_table {path}: {error}") from None


@cache
def shipped() -> Table:
    """The table that ships with the router."""
    return load(None)


def separate(body: dict[str, Any], options: Mapping[str, Any] | None, mode: Effort) -> dict[str, Any] | None:
    """``options``, a request's ``reasoning``, without OpenAI's own fields; None if nothing is left of it.

    The effort moves to ``reasoning_effort`` of ``body``, where the engine reads it; for strategy ``auto``,
    and with ``mode`` ``auto`` where no strategy is named, to the option ``effort``.

    Raises:
        BadRequest: it is no level, or said twice.
    """
    given = dict(options or {})
    level = given.pop("effort", None)
    if level is not None:
        if level not in LEVELS:
            raise BadRequest(f"reasoning.effort is one of {', '.join(LEVELS)}.", param="reasoning.effort")
        if body.setdefault("reasoning_effort", level) not in (level, None):
            raise BadRequest("reasoning.effort and reasoning_effort differ.", param="reasoning_effort")
        body["reasoning_effort"] = level
    rest = {key: value for key, value in given.items() if key not in _OPENAI}
    if "strategy" not in rest and mode == "auto" and body.get("reasoning_effort") is not None:
        rest["strategy"] = "auto"
    if rest.get("strategy") == "auto":
        effort = body.pop("reasoning_effort", None)
        return {**rest, **({} if effort is None else {"effort": effort})}
    return rest if rest or options == {} else None
