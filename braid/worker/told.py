"""The token that a prefill worker draws behind a prompt: the wait for it, and when it is of use."""

from __future__ import annotations

import asyncio

from braid import wire

WAIT_S = 0.03
"""How long a sample that has its KV and its seat waits for the token: twice what drawing it here takes."""

FREE_SHARE = 0.1
"""Part of a cache that is free where its engine is not about to run out of it."""


def roomy(waiting: int, free: int, blocks: int) -> bool:
    """Whether an engine begins at once with what it is given: nothing waits, and a tenth of its cache is
    free."""
    return not waiting and free >= FREE_SHARE * blocks


class Told:
    """What the prefill worker of one dispatch has drawn, once it has said so."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Another prefill worker draws it: what was told is void."""
        self._first: asyncio.Future[wire.First] = asyncio.get_running_loop().create_future()

    def tell(self, first: wire.First) -> None:
        """It has been drawn. Idempotent."""
        if not self._first.done():
            self._first.set_result(first)

    async def wait(self) -> wire.First | None:
        """It, or None if it does not come within :data:`WAIT_S`."""
        if not self._first.done():
            await asyncio.wait([self._first], timeout=WAIT_S)
        return self._first.result() if self._first.done() else None
