"""Simulated workers on a real router in the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from braid import wire
from braid.settings import DecodeSettings, PrefillSettings, WorkerSettings
from braid.sim.worker import Shared, SimWorker
from tests.router.conftest import MakeStand, Stand, make_stand, no_helper_is_left

__all__ = ["make_stand", "no_helper_is_left"]

PATIENT = {"heartbeat_s": 0.1, "heartbeat_misses": 100}
"""A busy machine is not a lost peer; a socket that is closed is found out at the next ping."""
FAST: dict[str, Any] = {"engine": "sim", "sim_time_scale": 0.05, **PATIENT}
"""Settings of a worker in tests: twenty times faster than the model says."""


def settings_of(role: wire.Role, **fields: Any) -> WorkerSettings:
    kind = PrefillSettings if role == "prefill" else DecodeSettings
    return kind(**{**FAST, **fields})


class Fleet:
    """A router and its simulated workers."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.workers: list[SimWorker] = []
        self._shared: dict[str, Shared] = {}

    async def add(self, role: wire.Role, name: str, **fields: Any) -> SimWorker:
        """Start a worker and wait until the router knows it."""
        settings = settings_of(role, router=self.stand.link, **fields)
        key = repr((settings.sim_model_file, settings.sim_time_scale, settings.sim_bandwidth))
        shared = self._shared[key] = self._shared.get(key) or Shared(settings)
        worker = SimWorker(role, name, settings, shared)
        self.workers.append(worker)
        worker.start()
        await self.until(lambda: worker.link.registered)
        return worker

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a state; reached late on a busy machine."""
        await self.stand.until(holds, 30)

    async def paired(self, count: int = 1) -> None:
        """Wait until this many pairs are verified."""
        await self.until(lambda: sum(p["verified"] for p in self.stand.app.pairs.state()) == count)

    async def pairs(self, prefill: int = 1, decode: int = 1, **fields: Any) -> list[SimWorker]:
        """Workers ``p0``..., ``d0``..., every pair verified."""
        found = [await self.add("prefill", f"p{i}", **fields) for i in range(prefill)]
        found += [await self.add("decode", f"d{i}", **fields) for i in range(decode)]
        await self.paired(prefill * decode)
        return found

    async def settled(self) -> None:
        """Wait until nothing runs and every block is free. A reply may be there before the router's message
        that lets go of what its samples kept; that one is waited for, less long than they are kept."""
        alive = [worker for worker in self.workers if worker.link.registered]
        await self.until(lambda: all(worker.service.idle() for worker in alive))
        await self.until(lambda: all(s["free"] == s["blocks"] for s in (w.stats() for w in alive)))
        for worker in alive:
            worker.check_integrity()

    async def close(self) -> None:
        for worker in self.workers:
            await worker.stop()
        for shared in self._shared.values():
            await shared.stop()


@pytest.fixture
async def make_fleet(make_stand: MakeStand) -> AsyncIterator[Any]:
    """Makes fleets on routers with the given settings; afterwards everything has to be free."""
    fleets: list[Fleet] = []

    async def make(**fields: Any) -> Fleet:
        fleets.append(Fleet(await make_stand(**{**PATIENT, **fields})))
        return fleets[-1]

    yield make
    for fleet in fleets:
        try:
            await fleet.settled()
        finally:
            await fleet.close()


@pytest.fixture
async def fleet(make_fleet: Any) -> Fleet:
    """A fleet without workers yet."""
    made: Fleet = await make_fleet()
    return made
