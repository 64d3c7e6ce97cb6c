"""Which samples a decode worker's engine runs: each takes a seat before it enters.

A flow is one dispatch. Seats go by (priority, virtual start), token-weighted (:mod:`braid.fair`): a seat
costs what the flow's samples are expected to generate, corrected when the sample ends. Samples of groups
together hold at most ``group_width`` seats while single requests are about, so that these meet a batch of
bounded width; else they may take all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from braid.fair import Entry, FairQueue, Flow

EXPECTED_TOKENS = 256
"""Taken for the length of a flow's samples until one has ended, unless they may not be as long."""

Turn = Callable[[bool], None]
"""Told once: True, the seat is there; False, the wait was given up before it was. Must not raise."""
Later = Callable[[float, Callable[[], None]], object]


@dataclass(slots=True, eq=False)
class DispatchFlow(Flow):
    """The samples of one dispatch. ``tokens`` over ``ended`` is their mean length.

    Args:
        most: tokens that a sample may generate, None if that is not known.
    """

    group: bool = False
    priority: int = 0
    most: int | None = None
    tokens: int = 0
    ended: int = 0

    @property
    def expected(self) -> float:
        """Tokens of a sample that has not ended; at least 1."""
        if self.ended:
            return max(1.0, self.tokens / self.ended)
        return float(max(1, min(self.most or EXPECTED_TOKENS, EXPECTED_TOKENS)))


@dataclass(slots=True, eq=False)
class Seat:
    """A sample's, from when it is asked for until it is left. ``cost``: tokens charged for it, set while it
    is held."""

    flow: DispatchFlow
    turn: Turn
    entry: Entry[Seat] | None = None
    cost: float | None = None


@dataclass(slots=True, eq=False)
class Seats:
    """The seats of one engine.

    Every :meth:`ask` is paired with a :meth:`leave`, which may come at any time. Not thread-safe.

    Args:
        capacity: sequences that the engine runs at a time.
        group_width: most seats of groups while single requests are about: one waits, holds a seat, or held
            one within the last ``calm_s`` seconds.
        clock, later: the event loop's, if not given.
    """

    capacity: int
    group_width: int
    calm_s: float
    clock: Callable[[], float] | None = None
    later: Later | None = None
    held: int = 0
    groups_held: int = 0
    _queue: FairQueue[Seat] = field(default_factory=FairQueue)
    _singles: int = 0
    _calm_at: float = float("-inf")
    _waking: bool = False

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def width(self) -> int:
        """Seats that groups may hold together now."""
        crowded = self._singles or self._now() < self._calm_at
        return min(self.group_width, self.capacity) if crowded else self.capacity

    def ask(self, flow: DispatchFlow, turn: Turn) -> Seat:
        """Ask for a seat; ``turn`` may be told before this returns."""
        seat = Seat(flow, turn)
        seat.entry = self._queue.add(flow, seat, group=flow.group, priority=flow.priority)
        self._singles += not flow.group
        self._let_in()
        return seat

    def leave(self, seat: Seat, tokens: int = 0) -> None:
        """End a sample, waiting or seated, that generated ``tokens``. Idempotent."""
        if seat.entry is not None:
            self._give_up(seat, seat.entry)
        elif seat.cost is not None:
            self._rise(seat, seat.cost, tokens)
        else:
            return
        self._let_in()

    async def sit(self, flow: DispatchFlow, asked: Callable[[Seat], None]) -> bool:
        """Ask for a seat, hand it to ``asked``, and wait for the turn; False if it was left before.

        The caller leaves the seat in any case, also one whose wait is cancelled."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        asked(self.ask(flow, lambda seated: None if turn.done() else turn.set_result(seated)))
        return await turn

    def stats(self) -> dict[str, int]:
        """For ``/stats``; both are zero when nothing runs."""
        return {"seats_held": self.held, "seats_waiting": self.waiting}

    def check_integrity(self, idle: bool = False) -> None:
        """Assert that the counts are within their bounds; when ``idle``, that they are zero."""
        self._queue.check_integrity()
        assert 0 <= self.groups_held <= self.held <= self.capacity
        waiting = self._queue.items()
        assert all(seat.entry is not None and seat.cost is None for seat in waiting)
        singles = self.held - self.groups_held + sum(not seat.flow.group for seat in waiting)
        assert self._singles == singles, (self._singles, singles)
        if waiting and self.held < self.capacity:
            assert all(seat.flow.group for seat in waiting), "a single request waits beside a free seat"
            assert self.groups_held >= self.width, "a group waits beside a seat that it may take"
        assert not idle or (self.held == 0 and not waiting), self.stats()

    def _give_up(self, seat: Seat, entry: Entry[Seat]) -> None:
        self._queue.remove(entry)
        seat.entry = None
        self._singles -= not seat.flow.group
        if not seat.flow.group:
            self._calm_later()  # one less may be what the groups wait for
        seat.turn(False)

    def _rise(self, seat: Seat, cost: float, tokens: int) -> None:
        flow, seat.cost = seat.flow, None
        self.held -= 1
        self.groups_held -= flow.group
        flow.start += tokens - cost
        flow.tokens += tokens
        flow.ended += 1
        if not flow.group:
            self._singles -= 1
            self._calm_at = self._now() + self.calm_s
            self._calm_later()

    def _let_in(self) -> None:
        while self.held < self.capacity:
            entry = self._queue.first(groups=self.groups_held < self.width)
            if entry is None:
                return
            seat = entry.item
            seat.entry, seat.cost = None, seat.flow.expected
            self._queue.take(entry, seat.cost)
            self.held += 1
            self.groups_held += seat.flow.group
            seat.turn(True)

    def _calm_later(self) -> None:
        """Look again when single requests have been away for long enough."""
        if self._singles or self._waking:
            return
        self._waking = True
        later = self.later or asyncio.get_running_loop().call_later
        later(max(0.0, self._calm_at - self._now()), self._calm)

    def _calm(self) -> None:
        self._waking = False
        if not self._singles and self._now() < self._calm_at:
            self._calm_later()  # a single request came and went meanwhile
        self._let_in()

    def _now(self) -> float:
        return (self.clock or asyncio.get_running_loop().time)()
