"""The rules of the table of leases, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvtransfer.lease import Lease, LeaseTable, SubId, Subscriber
from kvtransfer.wire import Key, Manifest, Want

CAPACITY = 10
LEASE_S = 5.0
KEYS = [Key(bytes([n]), 1) for n in range(5)]
NOW = 100.0


@dataclass(frozen=True)
class Piece:
    first: int
    last: int
    group: int = 0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


class Memory:
    """Bytes handed out by the table; it may lend one place twice only after it came back."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.out: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int | None:
        for at in range(self.capacity - nbytes + 1):
            if all(at + nbytes <= other or at >= other + size for other, size in self.out.items()):
                self.out[at] = nbytes
                return at
        return None

    def free(self, at: int, nbytes: int) -> None:
        assert self.out.pop(at) == nbytes


def make_lease(key: Key, blocks: int, expected: int = 1) -> Lease[Piece]:
    manifest = Manifest(0, 1, blocks, b"", "", ())
    return Lease(key, manifest, {0: Want(0, 0, blocks)}, blocks, expected)


def subscriber(id: SubId, first: int = 0, count: int = 1, until: float = NOW + 1000) -> Subscriber:
    return Subscriber(id, {0: Want(0, first, count)}, (0, 1), until)


D0, D1 = (b"d0", 1), (b"d1", 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def table(clock: Clock, memory: Memory) -> LeaseTable[Piece]:
    return LeaseTable(memory.allocate, memory.free, CAPACITY, LEASE_S, clock)


def hold(table: LeaseTable[Piece], key: Key, blocks: int, expected: int = 1) -> Lease[Piece]:
    table.open(make_lease(key, blocks, expected))
    (lease,) = table.grant()
    return lease


def test_a_small_lease_does_not_overtake_a_large_one(table: LeaseTable[Piece]) -> None:
    hold(table, KEYS[0], 6)
    table.open(make_lease(KEYS[1], 6))
    table.open(make_lease(KEYS[2], 1))
    assert table.grant() == []
    table.close(KEYS[0], "over")
    assert table.reclaim()
    assert [lease.key for lease in table.grant()] == [KEYS[1], KEYS[2]]


def test_an_early_subscription_joins_the_lease_when_it_opens(table: LeaseTable[Piece]) -> None:
    assert table.subscribe(KEYS[0], subscriber(D0, first=2)) is None
    lease = hold(table, KEYS[0], 3)
    assert lease.subscribers[D0].wants[0].first == 2
    assert not table.early


def test_who_leaves_before_the_lease_opens_is_not_waited_for(table: LeaseTable[Piece]) -> None:
    """Its staging was held for ``lease_s`` after all others had it."""
    table.subscribe(KEYS[0], subscriber(D0))
    table.end_subscriber(KEYS[0], D0)
    hold(table, KEYS[0], 1, expected=2)
    table.subscribe(KEYS[0], subscriber(D1))
    assert table.end_subscriber(KEYS[0], D1)


def test_who_has_left_is_remembered_no_longer_than_who_waits(table: LeaseTable[Piece], clock: Clock) -> None:
    table.subscribe(KEYS[0], subscriber(D0))
    table.end_subscriber(KEYS[0], D0)
    assert table.awaited == 0
    table.forget_consumer(D0[0], reads_on=False)
    clock.now += LEASE_S + 0.1
    assert table.overdue() == ([], [])
    assert not table.early


def test_an_early_subscription_lapses(table: LeaseTable[Piece], clock: Clock) -> None:
    table.subscribe(KEYS[0], subscriber(D0))
    clock.now += LEASE_S
    assert table.overdue() == ([], [])
    clock.now += 0.1
    _, (lapsed,) = table.overdue()
    assert lapsed.id == D0
    assert table.overdue() == ([], [])


def test_an_early_subscription_waits_as_long_as_its_subscriber_does(
    table: LeaseTable[Piece], clock: Clock
) -> None:
    table.subscribe(KEYS[0], subscriber(D0))
    for _ in range(5):
        clock.now += LEASE_S - 1
        table.alive(KEYS[0])
        assert table.overdue() == ([], [])


def test_a_complete_lease_expires_unless_a_subscriber_is_heard(
    table: LeaseTable[Piece], clock: Clock
) -> None:
    hold(table, KEYS[0], 1)
    table.publish(KEYS[0], Piece(0, 1))
    for _ in range(3):
        clock.now += LEASE_S - 1
        table.alive(KEYS[0])
        assert table.overdue() == ([], [])
    clock.now += LEASE_S + 1
    assert table.overdue() == ([KEYS[0]], [])


def test_a_lease_whose_prompt_is_never_finished_expires_too(table: LeaseTable[Piece], clock: Clock) -> None:
    hold(table, KEYS[0], 2)
    clock.now += LEASE_S - 1
    table.publish(KEYS[0], Piece(0, 1))
    clock.now += LEASE_S - 1
    assert table.overdue() == ([], [])
    clock.now += 2
    assert table.overdue() == ([KEYS[0]], [])


def test_a_lease_is_spent_when_every_expected_subscriber_has_ended(table: LeaseTable[Piece]) -> None:
    hold(table, KEYS[0], 1, expected=2)
    for id in (D0, D1):
        table.subscribe(KEYS[0], subscriber(id))
    assert not table.end_subscriber(KEYS[0], D0)
    assert not table.end_subscriber(KEYS[0], D0), "ending twice counts once"
    assert table.end_subscriber(KEYS[0], D1)


def test_who_lost_its_connection_has_not_ended(table: LeaseTable[Piece]) -> None:
    hold(table, KEYS[0], 1)
    table.subscribe(KEYS[0], subscriber(D0))
    table.forget_consumer(b"d0", reads_on=False)
    assert not table.end_subscriber(KEYS[0], D0)
    table.subscribe(KEYS[0], subscriber((b"d0", 2)))
    assert table.end_subscriber(KEYS[0], (b"d0", 2))


def test_a_stranger_does_not_spend_a_lease(table: LeaseTable[Piece]) -> None:
    hold(table, KEYS[0], 1)
    assert not table.end_subscriber(KEYS[0], (b"stranger", 1))


def test_pieces_follow_each_other_without_gaps(table: LeaseTable[Piece]) -> None:
    hold(table, KEYS[0], 3)
    for first, last in ((1, 2), (0, 4)):
        with pytest.raises(ValueError, match="does not follow"):
            table.publish(KEYS[0], Piece(first, last))
    table.publish(KEYS[0], Piece(0, 2))
    with pytest.raises(ValueError, match="does not follow"):
        table.publish(KEYS[0], Piece(0, 2))


def test_a_subscription_is_fed_what_it_wants_once(table: LeaseTable[Piece]) -> None:
    lease = hold(table, KEYS[0], 8)
    s = subscriber(D0, first=3, count=3)
    table.subscribe(KEYS[0], s)
    for piece in (Piece(0, 2), Piece(2, 4)):
        table.publish(KEYS[0], piece)
    assert lease.next_parcels(s) == [(Piece(2, 4), 1, 1)]
    assert lease.next_parcels(s) == []
    for piece in (Piece(4, 7), Piece(7, 8)):
        table.publish(KEYS[0], piece)
    assert lease.next_parcels(s) == [(Piece(4, 7), 0, 2)], "it wants up to block 6"


def test_closing_is_idempotent_and_gives_the_room_back(table: LeaseTable[Piece]) -> None:
    lease = hold(table, KEYS[0], CAPACITY)
    assert table.close(KEYS[0], "over") is lease
    assert table.close(KEYS[0], "over") is None
    assert table.reclaim()
    assert not table.reclaim()
    assert table.reserved == 0


def test_memory_stays_while_somebody_may_read_it(table: LeaseTable[Piece], clock: Clock) -> None:
    hold(table, KEYS[0], 1)
    table.subscribe(KEYS[0], subscriber(D0, until=clock.now + 3))
    table.close(KEYS[0], "over")
    assert not table.reclaim()
    table.forget_consumer(b"d0", reads_on=True)
    assert not table.reclaim(), "it reads on without a connection"
    clock.now += 2.9
    assert not table.reclaim()
    clock.now += 0.1
    assert table.reclaim()


@pytest.mark.parametrize("how", ["ended", "forgotten"])
def test_memory_comes_back_when_the_last_reader_has_ended(table: LeaseTable[Piece], how: str) -> None:
    hold(table, KEYS[0], 1)
    table.subscribe(KEYS[0], subscriber(D0))
    table.close(KEYS[0], "over")
    if how == "ended":
        table.end_subscriber(KEYS[0], D0)
    else:
        table.forget_consumer(b"d0", reads_on=False)
    assert table.reclaim()


def test_memory_stays_while_somebody_writes_it(table: LeaseTable[Piece]) -> None:
    lease = hold(table, KEYS[0], 1)
    lease.writers += 1
    table.close(KEYS[0], "over")
    assert not table.reclaim()
    lease.writers -= 1
    assert table.reclaim()


def test_what_has_ended_is_remembered_for_a_while(
    table: LeaseTable[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.lease.ENDED", 2)
    for key in KEYS[:3]:
        hold(table, key, 1)
        table.close(key, "done")
        table.reclaim()
    assert dict(table.ended) == dict.fromkeys(KEYS[1:3], "done")
    table.close(KEYS[3], "never opened")
    assert KEYS[3] not in table.ended
    hold(table, KEYS[1], 1)
    assert KEYS[1] not in table.ended, "it is open again"
