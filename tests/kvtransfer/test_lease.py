"""The table of leases under any order of events, and its rules one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.lease import Lease, LeaseTable, Subscriber
from kvtransfer.wire import Key, Manifest

CAPACITY = 10
LEASE_S = 5.0
KEYS = [Key(bytes([n]), 1) for n in range(5)]
ADDRESSES = [b"d0", b"d1", b"d2"]
some_key = st.sampled_from(KEYS)
some_address = st.sampled_from(ADDRESSES)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_lease(key: Key, blocks: int, expected: int = 1) -> Lease[str]:
    return Lease(Manifest(key, 1, blocks, b"", "", 1), blocks, blocks, expected)


class AnyOrder(RuleBasedStateMachine):
    """Every call of the producer, in any order, against a plain model of who waits in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table: LeaseTable[str] = LeaseTable(CAPACITY, LEASE_S, self.clock)
        self.queue: list[Key] = []
        self.granted: list[Key] = []

    @rule(key=some_key, blocks=st.integers(1, CAPACITY + 1), expected=st.integers(1, 3))
    def open(self, key: Key, blocks: int, expected: int) -> None:
        if key in self.queue or key in self.granted or blocks > CAPACITY:
            with pytest.raises(ValueError, match=r"in use|over the staging bound"):
                self.table.open(make_lease(key, blocks, expected))
        else:
            self.table.open(make_lease(key, blocks, expected))
            self.queue.append(key)

    @rule()
    def grant(self) -> None:
        granted = [lease.manifest.key for lease in self.table.grant()]
        assert granted == self.queue[: len(granted)], "first come, first served"
        del self.queue[: len(granted)]
        self.granted += granted
        if self.queue:
            assert self.table.reserved + self.table.waiting[self.queue[0]].nbytes > CAPACITY

    @rule(key=some_key, address=some_address, have=st.integers(0, 3))
    def subscribe(self, key: Key, address: bytes, have: int) -> None:
        lease = self.table.subscribe(key, Subscriber(address, have))
        assert (lease is not None) == (key in self.granted)

    @rule(key=some_key, count=st.integers(1, 4))
    def publish(self, key: Key, count: int) -> None:
        held = self.table.held.get(key)
        if held is not None and held.published + count > held.blocks:
            with pytest.raises(ValueError, match="does not follow"):
                self.table.publish(key, held.published, count, "piece")
        else:
            first = held.published if held is not None else 0
            assert self.table.publish(key, first, count, "piece") is held

    @rule(key=some_key, address=some_address)
    def end_subscriber(self, key: Key, address: bytes) -> None:
        if self.table.end_subscriber(key, address):
            self.close(key)

    @rule(key=some_key)
    def close(self, key: Key) -> None:
        lease = self.table.close(key)
        assert (lease is not None) == (key in self.queue or key in self.granted)
        self._gone(key)

    @rule(key=some_key)
    def alive(self, key: Key) -> None:
        self.table.alive(key)

    @rule(seconds=st.floats(0, 2 * LEASE_S))
    def tick(self, seconds: float) -> None:
        self.clock.now += seconds
        expired, _ = self.table.overdue()
        for key in expired:
            assert self.clock.now - self.table.held[key].heard > LEASE_S
            self.table.close(key)
            self._gone(key)

    @precondition(lambda self: self.granted or self.queue)
    @rule()
    def subscriptions_do_not_outlive_lease_s_early(self) -> None:
        self.clock.now += LEASE_S + 1
        self.table.overdue()
        assert not self.table.early

    @invariant()
    def adds_up(self) -> None:
        self.table.check_integrity()
        assert list(self.table.waiting) == self.queue
        assert set(self.table.held) == set(self.granted)

    def teardown(self) -> None:
        for key in KEYS:
            self.table.close(key)
            self.table.check_integrity()
        assert self.table.reserved == 0

    def _gone(self, key: Key) -> None:
        for keys in (self.queue, self.granted):
            if key in keys:
                keys.remove(key)


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> LeaseTable[str]:
    return LeaseTable(CAPACITY, LEASE_S, clock)


