"""Seats: width of groups, fair turns, giving up; a state machine over any order of events."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from braid.worker.seats import DispatchFlow, Seat, Seats


class Clock:
    """Time that a test moves on, and what is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, object]] = []

    def later(self, delay: float, call: object) -> None:
        self.due.append((self.now + delay, call))

    def pass_by(self, seconds: float) -> None:
        until = self.now + seconds
        while ready := sorted((one for one in self.due if one[0] <= until), key=lambda one: one[0]):
            self.due.remove(ready[0])
            self.now = max(self.now, ready[0][0])
            ready[0][1]()  # type: ignore[operator]
        self.now = until


class Room:
    """Seats, who sits, and who was turned away, by name."""

    def __init__(self, capacity: int = 8, width: int = 2, calm_s: float = 3.0) -> None:
        self.clock = Clock()
        self.seats = Seats(capacity, width, calm_s, lambda: self.clock.now, self.clock.later)
        self.seated: list[str] = []
        self.away: list[str] = []

    def ask(self, flow: DispatchFlow, name: str) -> Seat:
        return self.seats.ask(flow, lambda yes: (self.seated if yes else self.away).append(name))

    def fill(self, flow: DispatchFlow, name: str, n: int) -> list[Seat]:
        return [self.ask(flow, name) for _ in range(n)]


def group(priority: int = 0) -> DispatchFlow:
    return DispatchFlow(group=True, priority=priority, most=100)


def test_groups_take_every_seat_while_no_single_request_is_about() -> None:
    room = Room()
    room.fill(group(), "g", 12)
    assert (room.seats.held, room.seats.waiting) == (8, 4)


def test_beside_a_single_request_groups_keep_to_their_width_until_it_has_been_calm() -> None:
    room = Room()
    single = room.ask(DispatchFlow(), "s")
    room.fill(group(), "g", 12)
    assert room.seated == ["s", "g", "g"]
    room.seats.leave(single, 5)
    room.clock.pass_by(2.9)
    assert room.seats.held == 2
    room.clock.pass_by(0.2)
    assert room.seats.held == 8


def test_a_single_request_that_comes_meanwhile_keeps_groups_narrow() -> None:
    room = Room()
    room.seats.leave(room.ask(DispatchFlow(), "s"))
    room.fill(group(), "g", 4)
    room.clock.pass_by(2)
    room.seats.leave(room.ask(DispatchFlow(), "s"))
    room.clock.pass_by(2)
    assert room.seats.held == 2
    room.clock.pass_by(1)
    assert room.seats.held == 4


def test_a_single_request_passes_groups_that_wait() -> None:
    room = Room(capacity=4)
    flow = group()
    first = room.fill(flow, "g", 8)[0]
    room.ask(DispatchFlow(), "s")
    room.seats.leave(first, 10)
    assert room.seated[-1] == "s"


def test_groups_of_short_and_of_long_samples_get_as_many_tokens() -> None:
    room = Room(capacity=4)
    short, long = group(), group()
    running = [(seat, 10) for seat in room.fill(short, "short", 300)]
    running += [(seat, 90) for seat in room.fill(long, "long", 300)]
    tokens = Counter[int]()
    for _ in range(200):
        seat, count = next(one for one in running if one[0].cost is not None)
        running.remove((seat, count))
        tokens[count] += count
        room.seats.leave(seat, count)
    assert 0.7 < tokens[10] / tokens[90] < 1.4


def test_a_lower_priority_goes_first_whatever_it_was_given() -> None:
    room = Room(capacity=1)
    open_ = [room.ask(group(), "a"), *room.fill(group(), "late", 2), *room.fill(group(-1), "early", 2)]
    for _ in range(4):
        room.seats.leave(next(seat for seat in open_ if seat.cost is not None), 10)
    assert room.seated == ["a", "early", "early", "late", "late"]


async def test_a_cancelled_wait_leaves_nothing() -> None:
    seats = Seats(1, 1, 1.0)
    flow = group()
    found: list[Seat] = []
    assert await seats.sit(flow, found.append)
    waiting = asyncio.create_task(seats.sit(flow, found.append))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for seat in (*found, *found):
        seats.leave(seat)
    seats.check_integrity(idle=True)


async def test_a_wait_that_is_given_up_ends_without_a_seat() -> None:
    seats = Seats(1, 1, 1.0)
    flow = group()
    found: list[Seat] = []
    assert await seats.sit(flow, found.append)
    waiting = asyncio.create_task(seats.sit(flow, found.append))
    await asyncio.sleep(0)
    seats.leave(found[1])
    assert await waiting is False
    assert seats.stats() == {"seats_held": 1, "seats_waiting": 0}


class AnyOrder(RuleBasedStateMachine):
    """Samples of any flows come, end, are given up, and time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.seats = Seats(5, 2, 1.0, lambda: self.clock.now, self.clock.later)
        self.flows: list[DispatchFlow] = []
        self.open: list[Seat] = []
        self.told: Counter[int] = Counter()
        self.asked = 0

    @rule(group=st.booleans(), priority=st.integers(-1, 1), most=st.sampled_from([None, 1, 50, 1000]))
    def dispatch(self, group: bool, priority: int, most: int | None) -> None:
        self.flows.append(DispatchFlow(group=group, priority=priority, most=most))

    @precondition(lambda self: self.flows)
    @rule(data=st.data(), n=st.integers(1, 6))
    def ask(self, data: st.DataObject, n: int) -> None:
        flow = data.draw(st.sampled_from(self.flows))
        for _ in range(1 if not flow.group else n):
            number, self.asked = self.asked, self.asked + 1
            self.open.append(self.seats.ask(flow, partial(self.hear, number)))

    def hear(self, number: int, seated: bool) -> None:
        self.told.update([number])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.integers(0, 300), twice=st.booleans())
    def leave(self, data: st.DataObject, tokens: int, twice: bool) -> None:
        seat = data.draw(st.sampled_from(self.open))
        self.open.remove(seat)
        for _ in range(1 + twice):
            self.seats.leave(seat, tokens)

    @rule(seconds=st.floats(0.0, 2.0))
    def time(self, seconds: float) -> None:
        self.clock.pass_by(seconds)

    @invariant()
    def sound(self) -> None:
        self.seats.check_integrity(idle=not self.open)
        assert len(self.open) == self.seats.held + self.seats.waiting
        assert not self.told or max(self.told.values()) == 1
        assert len(self.told) == self.asked - self.seats.waiting

    def teardown(self) -> None:
        for seat in self.open:
            self.seats.leave(seat)
        self.seats.check_integrity(idle=True)


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
