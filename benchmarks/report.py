"""From records to figures: what is paired with what, and how it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.measure import FanoutRecord, HandoverRecord
from benchmarks.stats import summary

PLAIN = "plain"
PATH = "x-braid-path"
MS = 1000.0
SENT, EARLY = "prefill/braid_kv_sent_bytes_total", "prefill/braid_kv_early_bytes_total"
# For each stack, the reply header or counter in which a fan-out record tells what became of the KV cache.
PROOFS: dict[str, dict[str, str]] = {
    "nixl": {
        "transfers": "decode/vllm:nixl_bytes_transferred_count",
        "bytes": "decode/vllm:nixl_bytes_transferred_sum",
        "prefix_hits_on_decode": "decode/vllm:prefix_cache_hits_total",
        "expired_leases": "prefill/vllm:nixl_num_kv_expired_reqs_total",
    },
    "braid": {"transfers": "x-braid-kv-transfers", "bytes": "x-braid-kv-bytes"},
}


def handover_figures(records: Sequence[HandoverRecord]) -> list[dict[str, Any]]:
    """One row a prompt length and stack, in milliseconds.

    `handover_ms` is the time to first token minus the plain engine's for the same prompt in the same round,
    `ttft_ratio` the one divided by the other; `over_plain_p50` and `over_plain_p95` are the differences of
    the percentiles themselves. `total_ratio`: the same of the whole reply, for whose second token the decode
    engine has to run whoever drew the first. `early_share`: part of the KV bytes that left before the last
    chunk was computed.
    """
    rows = []
    for length in sorted({record.prompt_tokens for record in records}):
        plain = _by_round(records, PLAIN, length)
        base = summary([ttft for ttft, _, _ in plain.values()])
        for stack in _names(records):
            seen = _by_round(records, stack, length)
            pairs = [(seen[number], plain[number]) for number in seen if number in plain]
            ttft = summary([value for value, _, _ in seen.values()])
            row = {"prompt_tokens": length, "stack": stack, "ttft_ms": ttft}
            if stack != PLAIN and pairs:
                row["handover_ms"] = summary([mine[0] - other[0] for mine, other in pairs])
                row["ttft_ratio"] = summary([mine[0] / other[0] for mine, other in pairs])
                row["total_ratio"] = summary([mine[2] / other[2] for mine, other in pairs if other[2]])
                row["over_plain_p50"] = ttft["p50"] - base["p50"]
                row["over_plain_p95"] = ttft["p95"] - base["p95"]
                row["same_text"] = sum(mine[1] == other[1] for mine, other in pairs)
            group = [r for r in records if (r.stack, r.prompt_tokens) == (stack, length)]
            if sent := sum(r.counters.get(SENT, 0.0) for r in group):
                row["early_share"] = sum(r.counters.get(EARLY, 0.0) for r in group) / sent
            row["errors"] = sum(bool(r.error) for r in group)
            row["stack_nice"] = sorted({r.turn.stack_nice for r in group if r.turn})
            row["paths"] = Counter(r.headers[PATH] for r in group if PATH in r.headers)
            rows.append(row)
    return rows


def _by_round(
    records: Iterable[HandoverRecord], stack: str, length: int
) -> dict[int, tuple[float, str, float]]:
    """(time to first token in ms, text, time to the end in ms) of each round that succeeded."""
    return {
        record.round: (record.ttft_s * MS, record.text, (record.total_s or 0.0) * MS)
        for record in records
        if (record.stack, record.prompt_tokens) == (stack, length) and record.ttft_s is not None
    }


def quiet_rounds(records: Sequence[HandoverRecord], cores: float) -> list[HandoverRecord]:
    """The records of the rounds in all of whose turns others at nice <= 0 used at most `cores`."""
    loads = [(record.round, record.turn) for record in records]
    loud = {number for number, load in loads if load is None or load.others - load.nice > cores}
    return [record for record in records if record.round not in loud]


def fanout_figures(records: Sequence[FanoutRecord]) -> list[dict[str, Any]]:
    """One row a number of samples and stack: wall time in ms, and medians of tokens and of `PROOFS`."""
    rows = []
    for n in sorted({record.n for record in records}):
        for stack in _names(records):
            group = [record for record in records if (record.stack, record.n) == (stack, n)]
            good = [record for record in group if record.wall_s is not None]
            row: dict[str, Any] = {
                "n": n,
                "stack": stack,
                "wall_ms": summary([record.wall_s * MS for record in good if record.wall_s is not None]),
                "completion_tokens": summary([record.completion_tokens for record in good])["p50"],
                "errors": len(group) - len(good),
            }
            for name, source in PROOFS.get(stack, {}).items():
                row[name] = summary(
                    [value for record in good if (value := _proof(record, source)) is not None]
                )["p50"]
            rows.append(row)
    return rows


def _proof(record: FanoutRecord, source: str) -> float | None:
    """A counter's growth (0 where it did not grow) or a header's number (None where there is none)."""
    if "/" in source:
        return record.counters.get(source, 0.0)
    return float(record.headers[source]) if source in record.headers else None


def _names(records: Iterable[HandoverRecord | FanoutRecord]) -> list[str]:
    """Stacks in a fixed order, the plain engine first."""
    return sorted({record.stack for record in records}, key=lambda name: (name != PLAIN, name))


def handover_table(rows: Sequence[dict[str, Any]]) -> str:
    """The hand-over rows as text."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("prompt", lambda row: str(row["prompt_tokens"])),
        ("stack", lambda row: str(row["stack"])),
        ("count", lambda row: str(row["ttft_ms"]["count"])),
        ("TTFT p50 ms", lambda row: number(row["ttft_ms"]["p50"])),
        ("p95", lambda row: number(row["ttft_ms"]["p95"])),
        ("hand-over p50 ms", lambda row: number(row.get("handover_ms", {}).get("p50"))),
        ("p95", lambda row: number(row.get("handover_ms", {}).get("p95"))),
        ("iqr", lambda row: number(row.get("handover_ms", {}).get("iqr"))),
        ("of plain", lambda row: ratio(row.get("ttft_ratio", {}).get("p50"))),
        ("whole reply", lambda row: ratio(row.get("total_ratio", {}).get("p50"))),
        ("early KV", lambda row: ratio(row.get("early_share"))),
        ("path", lambda row: ", ".join(f"{path} {count}" for path, count in row["paths"].items()) or "-"),
        ("same text", lambda row: str(row.get("same_text", "-"))),
        ("errors", lambda row: str(row["errors"])),
    ]
    return table(columns, rows)


