"""What a network does to a KV transfer between real engines: the answer stays right and says how it came.

A cluster of its own, one prefill and one decode worker, whose KV goes through a proxy: the prefill worker is
advertised at another loopback address than the one it binds.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from deploy.local import Cluster, UpSettings, free_port
from tests.kvtransfer.proxy import Faults, Proxy
from tests.system.conftest import System

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

LOAD_TIMEOUT_S = 3.0
TOKENS = 1000
"""4.2 MB of KV."""
PROXY_HOST = "127.0.0.2"


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Proxy]]:
    port = free_port()
    settings = UpSettings(
        prefill=1, decode=1, port=0, run_dir=tmp_path_factory.mktemp("kv"), start_timeout_s=600, drain_s=5
    )
    env = {
        "BRAID_KV_BIND": f"tcp://127.0.0.1:{port}",
        "BRAID_KV_ADVERTISE": PROXY_HOST,
        "BRAID_KV_TRANSPORTS": "zmq",
        "BRAID_KV_CHECK": "full",
        "BRAID_LOAD_TIMEOUT_S": str(LOAD_TIMEOUT_S),
    }
    proxy = Proxy(f"tcp://127.0.0.1:{port}", PROXY_HOST, port)
    try:
        with Cluster(settings, [], env=env) as cluster:
            yield cluster.wait_ready(), proxy
    finally:
        proxy.close()


@pytest.fixture
async def network(proxied: tuple[Cluster, Proxy]) -> AsyncIterator[tuple[System, Proxy]]:
    """The cluster and its proxy, whose connections are new; after the test nothing may be left."""
    cluster, proxy = proxied
    system = System(cluster)
    proxy.faults = Faults()
    proxy.reset()
    yield system, proxy
    proxy.faults = Faults()
    await system.settled()
    await system.client.aclose()


async def ask(system: System, prompt: list[int], **fields: Any) -> tuple[str, dict[str, Any]]:
    """The greedy text, and what the decode worker says of its transfer."""
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    reply = (await system.client.post("/v1/completions", json=body | fields)).json()
    (record,) = reply["braid"]["decode"].values()
    return reply["choices"][0]["text"], record


async def check_answer(system: System, prompt: list[int], text: str) -> None:
    """With a calm network the same prompt is answered alike: from what the decode worker has in its cache by
    then, and where neither worker has anything of it."""
    cached, record = await ask(system, prompt)
    assert record["blocks_cached"] > 0
    anew, record = await ask(system, prompt, cache_salt=secrets.token_hex(8))
    assert (record["path"], record["blocks_cached"]) == ("remote", 0)
    assert cached == anew == text


def fresh_prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 400) for _ in range(TOKENS)]


async def test_a_calm_network_moves_it_over_zmq(network: tuple[System, Proxy]) -> None:
    system, proxy = network
    before = proxy.down
    _, record = await ask(system, fresh_prompt(1))
    assert (record["path"], record["transport"], record["retries"]) == ("remote", "zmq", 0)
    assert proxy.down - before > record["kv_bytes"] > 4_000_000


async def test_damaged_bytes_are_recomputed(network: tuple[System, Proxy]) -> None:
    system, proxy = network
    proxy.faults.corrupt_at = 1_000_000
    prompt = fresh_prompt(2)
    text, record = await ask(system, prompt)
    assert (record["path"], record["reason"]) == ("recomputed", "corrupt")
    proxy.faults = Faults()
    await check_answer(system, prompt, text)


async def test_a_connection_cut_mid_block_is_resumed(network: tuple[System, Proxy]) -> None:
    system, proxy = network
    proxy.faults.cut_after = 1_500_000
    prompt = fresh_prompt(3)
    text, record = await ask(system, prompt)
    assert (record["path"], record["retries"]) == ("remote", 1)
    await check_answer(system, prompt, text)


@pytest.mark.parametrize("faults", [Faults(rate=100_000), Faults(blackhole=True)], ids=["crawl", "blackhole"])
async def test_a_transfer_past_its_deadline_is_recomputed(
    network: tuple[System, Proxy], faults: Faults
) -> None:
    system, proxy = network
    proxy.faults = faults
    prompt = fresh_prompt(4)
    started = time.monotonic()
    text, record = await ask(system, prompt)
    assert record["path"] == "recomputed"
    assert time.monotonic() - started < LOAD_TIMEOUT_S + 20
    proxy.faults = Faults()
    proxy.reset()
    await check_answer(system, prompt, text)
    _, record = await ask(system, fresh_prompt(5))
    assert record["path"] == "remote"  # the pair works again as soon as the network does


async def test_a_partition_is_recomputed_at_once(network: tuple[System, Proxy]) -> None:
    """Last in this file: the proxy does not listen again."""
    system, proxy = network
    proxy.refuse()
    prompt = fresh_prompt(6)
    started = time.monotonic()
    _, record = await ask(system, prompt)
    assert (record["path"], record["reason"]) == ("recomputed", "disconnected")
    assert time.monotonic() - started < LOAD_TIMEOUT_S
