"""One real cluster for all system tests: a router, one prefill and two decode workers, real vLLM.

The router spreads a group over all ready decode workers (``BRAID_SPREAD``); a test that wants one worker
pauses the other (:meth:`System.only`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local import Cluster, UpSettings

HEARTBEAT_S = 0.25
HELD = (
    "running",
    "waiting",
    "requests",
    "imports",
    "jobs",
    "dispatches",
    "loads",
    "staging_bytes",
    "leases",
    "pending",
    "import_blocks",
    "seats_held",
    "seats_waiting",
)
"""Counters of a worker that are zero when it holds nothing."""
SETTLE_S = 30.0
"""Longest wait for a state that comes by heartbeats; generous, as the machine may be busy."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for engines to load."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(900))


class System:
    """The running cluster as tests see it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.url = cluster.url
        self.client = httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False)

    async def workers(self) -> dict[str, dict[str, Any]]:
        """The router's view of the ready workers, by name."""
        workers = (await self.client.get("/cluster")).json()["workers"]
        return {w["worker"]: w for w in workers if w["state"] == "ready"}

    async def stats(self, role: str = "") -> dict[str, dict[str, int]]:
        """What every worker (of a role) holds now, counted by its engine and its transfer ends."""
        found = {}
        for name, worker in (await self.workers()).items():
            if role in ("", worker["role"]):
                found[name] = (await self.client.get(worker["http"] + "/stats")).json()
        return found

    async def answer(self) -> bool:
        """Whether every worker that the router takes for ready answers: it may not have missed one yet."""
        try:
            await self.stats()
        except httpx.TransportError:
            return False
        return True

    async def metric(self, worker: str, name: str) -> float:
        """Sum of a counter of a worker over its labels; ``name`` may carry labels as text."""
        http = (await self.workers())[worker]["http"]
        text = (await self.client.get(http + "/metrics")).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    async def grown(self, worker: str, name: str, before: float, by: float) -> float:
        """What a counter has grown by, once that is ``by`` or more: a worker counts just after it answers."""

        async def there() -> bool:
            return await self.metric(worker, name) >= before + by

        await self.until(there)
        return await self.metric(worker, name) - before

    async def until(self, holds: Any, limit_s: float = SETTLE_S) -> float:
        """Wait until ``await holds()`` is true; returns the seconds it took."""
        started = time.monotonic()
        while not await holds():
            assert time.monotonic() - started < limit_s, "the state did not come"
            await asyncio.sleep(0.02)
        return time.monotonic() - started

    async def settled(self, limit_s: float = SETTLE_S) -> float:
        """Wait until no worker holds anything; returns the seconds it took."""
        return await self.until(self.idle, limit_s)

    async def idle(self) -> bool:
        stats = await self.stats()
        return all(
            all(s.get(key, 0) == 0 for key in HELD) and s["free"] == s["blocks"] - 1 for s in stats.values()
        )

    async def has(self, *names: str) -> None:
        """Wait until exactly these decode workers and the prefill worker are ready and paired."""
        wanted = {"prefill-0", *names}

        async def there() -> bool:
            state = (await self.client.get("/cluster")).json()
            ready = {w["worker"] for w in state["workers"] if w["state"] == "ready"}
            paired = {p["decode"] for p in state["pairs"] if p["verified"]}
            return ready == wanted and set(names) <= paired and await self.answer()

        await self.until(there, 240)

    @asynccontextmanager
    async def only(self, decode: str) -> AsyncIterator[None]:
        """Run with one decode worker: the others are paused, then let go on."""
        others = [n for n in self.cluster.pids if n.startswith("decode") and n != decode]
        try:
            for name in others:
                self.signal(name, signal.SIGSTOP)
            await self.has(decode)
            yield
        finally:
            for name in others:
                self.signal(name, signal.SIGCONT)
            await self.has(decode, *others)

    @asynccontextmanager
    async def without_prefill(self) -> AsyncIterator[None]:
        """Run with the prefill worker paused, then let it go on."""

        async def ready(wanted: bool) -> bool:
            workers = (await self.client.get("/cluster")).json()["workers"]
            return wanted == any(w["worker"] == "prefill-0" and w["state"] == "ready" for w in workers)

        try:
            self.signal("prefill-0", signal.SIGSTOP)
            await self.until(lambda: ready(False))
            yield
        finally:
            self.signal("prefill-0", signal.SIGCONT)
            await self.until(lambda: ready(True), 240)

    async def ended(self, name: str) -> None:
        """Wait until a process that was killed has been collected."""

        async def collected() -> bool:
            return name in self.cluster.ended()

        await self.until(collected)

    def signal(self, name: str, number: int) -> None:
        """Signal a process and its engine."""
        os.killpg(self.cluster.pids[name], number)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = UpSettings(
        prefill=1, decode=2, port=0, run_dir=tmp_path_factory.mktemp("run"), start_timeout_s=600, drain_s=5
    )
    env = {
        "BRAID_SPREAD": "spread",
        "BRAID_HEARTBEAT_S": str(HEARTBEAT_S),
        "BRAID_HEARTBEAT_MISSES": "12",
        "BRAID_PREFILL_TIMEOUT_S": "20",
    }
    engine_args = ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]
    with Cluster(settings, engine_args, env=env) as cluster:
        yield cluster.wait_ready()


@pytest.fixture
async def system(running: Cluster) -> AsyncIterator[System]:
    """The cluster with all its workers ready; after the test, nothing may be left in it."""
    system = System(running)
    for name in running.ended():
        running.respawn(name)
    await system.has("decode-0", "decode-1")
    yield system
    if not running.ended():
        await system.settled()
    await system.client.aclose()


@pytest.fixture(scope="session")
def problems() -> list[dict[str, str]]:
    """200 problems of the demo model's test split."""
    from demo.tasks import problems as generate
    from demo.tasks import record

    return [record(p, f"t{i}", "worked") for i, p in enumerate(generate("test", 7, 200))]


@pytest.fixture(scope="session")
def reference(problems: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one plain vLLM engine of the same version answers, greedily."""
    folder = tmp_path_factory.mktemp("reference")
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps([p["prompt"] for p in problems]))
    script = Path(__file__).with_name("plain_engine.py")
    subprocess.run([sys.executable, str(script), str(asked), str(answered)], check=True, timeout=600)
    answers: list[Any] = json.loads(answered.read_text())
    return answers