def unequal_nice(rows: Sequence[dict[str, Any]]) -> str:
    """A warning where the stacks did not run at one nice value; "" where they did."""
    values = {str(row["stack"]): row["stack_nice"] for row in rows}
    if len({value for found in values.values() for value in found}) < 2:
        return ""
    return f"The stacks ran at different nice values, so their times do not compare: {values}"


def fanout_table(rows: Sequence[dict[str, Any]]) -> str:
    """The fan-out rows as text."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("n", lambda row: str(row["n"])),
        ("stack", lambda row: str(row["stack"])),
        ("wall p50 ms", lambda row: number(row["wall_ms"]["p50"])),
        ("p95", lambda row: number(row["wall_ms"]["p95"])),
        ("tokens", lambda row: number(row["completion_tokens"])),
        ("KV transfers", lambda row: number(row.get("transfers"))),
        ("KV MB", lambda row: number(row["bytes"] / 1e6) if row.get("bytes") is not None else "-"),
        ("prefix hits on D", lambda row: number(row.get("prefix_hits_on_decode"))),
        ("expired leases", lambda row: number(row.get("expired_leases"))),
        ("errors", lambda row: str(row["errors"])),
    ]
    return table(columns, rows)


def table(
    columns: Sequence[tuple[str, Callable[[dict[str, Any]], str]]], rows: Sequence[dict[str, Any]]
) -> str:
    """Right-aligned columns, a header line first."""
    cells = [[title for title, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )


def ratio(value: float | None) -> str:
    """Two decimals; "-" for nothing."""
    return "-" if value is None else f"{value:.2f}"


def number(value: float | None) -> str:
    """Three or so significant digits; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
