"""``braid calibrate``: the table by which strategy ``auto`` goes, from an evaluation's results.

Exit codes: 0 written; 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
from rich.console import Console
from rich.table import Table as Shown

from braid import jsonl
from braid.client import EXIT_USAGE, CommandFailed
from router.efforts import LEVELS, Level, Row, Table

GAIN = 0.5
"""Points of accuracy that a dearer strategy must add to be worth its tokens."""


def rows(methods: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """What an evaluation measured; without ``auto``, which chooses among the others, and without what
    was never answered."""
    found = []
    for name, entry in methods.items():
        tokens, request = entry["completion_tokens"]["per_problem"], dict(entry["request"])
        strategy = (request.get("reasoning") or {}).get("strategy")
        if tokens is not None and strategy != "auto":
            latency = entry["latency_s"]["p50"]
            found.append(Row(name, request, entry["accuracy"], tokens, latency))
    return found


def front(measured: Sequence[Row], gain: float) -> list[Row]:
    """The Pareto front by rising tokens: each row is more accurate than every cheaper one, by ``gain`` (0 to
    1) at least. Of equally cheap ones the more accurate counts."""
    kept: list[Row] = []
    for row in sorted(measured, key=lambda row: (row.tokens, -row.accuracy)):
        more = row.accuracy - kept[-1].accuracy if kept else 1.0
        if more > 0 and more >= gain - 1e-12:
            kept.append(row)
    return kept


def levels(kept: Sequence[Row]) -> dict[Level, str]:
    """The row of each level: the one whose tokens are nearest, by their ratio, to the level's. These rise by
    equal factors from the cheapest row's (``none``) to the dearest's (``max``)."""
    tokens = [max(row.tokens, 1.0) for row in kept]
    step = math.log(tokens[-1] / tokens[0]) / (len(LEVELS) - 1)
    found: dict[Level, str] = {}
    for place, level in enumerate(get_args(Level)):
        wanted = math.log(tokens[0]) + place * step
        away = [round(abs(math.log(one) - wanted), 9) for one in tokens]
        found[level] = kept[away.index(min(away))].name
    return found


def calibrated(result: Mapping[str, Any], source: str, gain: float = GAIN / 100) -> Table:
    """The table of an evaluation's result.

    Raises:
        ValueError: it has nothing to choose from, or is no result of ``braid eval``.
    """
    try:
        kept = front(rows(result["methods"]), gain)
        model, count = str(result["model"]), result["problems"]["count"]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no result of `braid eval` ({type(error).__name__}: {error})") from None
    if not kept:
        raise ValueError("no strategy was answered")
    told = f"{source}: {count} problems, braid eval of {str(result.get('ended', ''))[:10]}"
    table = Table(model, told, kept, levels(kept))
    table.check()
    return table


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="braid calibrate",
        description="Make the table that strategy auto goes by (the router's effort_table).",
    )
    result.add_argument("results", type=Path, help="NAME.json of `braid eval`")
    result.add_argument("--out", type=Path, default=Path("efforts.json"), help="file (%(default)s)")
    result.add_argument(
        "--gain", type=float, default=GAIN, help="points a dearer strategy must add (%(default)s)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        table = _calibrate(arguments)
    except CommandFailed as failure:
        print(f"braid calibrate: {failure}", file=sys.stderr)
        return failure.exit_code
    shown = Shown("effort", "strategy", "right", "tokens", "p50 s", title=table.source)
    by_name = {row.name: row for row in table.rows}
    for level, name in table.levels.items():
        row = by_name[name]
        latency = "-" if row.latency_s is None else f"{row.latency_s:.3g}"
        shown.add_row(level, name, f"{row.accuracy:.1%}", f"{row.tokens:,.0f}", latency)
    Console(highlight=False).print(shown)
    return 0


def _calibrate(arguments: argparse.Namespace) -> Table:
    try:
        result = json.loads(arguments.results.read_text("utf-8"))
        table = calibrated(result, arguments.results.name, arguments.gain / 100)
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{arguments.results}: {error}", EXIT_USAGE) from None
    raw = msgspec.json.format(msgspec.json.encode(table), indent=1).decode()
    jsonl.replace(arguments.out, [raw, "\n"])
    return table
