"""Who may run now: samples hold slots, requests wait in a bounded queue, the rest is refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from braid.errors import DeadlineExceeded, Overloaded, Unavailable
from braid.fair import Entry, FairQueue, Flow
from router.metrics import Metrics

_RETRY_AFTER_S = 1.0
_DRAIN_RETRY_AFTER_S = 5.0


@dataclass(slots=True, eq=False)
class _Waiter:
    slots: int
    turn: asyncio.Future[None]


class Admission:
    """Priority first, then fair turns of tenants (:mod:`braid.fair`, a slot costs 1) over ``capacity`` slots;
    at most ``queue_limit`` requests wait.

    Requests of several samples together hold at most ``group_share`` of the slots: what remains is for single
    ones, which pass those that wait for that share. Otherwise nobody overtakes who is next and finds no room.
    """

    def __init__(
        self,
        capacity: int,
        queue_limit: int,
        queue_timeout_s: float,
        metrics: Metrics,
        group_share: float = 1.0,
    ) -> None:
        self._capacity = capacity
        self._for_groups = max(1, int(capacity * group_share))
        self._queue_limit = queue_limit
        self._timeout_s = queue_timeout_s
        self._metrics = metrics
        self._used = 0
        self._used_by_groups = 0
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._tenants: dict[str, Flow] = {}
        self._closed = False

    @asynccontextmanager
    async def slots(
        self, n: int, *, tenant: str = "", priority: int = 0, until: float | None = None
    ) -> AsyncIterator[None]:
        """Hold ``n`` slots inside the block; a request wider than what there is holds all that it may.

        Args:
            priority: lower is earlier.
            until: the request's own deadline, on the event loop's clock.

        Raises:
            Overloaded: the queue is full, or the turn did not come in time.
            DeadlineExceeded: nor before ``until``.
            Unavailable: the router drains.
        """
        group = n > 1
        n = min(n, self._for_groups if group else self._capacity)
        await self._acquire(n, group, tenant, priority, until)
        try:
            yield
        finally:
            self._give_back(n, group)
            self._let_in()

    def close(self) -> None:
        """Admit nothing from now on; who waits is refused. Idempotent."""
        self._closed = True
        for waiter in self._queue.items():
            if not waiter.turn.done():
                waiter.turn.set_exception(_draining())

    def check_integrity(self, idle: bool = False) -> None:
        """Assert that the counts are within their bounds; when ``idle``, that they are zero."""
        self._queue.check_integrity()
        assert 0 <= self._used_by_groups <= min(self._used, self._for_groups)
        assert self._used <= self._capacity
        assert len(self._queue) <= self._queue_limit
        assert not idle or (self._used == 0 and not len(self._queue)), (self._used, len(self._queue))

    async def _acquire(self, n: int, group: bool, tenant: str, priority: int, until: float | None) -> None:
        if self._closed:
            raise _draining()
        loop = asyncio.get_running_loop()
        flow = self._tenants.setdefault(tenant, Flow())
        waiter = _Waiter(n, loop.create_future())
        entry = self._queue.add(flow, waiter, group=group, priority=priority)
        self._let_in()
        if waiter.turn.done():
            return
        if len(self._queue) > self._queue_limit:
            self._queue.remove(entry)
            self._show()
            raise Overloaded("The queue is full; try again later.", retry_after_s=_RETRY_AFTER_S)
        patience = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(patience if until is None else min(patience, until)):
                await waiter.turn
        except BaseException as error:
            if not self._queue.remove(entry):
                self._give_back(n, group)  # the turn came with whatever ended the wait
            self._let_in()
            if not isinstance(error, TimeoutError):
                raise
            raise (_too_late() if until is not None and until < patience else _too_long()) from None

    def _let_in(self) -> None:
        while (entry := self._next()) is not None:
            waiter = entry.item
            self._queue.take(entry, waiter.slots)
            self._used += waiter.slots
            self._used_by_groups += waiter.slots * entry.group
            if waiter.turn.done():  # it is leaving, and gives these back
                continue
            waiter.turn.set_result(None)
        self._show()

    def _next(self) -> Entry[_Waiter] | None:
        """Whose turn it is, None while there is no room for it."""
        entry = self._queue.first()
        if entry is not None and entry.group and self._used_by_groups + entry.item.slots > self._for_groups:
            entry = self._queue.first(groups=False)
        if entry is None or self._used + entry.item.slots > self._capacity:
            return None
        return entry

    def _give_back(self, n: int, group: bool) -> None:
        self._used -= n
        self._used_by_groups -= n * group

    def _show(self) -> None:
        self._metrics.queue_depth.set(len(self._queue))
        self._metrics.inflight_samples.set(self._used)


def _draining() -> Unavailable:
    return Unavailable("This router is shutting down.", retry_after_s=_DRAIN_RETRY_AFTER_S)


def _too_long() -> Overloaded:
    return Overloaded("No slot came free in time.", retry_after_s=_RETRY_AFTER_S)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The deadline of this request passed while it waited for a slot.")
