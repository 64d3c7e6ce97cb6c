"""A prompt whose decode worker has no room for it yet: its KV waits on the prefill worker. Real engines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from deploy.local import Cluster, UpSettings
from tests.system.conftest import System

pytestmark = pytest.mark.system

LEASE_S = 5.0
PROMPT = 1800


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A decode worker with room for one such prompt, and short leases."""
    settings = UpSettings(
        prefill=1, decode=1, port=0, run_dir=tmp_path_factory.mktemp("narrow"), start_timeout_s=600, drain_s=5
    )
    env = {"BRAID_MAX_LOAD_SHARE": "0.01", "BRAID_LEASE_S": str(LEASE_S)}
    with Cluster(settings, env=env) as cluster:
        yield cluster.wait_ready()


@pytest.fixture
async def system(narrow: Cluster) -> AsyncIterator[System]:
    system = System(narrow)
    await system.has("decode-0")
    yield system
    await system.settled()
    await system.client.aclose()


def body(seed: int, **fields: Any) -> dict[str, Any]:
    rng = random.Random(seed)
    prompt = [rng.randrange(5, 400) for _ in range(PROMPT)]
    return {"model": "demo", "prompt": prompt, "ignore_eos": True, **fields}


async def test_kv_of_a_prompt_that_waits_for_room_outlives_its_lease(system: System) -> None:
    async def staged() -> int:
        return (await system.stats("prefill"))["prefill-0"]["leases"]

    async def held() -> bool:
        return (await system.stats("decode"))["decode-0"]["import_blocks"] > 0

    async def computed() -> bool:
        return await staged() == 1

    first = asyncio.create_task(system.client.post("/v1/completions", json=body(1, n=64, max_tokens=2000)))
    await system.until(held)
    waits = asyncio.create_task(system.client.post("/v1/completions", json=body(2, max_tokens=4)))
    await system.until(computed)
    await asyncio.sleep(LEASE_S + 2)  # that nothing ends meanwhile is what is tested
    assert await staged() == 1
    assert not first.done(), "there was room before the lease could expire"
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    reply = (await waits).json()
    assert (reply["braid"]["path"], reply["braid"]["kv_transfers"]) == ("remote", 1)
