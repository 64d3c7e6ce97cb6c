"""What the processes cost when there is nothing to do, and where they listen."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.system import processes
from tests.system.conftest import System

pytestmark = pytest.mark.system

IDLE_SHARE = 0.05
WAITING_SHARE = 0.30
WINDOW_S = 6.0


async def shares(pids: list[int], seconds: float) -> dict[int, float]:
    """Share of a core each process used during the next seconds."""
    before = {pid: processes.cpu_seconds(pid) for pid in pids}
    started = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - started
    return {pid: (processes.cpu_seconds(pid) - before[pid]) / took for pid in pids}


def engine_processes(system: System, name: str) -> list[int]:
    return processes.group(system.cluster.pids[name])


async def test_idle_engines_use_no_core(system: System) -> None:
    body = {"model": "demo", "prompt": [8] * 500, "n": 8, "temperature": 1.0, "max_tokens": 64}
    await system.client.post("/v1/completions", json=body)
    await system.settled()
    await asyncio.sleep(2)  # an engine spins for a second after its last step
    pids = [pid for name in system.cluster.pids for pid in engine_processes(system, name)]
    used = await shares(pids, WINDOW_S)
    print(f"\nidle, share of a core: {sorted(round(v, 3) for v in used.values())}")
    assert max(used.values()) < IDLE_SHARE


async def test_a_request_that_waits_for_remote_kv_does_not_spin(system: System) -> None:
    await asyncio.sleep(2)
    system.signal("prefill-0", signal.SIGSTOP)
    try:
        body = {"model": "demo", "prompt": [9] * 500, "max_tokens": 2, "temperature": 0}
        request = asyncio.create_task(system.client.post("/v1/completions", json=body))

        async def loading() -> bool:
            return any(s.get("loads", 0) for s in (await system.stats("decode")).values())

        await system.until(loading)
        pids = engine_processes(system, "decode-0") + engine_processes(system, "decode-1")
        used = await shares(pids, 2.0)
        assert not request.done(), "the wait was over before it was measured"
        print(f"\none request waiting, both decode workers together: {sum(used.values()):.3f} of a core")
        assert sum(used.values()) < WAITING_SHARE
    finally:
        system.signal("prefill-0", signal.SIGCONT)
    assert (await request).status_code == 200


async def test_nothing_listens_beyond_loopback(system: System) -> None:
    pids = [pid for name in system.cluster.pids for pid in engine_processes(system, name)]
    addresses = processes.listening(pids)
    assert addresses
    assert all(address.startswith("127.") for address in addresses), addresses


WORKERS = ("prefill-0", "decode-0", "decode-1")


def told(system: System, event: str) -> dict[str, dict[str, Any]]:
    """What the processes logged of an event, by process."""
    lines = [
        line
        for child in system.cluster.children.values()
        for line in Path(child.log).read_text().splitlines()
    ]
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return {record["process"]: record for record in records if record.get("event") == event}


def test_no_process_collects_what_it_began_with(system: System) -> None:
    """A full collection would stop a worker's front, or its engine's steps, for half a second."""
    frozen = told(system, "heap_frozen")
    assert all(record["objects"] > 10_000 for record in frozen.values())
    assert set(frozen) == {"router", *(f"{name}{part}" for name in WORKERS for part in ("", "/worker"))}


def test_every_process_gives_back_what_it_freed(system: System) -> None:
    parts = ("", "/scheduler", "/worker")
    assert set(told(system, "heap_trimmed")) == {"router", *(f"{w}{part}" for w in WORKERS for part in parts)}
