"""Who may still read what: the producer's table of leases. Pure state, no sockets; clock and memory injected.

Life of a lease::

    open --> waiting (no room yet) --> held --(all pieces published)--> held
                |                        |
                +------- close ----------+--> closing (somebody may still read or write it) --> gone

A lease closes when every expected subscriber has ended (its owner is told ``done``), when its owner closes
it, or ``lease_s`` after the last piece or word of a subscriber; one that waits says so every few seconds, and
so its lease lives. A closed lease gives its memory back when nobody writes it any more and each subscription
has ended or passed its deadline; the consumer counts no block that comes after the deadline. Both clocks are
monotonic, and the producer's span begins later than the consumer's.

What has ended is remembered for a while, with its reason, for who comes too late.

Subscriptions may come before the lease is opened (both are dispatched at the same time, and a prompt may
queue at the producer); they wait for ``lease_s`` after their consumer was last heard of. One that ends before
the lease is opened counts towards those that are expected all the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from kvtransfer.wire import Key, Manifest, Want

SubId = tuple[bytes, int]
"""Consumer and its subscription number."""


class Span(Protocol):
    """Anything that covers blocks of a group: a piece."""

    @property
    def group(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...


P = TypeVar("P", bound=Span)

ENDED = 4096
"""Leases that are remembered after their end."""


@dataclass(slots=True)
class Subscriber:
    """A subscription. ``until``: monotonic seconds of its deadline; ``fed``: pieces of each group that it
    has been sent or does not want."""

    id: SubId
    wants: dict[int, Want]
    heads: tuple[int, int]
    until: float
    ended: bool = False
    fed: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Lease(Generic[P]):
    """One prompt's KV.

    Attributes:
        spans: the blocks that will be published, by group.
        pieces: what has been, by group, in block order without gaps.
        at: where its memory begins once it is held.
        stretch: factor of its pieces' size, what suits all subscribers.
        wrapped: some subscriber's transport sends frames of pieces.
        staged: by group, the block after the last that was handed over.
        writers: threads that fill a piece now.
        sent: bytes given to transports; ``early``: of those, before the last blocks were handed over.
    """

    key: Key
    manifest: Manifest
    spans: dict[int, Want]
    nbytes: int
    expected: int
    pieces: dict[int, list[P]] = field(default_factory=dict)
    subscribers: dict[SubId, Subscriber] = field(default_factory=dict)
    at: int = -1
    stretch: int = 1
    wrapped: bool = False
    staged: dict[int, int] = field(default_factory=dict)
    writers: int = 0
    sent: int = 0
    early: int = 0
    finished: int = 0
    heard: float = 0.0

    @property
    def spent(self) -> bool:
        """Every expected subscriber has ended."""
        return self.finished >= self.expected

    def published(self, group: int) -> int:
        """The group's first block that has not been published."""
        pieces = self.pieces.get(group)
        return pieces[-1].last if pieces else self.spans[group].first

    def next_parcels(self, subscriber: Subscriber) -> list[tuple[P, int, int]]:
        """Published pieces that the subscription wants and has not been fed, each with the number of its
        leading blocks to leave out and of those to send. They count as fed from here on."""
        found = []
        for group, want in subscriber.wants.items():
            pieces = self.pieces.get(group, [])
            for piece in pieces[subscriber.fed.get(group, 0) :]:
                first = max(piece.first, want.first)
                last = min(piece.last, want.first + want.count)
                if first < last:
                    found.append((piece, first - piece.first, last - first))
            subscriber.fed[group] = len(pieces)
        return found


