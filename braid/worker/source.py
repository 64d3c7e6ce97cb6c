"""Where a dispatch's KV comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from braid import wire


class Source:
    """A dispatch's ticket, which the router may replace or take away."""

    def __init__(self, ticket: wire.Ticket | None, reason: str) -> None:
        self.ticket = ticket
        self.reason = reason
        self._changed = asyncio.Event()

    def change(self, ticket: wire.Ticket | None, reason: str) -> None:
        """The producer is lost; go on with ``ticket``, or without one."""
        self.ticket, self.reason = ticket, reason
        self._changed.set()

    async def changed(self, ticket: wire.Ticket) -> None:
        """Wait until the ticket is another than this one."""
        while self.ticket is ticket:
            self._changed.clear()
            await self._changed.wait()

    async def follow(self, tell: Callable[[wire.Ticket, bool], Awaitable[None]]) -> None:
        """Tell of the ticket that its KV is waited for, and that it is so no longer; of each that replaces it
        too. Ends when there is none, or when it is cancelled."""
        while (ticket := self.ticket) is not None:
            try:
                await tell(ticket, True)
                await self.changed(ticket)
            finally:
                await tell(ticket, False)
