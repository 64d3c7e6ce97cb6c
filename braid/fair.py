"""Start-time fair queueing (Goyal, Vin & Cheng 1996): who is next, over flows of equal weight.

A flow's virtual start grows by the cost of what it is given, and the flow with the least start is next. One
that comes (back) with something to wait for starts at the virtual time, that of the latest given, so
it claims nothing for the time when it wanted nothing. Pure state: no clock, no tasks.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Flow:
    """Who is to get as much as any other. ``start``: virtual start of what it is given next, in units of
    cost; ``waiting``: its entries in the queue."""

    start: float = 0.0
    waiting: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Entry(Generic[_T]):
    """Something that waits. A lower ``priority`` is earlier, whatever the flow."""

    item: _T
    flow: Flow
    group: bool
    priority: int
    number: int

    @property
    def order(self) -> tuple[int, float, bool, int]:
        return self.priority, self.flow.start, self.group, self.number


@dataclass(slots=True)
class FairQueue(Generic[_T]):
    """Entries by (priority, virtual start); of equal ones single requests go before ``group`` entries, then
    who came first. Within a flow, entries of one kind and priority stay in the order they came in."""

    virtual: float = 0.0
    _lanes: dict[tuple[Flow, int, bool], OrderedDict[int, Entry[_T]]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, flow: Flow, item: _T, *, group: bool = False, priority: int = 0) -> Entry[_T]:
        if not flow.waiting:
            flow.start = max(flow.start, self.virtual)
        entry = Entry(item, flow, group, priority, next(self._numbers))
        flow.waiting += 1
        self._lanes.setdefault(_lane(entry), OrderedDict())[entry.number] = entry
        return entry

    def first(self, groups: bool = True) -> Entry[_T] | None:
        """The next entry, of single requests alone if not ``groups``; None if there is none."""
        heads = (next(iter(lane.values())) for key, lane in self._lanes.items() if groups or not key[2])
        return min(heads, key=lambda entry: entry.order, default=None)

    def take(self, entry: Entry[_T], cost: float) -> None:
        """Give an entry what it waits for."""
        self.virtual = max(self.virtual, entry.flow.start)
        entry.flow.start += cost
        self.remove(entry)

    def remove(self, entry: Entry[_T]) -> bool:
        """Take an entry out, wherever it stands; False if it was out."""
        lane = self._lanes.get(_lane(entry), OrderedDict())
        if lane.pop(entry.number, None) is None:
            return False
        entry.flow.waiting -= 1
        if not lane:
            del self._lanes[_lane(entry)]
        return True

    def items(self) -> list[_T]:
        """All that wait, in the order they came in."""
        entries = [entry for lane in self._lanes.values() for entry in lane.values()]
        return [entry.item for entry in sorted(entries, key=lambda entry: entry.number)]

    def check_integrity(self) -> None:
        """Assert that every lane holds what its key says, and every flow knows how much of it waits."""
        counts: dict[Flow, int] = {}
        for key, lane in self._lanes.items():
            assert lane
            assert all(_lane(entry) == key and entry.number == n for n, entry in lane.items())
            counts[key[0]] = counts.get(key[0], 0) + len(lane)
        assert all(flow.waiting == count for flow, count in counts.items())


def _lane(entry: Entry[_T]) -> tuple[Flow, int, bool]:
    return entry.flow, entry.priority, entry.group
