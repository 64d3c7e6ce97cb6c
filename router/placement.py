"""Where a request runs. Pure functions over the registry's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from router.registry import Worker

Usable = Callable[[Worker, Worker], bool]
"""Whether a prefill and a decode worker may be used together."""
Spread = Literal["pack", "spread", "auto"]


@dataclass(frozen=True, slots=True)
class Placed:
    """``n`` samples, numbered from ``first`` in their group, on one decode worker."""

    worker: Worker
    first: int
    n: int


Divide = Callable[[Sequence[Worker], int, bool], tuple[Placed, ...]]
"""Shares of n samples over some of the workers; True if each computes the prompt itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Decode shares, and the prefill worker that serves all of them (None: compute on decode, for
    ``reason``)."""

    shares: tuple[Placed, ...]
    prefill: Worker | None
    reason: str = ""


def place(
    decoders: Sequence[Worker],
    prefillers: Sequence[Worker],
    usable: Usable,
    n: int,
    spread: Spread,
    local: str = "",
    by_cost: Divide | None = None,
    single: bool = False,
) -> Plan:
    """Choose workers for ``n`` samples of one prompt; ``decoders`` is not empty.

    Decode workers with a usable prefill worker go before those without. ``pack`` takes the least
    loaded one, ``spread`` divides the samples evenly over those that one prefill worker can serve.
    ``auto`` leaves that to ``by_cost``. A ``single`` request goes where it shares its steps with the fewest.
    ``local`` is the reason not to use a prefill worker at all, empty if there is none.
    """

    def shares(workers: Sequence[Worker], alone: bool) -> tuple[Placed, ...]:
        if spread == "auto" and by_cost is not None:
            return by_cost(workers, n, alone)
        return divide(by_load(workers, single), n, spread)

    if local:
        return Plan(shares(decoders, True), None, local)
    prefill = choose_prefill(decoders, prefillers, usable, spread, single)
    if prefill is None:
        return Plan(shares(decoders, True), None, "no_pair" if prefillers else "no_prefill")
    return Plan(shares([d for d in decoders if usable(prefill, d)], False), prefill)


def choose_prefill(
    decoders: Sequence[Worker],
    prefillers: Sequence[Worker],
    usable: Usable,
    spread: Spread,
    single: bool = False,
) -> Worker | None:
    """The prefill worker that reaches most of ``decoders`` (``spread``, ``auto``) or the least loaded of them
    (``pack``, where a ``single`` request would go); among equals the least loaded one."""
    reach = {p: [d for d in decoders if usable(p, d)] for p in prefillers}
    candidates = [p for p in prefillers if reach[p]]
    if not candidates:
        return None
    if spread != "pack":
        return min(candidates, key=lambda p: (-len(reach[p]), p.load, p.beat.waiting, p.name))
    best = {p: by_load(reach[p], single)[0] for p in candidates}
    return min(candidates, key=lambda p: (_burden(best[p], single), p.load, p.beat.waiting, p.name))


def by_load(workers: Sequence[Worker], single: bool = False) -> list[Worker]:
    """Least loaded first, for a ``single`` request the least crowded; by name among equals."""
    return sorted(workers, key=lambda w: (_burden(w, single), w.load, w.beat.waiting, w.name))


def _burden(worker: Worker, single: bool) -> float:
    return worker.crowd / worker.hello.slots if single else worker.load


def divide(workers: Sequence[Worker], n: int, spread: Spread) -> tuple[Placed, ...]:
    """Consecutive samples to each worker: all to the first, or evenly, the first ones taking the rest."""
    if spread == "pack":
        return (Placed(workers[0], 0, n),)
    workers = workers[: min(n, len(workers))]
    each, rest = divmod(n, len(workers))
    shares, first = [], 0
    for position, worker in enumerate(workers):
        count = each + (position < rest)
        shares.append(Placed(worker, first, count))
        first += count
    return tuple(shares)
