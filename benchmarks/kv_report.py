"""From single transfers to figures: medians, spread, and ratios within the same repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import msgspec

from benchmarks.machine import Load
from benchmarks.report import table
from benchmarks.stats import summary

MODES = ("wire", "whole")
BEST_OF = ("polled", "paused")


class TransferRecord(msgspec.Struct):
    """One transfer of `nbytes` in `seconds`; `detail` is what the contender says of it, `turn` the load
    of its turn in this repeat."""

    contender: str
    mode: str
    nbytes: int
    repeat: int
    position: int
    seconds: float
    detail: dict[str, float] = {}
    turn: Load | None = None


def ceiling_of(contender: str) -> str:
    """What bounds a contender: a bare stream for what goes through ZMQ, a memory copy for what goes through
    shared memory; nothing for the rest."""
    if contender.startswith("zmq"):
        return "stream"
    return "memcpy" if contender.startswith("shm") else ""


def figures(records: Sequence[TransferRecord]) -> list[dict[str, Any]]:
    """A row for each size, contender and mode: `ms`, `gb_per_s` at the median, and ratios of speed.

    Ratios (above 1: faster than what it is compared with) are taken within a repeat, median against median,
    and summarised over the repeats. NIXL counts with the better of its two ways of waiting.
    """
    best = best_modes(records)
    kept = [r for r in records if r.mode not in BEST_OF or best[r.contender, r.nbytes] == r.mode]
    rows = []
    for nbytes, contender, mode in sorted(
        {(r.nbytes, r.contender, r.mode) for r in kept}, key=lambda row: (row[0], _place(kept, row[1:]))
    ):
        mine = [r for r in kept if (r.nbytes, r.contender, r.mode) == (nbytes, contender, mode)]
        milliseconds = summary([record.seconds * 1e3 for record in mine])
        peers = {"ceiling": ceiling_of(contender), "nixl_tcp": "nixl-tcp", "nixl_shm": "nixl-shm"}
        ratios = {
            name: summary(_ratios(mine, [r for r in kept if r.nbytes == nbytes and r.contender == peer]))
            for name, peer in peers.items()
            if peer and peer != contender
        }
        rows.append(
            {
                "nbytes": nbytes,
                "contender": contender,
                "mode": mode,
                "ms": milliseconds,
                "gb_per_s": nbytes / milliseconds["p50"] / 1e6,
                "ratio": ratios,
            }
        )
    return rows


def best_modes(records: Sequence[TransferRecord]) -> dict[tuple[str, int], str]:
    """For contenders measured with several ways of waiting: the one with the lower median, by size."""
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    for record in records:
        if record.mode in BEST_OF:
            modes = times.setdefault((record.contender, record.nbytes), {})
            modes.setdefault(record.mode, []).append(record.seconds)
    return {key: min(modes, key=lambda mode: median(modes[mode])) for key, modes in times.items()}


def quiet(records: Sequence[TransferRecord], cores: float) -> list[TransferRecord]:
    """Records of the repeats in which others used at most `cores` in every contender's turn."""
    loud = {r.repeat for r in records if r.turn is not None and r.turn.others > cores}
    return [record for record in records if record.repeat not in loud]


def _ratios(mine: Iterable[TransferRecord], theirs: Iterable[TransferRecord]) -> list[float]:
    ours, others = _medians(mine), _medians(theirs)
    return [others[repeat] / ours[repeat] for repeat in sorted(ours.keys() & others.keys())]


def _medians(records: Iterable[TransferRecord]) -> dict[int, float]:
    times: dict[int, list[float]] = {}
    for record in records:
        times.setdefault(record.repeat, []).append(record.seconds)
    return {repeat: median(values) for repeat, values in times.items()}


def _place(records: Sequence[TransferRecord], row: tuple[str, str]) -> int:
    return next(i for i, record in enumerate(records) if (record.contender, record.mode) == row)


def transfer_table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as text; a ratio above 1 is faster."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("size", lambda row: size_name(row["nbytes"])),
        ("contender", lambda row: row["contender"]),
        ("mode", lambda row: row["mode"]),
        ("n", lambda row: str(row["ms"]["count"])),
        ("ms p50", lambda row: _figure(row["ms"]["p50"])),
        ("min", lambda row: _figure(row["ms"]["min"])),
        ("p25", lambda row: _figure(row["ms"]["p25"])),
        ("p75", lambda row: _figure(row["ms"]["p75"])),
        ("GB/s", lambda row: _figure(row["gb_per_s"])),
        ("x ceiling", lambda row: _ratio(row, "ceiling")),
        ("x nixl-tcp", lambda row: _ratio(row, "nixl_tcp")),
        ("x nixl-shm", lambda row: _ratio(row, "nixl_shm")),
    ]
    return table(columns, rows)


def _ratio(row: dict[str, Any], name: str) -> str:
    ratio = row["ratio"].get(name, {}).get("p50")
    return "-" if ratio is None else f"{ratio:.2f}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def size_name(nbytes: int) -> str:
    """A size with its binary unit, as the command line takes it."""
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return str(nbytes)
