"""Who may still read what: the producer's table of leases. Pure state, no sockets, clock injected.

Life of a lease::

    open --> waiting (no room yet) --> held --(all pieces published)--> complete --> closed
                                        |                                  ^
                                        +---- close(cancelled, ...) -------+

A lease is closed when every expected subscriber is done or has dropped it, when its owner closes it,
or ``lease_s`` after the last piece or word of a subscriber (one that waits says so every few seconds).
Subscriptions may come before the lease is opened (both are dispatched at the same time, and a prompt may
queue at the producer); they wait for ``lease_s`` after their subscriber was last heard of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvtransfer.wire import Key, Manifest

P = TypeVar("P")
"""A piece: whatever the producer publishes (a tensor of blocks)."""


@dataclass(slots=True)
class Subscriber:
    """A consumer of one lease. ``sent``: leading blocks already sent to it."""

    address: bytes
    have: int
    sent: int = 0
    done: bool = False


@dataclass(slots=True)
class Lease(Generic[P]):
    """One prompt's KV. ``pieces`` are ``(first, count, piece)`` in block order without gaps."""

    manifest: Manifest
    blocks: int
    nbytes: int
    expected: int
    pieces: list[tuple[int, int, P]] = field(default_factory=list)
    subscribers: dict[bytes, Subscriber] = field(default_factory=dict)
    published: int = 0
    heard: float = 0.0

    @property
    def spent(self) -> bool:
        """Every expected subscriber has ended."""
        return sum(s.done for s in self.subscribers.values()) >= self.expected


class LeaseTable(Generic[P]):
    """The producer's leases under a bound of ``capacity`` bytes.

    Args:
        capacity: bytes that may be reserved at the same time.
        lease_s: seconds a lease is kept without a new piece and without hearing from a subscriber.
        clock: monotonic seconds.
    """

    def __init__(self, capacity: int, lease_s: float, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self.lease_s = lease_s
        self._clock = clock
        self.held: dict[Key, Lease[P]] = {}
        self.waiting: OrderedDict[Key, Lease[P]] = OrderedDict()
        self.early: dict[Key, tuple[float, dict[bytes, Subscriber]]] = {}
        self.reserved = 0

    def open(self, lease: Lease[P]) -> None:
        """Queue a lease for room. Raises ValueError for a key in use or a lease that can never fit."""
        key = lease.manifest.key
        if key in self.held or key in self.waiting:
            raise ValueError("key is in use")
        if lease.nbytes > self.capacity:
            raise ValueError(f"{lease.nbytes} bytes of KV are over the staging bound of {self.capacity}")
        _, lease.subscribers = self.early.pop(key, (0.0, {}))
        lease.heard = self._clock()
        self.waiting[key] = lease

    def grant(self) -> list[Lease[P]]:
        """Reserve room for the waiting leases that fit, first come first served, and hold them."""
        granted = []
        while self.waiting:
            key, lease = next(iter(self.waiting.items()))
            if self.reserved + lease.nbytes > self.capacity:
                break
            del self.waiting[key]
            self.held[key] = lease
            self.reserved += lease.nbytes
            granted.append(lease)
        return granted

    def knows(self, key: Key) -> bool:
        """Whether a lease of this key is open."""
        return key in self.held or key in self.waiting

    def subscribe(self, key: Key, subscriber: Subscriber) -> Lease[P] | None:
        """Add a consumer (again: replaces it). Returns the lease if it is held."""
        lease = self.held.get(key) or self.waiting.get(key)
        if lease is None:
            _, early = self.early.setdefault(key, (self._clock(), {}))
            early[subscriber.address] = subscriber
            return None
        lease.subscribers[subscriber.address] = subscriber
        lease.heard = self._clock()
        return lease if key in self.held else None

    def publish(self, key: Key, first: int, count: int, piece: P) -> Lease[P] | None:
        """Add a piece; returns the lease, or None if it has ended. Raises ValueError for a gap."""
        lease = self.held.get(key)
        if lease is None:
            return None
        if first != lease.published or first + count > lease.blocks:
            raise ValueError(f"piece [{first}, {first + count}) does not follow block {lease.published}")
        lease.pieces.append((first, count, piece))
        lease.published += count
        lease.heard = self._clock()
        return lease

    def alive(self, key: Key) -> None:
        """A subscriber still waits: its lease lives on, and so does a subscription before its lease."""
        if (lease := self.held.get(key)) is not None:
            lease.heard = self._clock()
        elif (early := self.early.get(key)) is not None:
            self.early[key] = (self._clock(), early[1])

    def end_subscriber(self, key: Key, address: bytes) -> bool:
        """A consumer is done or has dropped the lease. Returns whether the lease is now spent."""
        if (entry := self.early.get(key)) is not None:
            entry[1].pop(address, None)
            if not entry[1]:
                del self.early[key]
        lease = self.held.get(key) or self.waiting.get(key)
        if lease is None:
            return False
        if (subscriber := lease.subscribers.get(address)) is not None:
            subscriber.done = True
        return lease.spent

    def close(self, key: Key) -> Lease[P] | None:
        """Forget a lease and give its room back. Idempotent: None if it is not there."""
        if (lease := self.held.pop(key, None)) is not None:
            self.reserved -= lease.nbytes
            return lease
        return self.waiting.pop(key, None)

    def overdue(self) -> tuple[list[Key], list[tuple[Key, list[Subscriber]]]]:
        """Keys of leases to close, and early subscriptions to refuse (forgotten here)."""
        limit = self._clock() - self.lease_s
        expired = [key for key, lease in self.held.items() if lease.heard < limit]
        lapsed = [(key, list(subs.values())) for key, (at, subs) in self.early.items() if at < limit]
        for key, _ in lapsed:
            del self.early[key]
        return expired, lapsed

    def check_integrity(self) -> None:
        """Raise AssertionError if the accounts do not add up."""
        assert self.reserved == sum(lease.nbytes for lease in self.held.values())
        assert 0 <= self.reserved <= self.capacity
        assert not set(self.held) & set(self.waiting)
        assert not set(self.early) & (set(self.held) | set(self.waiting))
        for lease in self.held.values():
            assert lease.published == sum(count for _, count, _ in lease.pieces) <= lease.blocks
        assert all(not lease.pieces for lease in self.waiting.values())
