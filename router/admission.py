"""Who may run now: samples hold slots, requests wait in a bounded queue, the rest is refused at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from braid.errors import Overloaded, Unavailable
from router.metrics import Metrics

_RETRY_AFTER_S = 1.0
_DRAIN_RETRY_AFTER_S = 5.0


@dataclass(slots=True, eq=False)
class _Waiter:
    slots: int
    turn: asyncio.Future[None]


class Admission:
    """First come, first served over ``capacity`` slots; at most ``queue_limit`` requests wait."""

    def __init__(self, capacity: int, queue_limit: int, queue_timeout_s: float, metrics: Metrics) -> None:
        self._capacity = capacity
        self._queue_limit = queue_limit
        self._timeout_s = queue_timeout_s
        self._metrics = metrics
        self._used = 0
        self._queue: deque[_Waiter] = deque()
        self._closed = False

    @asynccontextmanager
    async def slots(self, n: int) -> AsyncIterator[None]:
        """Hold ``n`` slots (at most the capacity) inside the block.

        Raises:
            Overloaded: the queue is full, or the turn did not come in time.
            Unavailable: the router drains.
        """
        n = min(n, self._capacity)
        await self._acquire(n)
        try:
            yield
        finally:
            self._used -= n
            self._let_in()

    def close(self) -> None:
        """Admit nothing from now on; who waits is refused. Idempotent."""
        self._closed = True
        for waiter in self._queue:
            if not waiter.turn.done():
                waiter.turn.set_exception(_draining())

    def check_integrity(self, idle: bool = False) -> None:
        """Assert that the counts are within their bounds; when ``idle``, that they are zero."""
        assert 0 <= self._used <= self._capacity
        assert len(self._queue) <= self._queue_limit
        assert not idle or (self._used == 0 and not self._queue), (self._used, len(self._queue))

    async def _acquire(self, n: int) -> None:
        if self._closed:
            raise _draining()
        if not self._queue and self._used + n <= self._capacity:
            self._take(n)
            return
        if len(self._queue) >= self._queue_limit:
            raise Overloaded("The queue is full; try again later.", retry_after_s=_RETRY_AFTER_S)
        waiter = _Waiter(n, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        self._show()
        try:
            async with asyncio.timeout(self._timeout_s):
                await waiter.turn
        except BaseException as error:
            self._leave(waiter)
            if isinstance(error, TimeoutError):
                raise Overloaded("No slot came free in time.", retry_after_s=_RETRY_AFTER_S) from None
            raise

    def _leave(self, waiter: _Waiter) -> None:
        if waiter in self._queue:
            self._queue.remove(waiter)
        elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            self._used -= waiter.slots
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and self._used + self._queue[0].slots <= self._capacity:
            waiter = self._queue.popleft()
            if not waiter.turn.done():
                self._take(waiter.slots)
                waiter.turn.set_result(None)
        self._show()

    def _take(self, n: int) -> None:
        self._used += n
        self._show()

    def _show(self) -> None:
        self._metrics.queue_depth.set(len(self._queue))
        self._metrics.inflight_samples.set(self._used)


def _draining() -> Unavailable:
    return Unavailable("This router is shutting down.", retry_after_s=_DRAIN_RETRY_AFTER_S)
