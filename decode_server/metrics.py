"""What a decode worker's own ``/metrics`` has beyond vLLM's."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from braid.worker.seats import Seats

_WAITING = Gauge("braid_seats_waiting", "Samples that wait for a seat")
_HELD = Gauge("braid_seats_held", "Samples that hold a seat")
_GROUPS = Gauge("braid_seats_groups", "Samples of groups that hold a seat")
FIRST = Counter(
    "braid_first_tokens",
    "First tokens of single samples, which prefill workers draw, by what became of them",
    ["outcome"],
)


def show_seats(seats: Seats) -> None:
    """Show this worker's seats."""
    _WAITING.set_function(lambda: seats.waiting)
    _HELD.set_function(lambda: seats.held)
    _GROUPS.set_function(lambda: seats.groups_held)
