"""What an evaluation says at its end: tables and the result as it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from braid.evaluate.plot import metric

Entry = Mapping[str, Any]


def table(title: str, methods: Mapping[str, Entry]) -> Table:
    """One row a method."""
    caption = "tokens, samples, KV: mean of a problem; prompt tokens: those a cache had in brackets"
    shown = Table(title=Text(title), caption=caption)
    shown.add_column("strategy", overflow="fold")
    for name, _ in COLUMNS:
        shown.add_column(name, justify="right")
    for name, entry in methods.items():
        shown.add_row(Text(name), *(Text(column(entry)) for _, column in COLUMNS))
    return shown


COLUMNS: tuple[tuple[str, Callable[[Entry], str]], ...] = (
    ("right", lambda e: f"{e['accuracy']:.1%}"),
    ("95 %", lambda e: _interval(e["accuracy_ci95"], "{:.1%}")),
    ("no answer", lambda e: str(e["no_answer"])),
    ("failed", lambda e: str(e["failed"])),
    ("tokens", lambda e: _mean(e["completion_tokens"])),
    ("prompt", lambda e: f"{_mean(e['prompt_tokens'])} ({_mean(e['cached_tokens'])})"),
    ("samples", lambda e: _mean(e["samples"])),
    ("p50 / p95 s", lambda e: f"{_number(e['latency_s']['p50'])} / {_number(e['latency_s']['p95'])}"),
    (
        "KV",
        lambda e: "-" if e["kv_bytes"]["per_problem"] is None else metric(e["kv_bytes"]["per_problem"], "B"),
    ),
    ("transfers", lambda e: _mean(e["kv_transfers"])),
    ("stopped early", lambda e: _counts(e["stopped_early"])),
)


def compared(baseline: str, comparisons: Sequence[Entry]) -> Table:
    """Every other method minus ``baseline``, on the same problems."""
    shown = Table(title=Text(f"minus {baseline}, paired"), caption="p: McNemar, exact; interval: Newcombe")
    shown.add_column("strategy", overflow="fold")
    for name in ("points", "95 %", "only it right", "only the other", "p", "tokens", "latency"):
        shown.add_column(name, justify="right")
    for entry in comparisons:
        if baseline in (entry["first"], entry["second"]):
            shown.add_row(*_row(entry if entry["second"] == baseline else turned(entry)))
    return shown


def _row(entry: Entry) -> list[Text]:
    cells = (
        entry["first"],
        f"{100 * entry['difference']:+.1f}",
        _interval([100 * bound for bound in entry["difference_ci95"]], "{:+.1f}"),
        str(entry["only_first_right"]),
        str(entry["only_second_right"]),
        f"{entry['mcnemar_p']:.2g}",
        _times(entry["tokens_ratio"]),
        _times(entry["latency_ratio"]),
    )
    return [Text(cell) for cell in cells]


def turned(entry: Entry) -> dict[str, Any]:
    """A comparison the other way round."""
    low, high = entry["difference_ci95"]
    return {
        **entry,
        "first": entry["second"],
        "second": entry["first"],
        "only_first_right": entry["only_second_right"],
        "only_second_right": entry["only_first_right"],
        "difference": -entry["difference"],
        "difference_ci95": [-high, -low],
        "tokens_ratio": _inverse(entry["tokens_ratio"]),
        "latency_ratio": _inverse(entry["latency_ratio"]),
    }


def rounded(value: Any) -> Any:
    """The same with floats cut to six decimals."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"x {ratio:.2f}"


def _interval(bounds: Sequence[float], form: str) -> str:
    return " to ".join(form.format(bound) for bound in bounds)


def _mean(cost: Entry) -> str:
    return _number(cost["per_problem"])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "-"
