"""Figures of the comparison of strategies: a row a method, and the tables that show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.report import number, table
from benchmarks.stats import summary
from braid.evaluate.figures import wilson

if TYPE_CHECKING:
    from benchmarks.reasoning_peers import Record, Turn

Row = dict[str, Any]


def figures(records: Sequence[Record], turns: Sequence[Turn]) -> dict[str, list[Row]]:
    """Rows by part, in the order the methods were first asked; shares have 95 % Wilson intervals."""
    found: dict[str, list[Row]] = {}
    for part, method in dict.fromkeys((record.part, record.method) for record in records):
        mine = [record for record in records if (record.part, record.method) == (part, method)]
        took = [turn for turn in turns if (turn.part, turn.method) == (part, method)]
        found.setdefault(part, []).append(row(method, mine, took))
    return found


def row(method: str, records: Sequence[Record], turns: Sequence[Turn]) -> Row:
    """One method: seconds of the answered questions; everything else a question, failed ones included."""
    right, asked = sum(record.right for record in records), len(records)
    engines = {
        name: sum(turn.engines.get(name, 0.0) for turn in turns) / asked
        for name in ("prompt_tokens", "prompt_computed", "prefill_kv_computed", "generated", "requests")
    }
    told = [record.reply.tokens for record in records if record.reply.tokens is not None]
    return {
        "method": method,
        "questions": asked,
        "errors": [record.reply.error for record in records if record.reply.error],
        "seconds": summary([record.reply.seconds for record in records if not record.reply.error]),
        "engines": engines,
        "tokens_told": sum(told) / len(told) if told else None,
        "right": right,
        "accuracy": right / asked,
        "accuracy_ci95": wilson(right, asked),
        "prompt": max((turn.prompt for turn in turns if turn.prompt), default=None),
        "computed": [turn.engines["prompt_computed"] for turn in turns],
        "allowed": [turn.allowed for turn in turns],
        "within_allowed": [
            turn.engines["prompt_computed"] <= turn.allowed for turn in turns if turn.allowed is not None
        ],
    }


COMMON: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
    ("method", lambda row: str(row["method"])),
    ("asked", lambda row: str(row["questions"])),
    ("errors", lambda row: str(len(row["errors"]))),
    ("p50 s", lambda row: f"{row['seconds']['p50']:.3f}" if row["seconds"]["count"] else "-"),
    ("p95 s", lambda row: f"{row['seconds']['p95']:.3f}" if row["seconds"]["count"] else "-"),
    ("generated", lambda row: number(row["engines"]["generated"])),
    ("prompt computed", lambda row: number(row["engines"]["prompt_computed"])),
    ("engine requests", lambda row: number(row["engines"]["requests"])),
]


def vote_table(rows: Sequence[Row]) -> str:
    """Self-consistency; tokens and requests a question."""
    columns = [
        *COMMON,
        ("right", lambda row: f"{row['accuracy']:.1%}"),
        ("95 %", lambda row: "-".join(f"{bound * 100:.0f}" for bound in row["accuracy_ci95"])),
    ]
    return table(columns, rows) if rows else ""


def judge_table(rows: Sequence[Row]) -> str:
    """Best of n with a long prompt; tokens and requests a question."""
    columns = [
        *COMMON,
        ("prompt", lambda row: str(row["prompt"])),
        ("within bound", lambda row: f"{sum(row['within_allowed'])}/{len(row['within_allowed'])}"),
    ]
    return table(columns, rows) if rows else ""