class LeaseTable(Generic[P]):
    """The producer's leases, in memory that is bounded by what ``allocate`` gives.

    Args:
        allocate: gives the offset of that many bytes, or None while there is no room.
        free: takes ``(offset, bytes)`` back.
        capacity: what ``allocate`` could give at most.
        lease_s: seconds a lease is kept without a new piece and without hearing from a subscriber.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        allocate: Callable[[int], int | None],
        free: Callable[[int, int], None],
        capacity: int,
        lease_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._allocate = allocate
        self._free = free
        self._capacity = capacity
        self.lease_s = lease_s
        self._clock = clock
        self.held: dict[Key, Lease[P]] = {}
        self.waiting: OrderedDict[Key, Lease[P]] = OrderedDict()
        self.closing: list[Lease[P]] = []
        self.early: dict[Key, tuple[float, dict[SubId, Subscriber]]] = {}
        self.ended: OrderedDict[Key, str] = OrderedDict()

    @property
    def reserved(self) -> int:
        """Bytes of leases that are held or closing."""
        return sum(lease.nbytes for lease in (*self.held.values(), *self.closing))

    def open(self, lease: Lease[P]) -> None:
        """Queue a lease for room. Raises ValueError for a key in use or a lease that can never fit."""
        if self.knows(lease.key):
            raise ValueError("key is in use")
        if lease.nbytes > self._capacity:
            raise ValueError(f"{lease.nbytes} bytes of KV are over the staging bound of {self._capacity}")
        self.ended.pop(lease.key, None)
        _, lease.subscribers = self.early.pop(lease.key, (0.0, {}))
        lease.finished = sum(subscriber.ended for subscriber in lease.subscribers.values())
        lease.heard = self._clock()
        self.waiting[lease.key] = lease

    def refuse(self, key: Key) -> list[Subscriber]:
        """A lease of this key was not opened: forget who subscribed before it, and tell. Nobody, if another
        one is open."""
        if self.knows(key):
            return []
        _, early = self.early.pop(key, (0.0, {}))
        self._remember(key, "refused")
        return [subscriber for subscriber in early.values() if not subscriber.ended]

    def grant(self) -> list[Lease[P]]:
        """Reserve room for the waiting leases that fit, first come first served, and hold them."""
        granted = []
        while self.waiting:
            key, lease = next(iter(self.waiting.items()))
            at = self._allocate(lease.nbytes)
            if at is None:
                break
            del self.waiting[key]
            lease.at, lease.heard = at, self._clock()
            self.held[key] = lease
            granted.append(lease)
        return granted

    @property
    def early_subscribers(self) -> int:
        """Subscriptions whose lease is not open yet, also those that have ended."""
        return sum(len(subscribers) for _, subscribers in self.early.values())

    @property
    def awaited(self) -> int:
        """Leases that are not open yet and wanted."""
        return sum(not all(s.ended for s in subscribers.values()) for _, subscribers in self.early.values())

    def knows(self, key: Key) -> bool:
        """Whether a lease of this key is open."""
        return key in self.held or key in self.waiting

    def subscribe(self, key: Key, subscriber: Subscriber) -> Lease[P] | None:
        """Add a subscription. Returns the lease if it is held."""
        lease = self.held.get(key) or self.waiting.get(key)
        if lease is None:
            _, early = self.early.pop(key, (0.0, {}))
            self.early[key] = self._clock(), {**early, subscriber.id: subscriber}
            return None
        lease.subscribers[subscriber.id] = subscriber
        lease.heard = self._clock()
        return lease if key in self.held else None

    def publish(self, key: Key, piece: P) -> Lease[P] | None:
        """Add a piece; returns the lease, or None if it has ended. Raises ValueError for a gap."""
        lease = self.held.get(key)
        if lease is None:
            return None
        span, expected = lease.spans[piece.group], lease.published(piece.group)
        if piece.first != expected or piece.last > span.first + span.count:
            raise ValueError(f"piece [{piece.first}, {piece.last}) does not follow block {expected}")
        lease.pieces.setdefault(piece.group, []).append(piece)
        lease.heard = self._clock()
        return lease

    def alive(self, key: Key) -> None:
        """A subscriber still waits: its lease lives on, and so does a subscription before its lease."""
        if (lease := self.held.get(key) or self.waiting.get(key)) is not None:
            lease.heard = self._clock()
        elif (early := self.early.get(key)) is not None:
            self.early[key] = (self._clock(), early[1])

    def end_subscriber(self, key: Key, sub: SubId) -> bool:
        """A consumer has, or no longer wants, what it subscribed. Returns whether its lease is now spent."""
        if (entry := self.early.get(key)) is not None and sub in entry[1]:
            entry[1][sub].ended = True
        for lease in self._all(key):
            if (subscriber := lease.subscribers.get(sub)) is not None and not subscriber.ended:
                subscriber.ended = True
                lease.finished += 1
        current = self.held.get(key) or self.waiting.get(key)
        return current is not None and current.spent

    def forget_consumer(self, consumer: bytes, reads_on: bool) -> None:
        """A consumer is gone, or starts over and subscribes anew: its subscriptions are no more.

        They don't count towards ``expected``: it has not got what it subscribed. With ``reads_on`` it may
        still read, until their deadlines.
        """
        for key, (at, early) in list(self.early.items()):
            kept = {sub: s for sub, s in early.items() if sub[0] != consumer or s.ended}
            self.early[key] = at, kept
            if not kept:
                del self.early[key]
        if reads_on:
            return
        for lease in (*self.held.values(), *self.waiting.values(), *self.closing):
            for sub in [sub for sub, s in lease.subscribers.items() if sub[0] == consumer and not s.ended]:
                del lease.subscribers[sub]

    def reads(self, consumer: bytes) -> bool:
        """Whether a consumer may read memory of some lease now or later."""
        now, leases = self._clock(), (*self.held.values(), *self.waiting.values(), *self.closing)
        subscribers = (s for lease in leases for s in lease.subscribers.values())
        return any(s.id[0] == consumer and not s.ended and s.until > now for s in subscribers)

    def close(self, key: Key, reason: str) -> Lease[P] | None:
        """End a lease. Its memory comes back with a later :meth:`reclaim`. Idempotent: None if not there."""
        if (lease := self.held.pop(key, None)) is not None:
            self.closing.append(lease)
        elif (lease := self.waiting.pop(key, None)) is None:
            return None
        self._remember(key, reason)
        return lease

    def _remember(self, key: Key, reason: str) -> None:
        self.ended[key] = reason
        if len(self.ended) > ENDED:
            self.ended.popitem(last=False)

    def reclaim(self) -> bool:
        """Free the memory of closing leases that nobody uses any more. Returns whether there was any."""
        now = self._clock()
        ready = [lease for lease in self.closing if not self._in_use(lease, now)]
        for lease in ready:
            self.closing.remove(lease)
            self._free(lease.at, lease.nbytes)
        return bool(ready)

    def overdue(self) -> tuple[list[Key], list[Subscriber]]:
        """Keys of leases to close, and early subscriptions to refuse (forgotten here)."""
        limit = self._clock() - self.lease_s
        expired = [key for key, lease in self.held.items() if lease.heard < limit]
        lapsed = [key for key, (at, _) in self.early.items() if at < limit]
        subscribers = [s for key in lapsed for s in self.early.pop(key)[1].values() if not s.ended]
        return expired, subscribers

    def check_integrity(self) -> None:
        """Raise AssertionError if the accounts do not add up."""
        assert 0 <= self.reserved <= self._capacity
        assert not set(self.held) & set(self.waiting)
        assert not (set(self.early) | set(self.ended)) & (set(self.held) | set(self.waiting))
        assert len(self.ended) <= ENDED
        assert all(early for _, early in self.early.values())
        for lease in (*self.held.values(), *self.closing):
            assert lease.at >= 0
            assert lease.writers >= 0
            for group, pieces in lease.pieces.items():
                _assert_in_a_row(lease.spans[group], pieces)
        assert all(lease.at < 0 and not lease.pieces for lease in self.waiting.values())

    def _all(self, key: Key) -> Iterable[Lease[P]]:
        """The key's leases, also those that are closing."""
        found = [lease for lease in self.closing if lease.key == key]
        current = self.held.get(key) or self.waiting.get(key)
        return found if current is None else [*found, current]

    @staticmethod
    def _in_use(lease: Lease[P], now: float) -> bool:
        return lease.writers > 0 or any(not s.ended and s.until > now for s in lease.subscribers.values())


def _assert_in_a_row(span: Want, pieces: Iterable[Span]) -> None:
    at = span.first
    for piece in pieces:
        assert piece.first == at < piece.last
        at = piece.last
    assert at <= span.first + span.count