def hold(table: LeaseTable[str], key: Key, blocks: int, expected: int = 1) -> Lease[str]:
    table.open(make_lease(key, blocks, expected))
    (lease,) = table.grant()
    return lease


def test_a_small_lease_does_not_overtake_a_large_one(table: LeaseTable[str]) -> None:
    hold(table, KEYS[0], 6)
    table.open(make_lease(KEYS[1], 6))
    table.open(make_lease(KEYS[2], 1))
    assert table.grant() == []
    table.close(KEYS[0])
    assert [lease.manifest.key for lease in table.grant()] == [KEYS[1], KEYS[2]]


def test_an_early_subscription_joins_the_lease_when_it_opens(table: LeaseTable[str]) -> None:
    assert table.subscribe(KEYS[0], Subscriber(b"d0", 2)) is None
    lease = hold(table, KEYS[0], 3)
    assert lease.subscribers[b"d0"].have == 2
    assert not table.early


def test_an_early_subscription_lapses(table: LeaseTable[str], clock: Clock) -> None:
    table.subscribe(KEYS[0], Subscriber(b"d0", 0))
    clock.now += LEASE_S
    assert table.overdue() == ([], [])
    clock.now += 0.1
    _, ((key, subscribers),) = table.overdue()
    assert (key, subscribers[0].address) == (KEYS[0], b"d0")
    assert table.overdue() == ([], [])


def test_an_early_subscription_waits_as_long_as_its_subscriber_does(
    table: LeaseTable[str], clock: Clock
) -> None:
    table.subscribe(KEYS[0], Subscriber(b"d0", 0))
    for _ in range(5):
        clock.now += LEASE_S - 1
        table.alive(KEYS[0])
        assert table.overdue() == ([], [])


def test_a_complete_lease_expires_unless_a_subscriber_is_heard(table: LeaseTable[str], clock: Clock) -> None:
    hold(table, KEYS[0], 1)
    table.publish(KEYS[0], 0, 1, "piece")
    for _ in range(3):
        clock.now += LEASE_S - 1
        table.alive(KEYS[0])
        assert table.overdue() == ([], [])
    clock.now += LEASE_S + 1
    assert table.overdue() == ([KEYS[0]], [])


def test_a_lease_whose_prompt_is_never_finished_expires_too(table: LeaseTable[str], clock: Clock) -> None:
    hold(table, KEYS[0], 2)
    clock.now += LEASE_S - 1
    table.publish(KEYS[0], 0, 1, "piece")
    clock.now += LEASE_S - 1
    assert table.overdue() == ([], [])
    clock.now += 2
    assert table.overdue() == ([KEYS[0]], [])


def test_a_lease_is_spent_when_every_expected_subscriber_has_ended(table: LeaseTable[str]) -> None:
    hold(table, KEYS[0], 1, expected=2)
    for address in (b"d0", b"d1"):
        table.subscribe(KEYS[0], Subscriber(address, 0))
    assert not table.end_subscriber(KEYS[0], b"d0")
    assert not table.end_subscriber(KEYS[0], b"d0"), "ending twice counts once"
    assert table.end_subscriber(KEYS[0], b"d1")


def test_a_stranger_does_not_spend_a_lease(table: LeaseTable[str]) -> None:
    hold(table, KEYS[0], 1)
    assert not table.end_subscriber(KEYS[0], b"stranger")


def test_pieces_follow_each_other_without_gaps(table: LeaseTable[str]) -> None:
    hold(table, KEYS[0], 3)
    for first, count in ((1, 1), (0, 4)):
        with pytest.raises(ValueError, match="does not follow"):
            table.publish(KEYS[0], first, count, "piece")
    table.publish(KEYS[0], 0, 2, "piece")
    with pytest.raises(ValueError, match="does not follow"):
        table.publish(KEYS[0], 0, 2, "piece")


def test_closing_is_idempotent_and_gives_the_room_back(table: LeaseTable[str]) -> None:
    lease = hold(table, KEYS[0], CAPACITY)
    assert table.close(KEYS[0]) is lease
    assert table.close(KEYS[0]) is None
    assert table.reserved == 0
