"""Over how many and which decode workers to divide the samples of a prompt: a rule over estimated ends."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of workers that are tried."""


@dataclass(frozen=True, slots=True)
class Station:
    """A decode worker as the rule sees it.

    Attributes:
        room: samples that it has slots and KV blocks for.
        width: samples that it runs.
        step_base_s, step_seq_s: seconds of a decode step: the first, and the second for each sample in it.
        handover_s: seconds until it has the prompt's KV, were it the only one; 0 where the KV is there.
    """

    room: int
    width: int
    step_base_s: float
    step_seq_s: float
    handover_s: float

    def decode_s(self, n: int, tokens: float) -> float:
        """Seconds that ``n`` further samples of ``tokens`` tokens each take it once they run."""
        return tokens * (self.step_base_s + self.step_seq_s * (self.width + n))


def divide(stations: Sequence[Station], n: int, tokens: float) -> list[int]:
    """Samples for each of ``stations`` (at least one), ``n`` in all, so that the estimated end is earliest.

    A station with a share ends after its hand-over and the share's ``decode_s``. Hand-overs leave the one
    prefill worker through one link, so each waits for all of them, but for those that need none. Tried are
    the best station for all samples, and the best ones for a sample of each number in :data:`SIZES`; of equal
    ends the fewest stations win. None gets more than its room while another has some.
    """
    roomy = [i for i, station in enumerate(stations) if station.room > 0] or list(range(len(stations)))
    order = sorted(roomy, key=lambda i: (_alone(stations[i], 1, tokens), i))
    most = min(n, len(order))
    sets = [[min(roomy, key=lambda i: (_alone(stations[i], n, tokens), i))]]
    sets += [order[:size] for size in (*(size for size in SIZES if size < most), most)]
    best, least = [0] * len(stations), float("inf")
    for chosen in sets:
        if len(chosen) < most and sum(max(0, stations[i].room) for i in chosen) < n:
            continue  # they would be filled over while others have room
        shares, end = _shares(stations, chosen, n, tokens)
        if end < least * (1 - 1e-9):
            best, least = shares, end
    return best


def _alone(station: Station, n: int, tokens: float) -> float:
    return station.handover_s + station.decode_s(n, tokens)


def _shares(
    stations: Sequence[Station], chosen: Sequence[int], n: int, tokens: float
) -> tuple[list[int], float]:
    """Each sample to where it ends first, those with room before those without; and when the last ends."""
    link = sum(stations[i].handover_s for i in chosen)
    shares = [0] * len(stations)

    def end(i: int, count: int) -> float:
        station = stations[i]
        return (link if station.handover_s else 0.0) + station.decode_s(count, tokens)

    heap = [(stations[i].room < 1, end(i, 1), place, i) for place, i in enumerate(chosen)]
    heapq.heapify(heap)
    for _ in range(n):
        _, _, place, i = heap[0]
        shares[i] += 1
        heapq.heapreplace(heap, (shares[i] >= stations[i].room, end(i, shares[i] + 1), place, i))
    return shares, max(end(i, shares[i]) for i in chosen if shares[i])
