"""The table of leases under any order of events, against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.lease import Lease, LeaseTable, SubId
from kvtransfer.wire import Key
from tests.kvtransfer.test_lease import CAPACITY, KEYS, LEASE_S, Clock, Memory, Piece, make_lease, subscriber

some_key = st.sampled_from(KEYS[:4])
some_consumer = st.sampled_from([b"d0", b"d1", b"d2"])


class AnyOrder(RuleBasedStateMachine):
    """Every call of the producer, in any order.

    The model: who waits in which order, who writes, and until when each subscription of each lease may
    read; and who has ended before there was a lease. A lease is known by itself, as its key may be another's
    after it closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.memory = Clock(), Memory()
        self.table: LeaseTable[Piece] = LeaseTable(
            self.memory.allocate, self.memory.free, CAPACITY, LEASE_S, self.clock
        )
        self.queue: list[Key] = []
        self.held: dict[Key, Lease[Piece]] = {}
        self.closed: list[Lease[Piece]] = []
        self.readers: dict[int, dict[SubId, float]] = {}
        self.early: dict[Key, dict[SubId, float]] = {}
        self.left: dict[Key, set[SubId]] = {}
        self.writing: list[Lease[Piece]] = []
        self.ended: set[Key] = set()
        self.subs = 0

    @rule(key=some_key, blocks=st.integers(1, CAPACITY + 1), expected=st.integers(1, 3))
    def open(self, key: Key, blocks: int, expected: int) -> None:
        lease = make_lease(key, blocks, expected)
        if key in self.queue or key in self.held or blocks > CAPACITY:
            with pytest.raises(ValueError, match=r"in use|over the staging bound"):
                self.table.open(lease)
            return
        self.table.open(lease)
        self.queue.append(key)
        self.ended.discard(key)
        self.readers[id(lease)] = self.early.pop(key, {})
        assert lease.finished == len(self.left.pop(key, ()))

    @rule(key=some_key)
    def refuse(self, key: Key) -> None:
        told = {subscriber.id for subscriber in self.table.refuse(key)}
        if key in self.queue or key in self.held:
            assert not told
            return
        assert told == set(self.early.pop(key, {}))
        self.left.pop(key, None)
        self.ended.add(key)

    @rule()
    def grant(self) -> None:
        granted = self.table.grant()
        assert [lease.key for lease in granted] == self.queue[: len(granted)], "first come, first served"
        del self.queue[: len(granted)]
        for lease in granted:
            assert self.memory.out[lease.at] == lease.nbytes
            self.held[lease.key] = lease

    @rule(key=some_key, consumer=some_consumer, seconds=st.floats(0, 4 * LEASE_S))
    def subscribe(self, key: Key, consumer: bytes, seconds: float) -> None:
        self.subs += 1
        sub, until = (consumer, self.subs), self.clock.now + seconds
        lease = self.table.subscribe(key, subscriber(sub, until=until))
        assert lease is self.held.get(key)
        current = self.current(key)
        readers = self.early.setdefault(key, {}) if current is None else self.readers[id(current)]
        readers[sub] = until

    @rule(key=some_key, count=st.integers(1, 4))
    def publish(self, key: Key, count: int) -> None:
        lease = self.held.get(key)
        first = lease.published(0) if lease is not None else 0
        piece = Piece(first, first + count)
        if lease is not None and piece.last > lease.nbytes:
            with pytest.raises(ValueError, match="does not follow"):
                self.table.publish(key, piece)
        else:
            assert self.table.publish(key, piece) is lease

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def begin_to_write(self, data: st.DataObject) -> None:
        lease = self.held[data.draw(st.sampled_from(sorted(self.held, key=lambda key: key.id)))]
        lease.writers += 1
        self.writing.append(lease)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def end_to_write(self, data: st.DataObject) -> None:
        self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1))).writers -= 1

    @rule(data=st.data(), key=some_key)
    def end_subscriber(self, data: st.DataObject, key: Key) -> None:
        known = [sub for _, readers in self.of(key) for sub in readers]
        sub = data.draw(st.sampled_from([*known, (b"nobody", 1)]))
        if sub in self.early.get(key, {}):
            self.left.setdefault(key, set()).add(sub)
        spent = self.table.end_subscriber(key, sub)
        for _, readers in self.of(key):
            readers.pop(sub, None)
        self.early = {key: early for key, early in self.early.items() if early}
        if spent:
            self.close(key)

    @rule(consumer=some_consumer, reads_on=st.booleans())
    def forget_consumer(self, consumer: bytes, reads_on: bool) -> None:
        self.table.forget_consumer(consumer, reads_on)
        gone = list(self.early.values()) if reads_on else [*self.early.values(), *self.readers.values()]
        for readers in gone:
            for sub in [sub for sub in readers if sub[0] == consumer]:
                del readers[sub]
        self.early = {key: early for key, early in self.early.items() if early}

    @rule(key=some_key)
    def close(self, key: Key) -> None:
        lease = self.table.close(key, "over")
        assert (lease is not None) == (key in self.queue or key in self.held)
        self.gone(key)

    @rule()
    def reclaim(self) -> None:
        self.table.reclaim()
        for lease in [lease for lease in self.closed if lease not in self.table.closing]:
            assert not self.in_use(lease), "memory of a lease that somebody may read or write"
            self.closed.remove(lease)
        assert all(self.in_use(lease) for lease in self.closed), "memory that nobody uses is kept"

    @rule(key=some_key)
    def alive(self, key: Key) -> None:
        self.table.alive(key)

    @rule(seconds=st.floats(0, 2 * LEASE_S))
    def tick(self, seconds: float) -> None:
        self.clock.now += seconds
        expired, lapsed = self.table.overdue()
        forgotten = [early for key, early in self.early.items() if key not in self.table.early]
        assert {s.id for s in lapsed} == {sub for early in forgotten for sub in early}
        self.early = {key: early for key, early in self.early.items() if key in self.table.early}
        self.left = {key: left for key, left in self.left.items() if key in self.table.early}
        for key in expired:
            assert self.clock.now - self.held[key].heard > LEASE_S
            self.table.close(key, "over")
            self.gone(key)

    @rule()
    def subscriptions_do_not_outlive_lease_s_early(self) -> None:
        self.tick(LEASE_S + 1)
        assert not self.table.early

    @invariant()
    def adds_up(self) -> None:
        self.table.check_integrity()
        assert list(self.table.waiting) == self.queue
        assert self.table.held == self.held
        assert {k: set(subs) for k, (_, subs) in self.table.early.items()} == {
            k: set(self.early.get(k, ())) | self.left.get(k, set()) for k in {*self.early, *self.left}
        }
        assert self.table.awaited == len(self.early)
        assert self.table.reserved == sum(self.memory.out.values())
        assert set(self.table.ended) == self.ended

    def teardown(self) -> None:
        for lease in self.writing:
            lease.writers -= 1
        for key in KEYS:
            self.table.close(key, "over")
        self.clock.now += 1000
        self.table.reclaim()
        self.table.overdue()
        self.table.check_integrity()
        assert self.table.reserved == 0
        assert not self.memory.out
        assert not self.table.early

    def current(self, key: Key) -> Lease[Piece] | None:
        return self.table.held.get(key) or self.table.waiting.get(key)

    def of(self, key: Key) -> list[tuple[Lease[Piece] | None, dict[SubId, float]]]:
        """Everything of a key that has readers."""
        leases = [*(lease for lease in self.closed if lease.key == key), self.current(key)]
        found = [(lease, self.readers[id(lease)]) for lease in leases if lease is not None]
        return [*found, (None, self.early.get(key, {}))]

    def in_use(self, lease: Lease[Piece]) -> bool:
        readers = self.readers[id(lease)].values()
        return lease in self.writing or any(until > self.clock.now for until in readers)

    def gone(self, key: Key) -> None:
        if key in self.queue or key in self.held:
            self.ended.add(key)
        if key in self.queue:
            self.queue.remove(key)
        if (lease := self.held.pop(key, None)) is not None:
            self.closed.append(lease)


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
