"""A group's prompt crosses the wire once per decode worker, whatever n is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.system.conftest import System

pytestmark = pytest.mark.system

TOKENS = 1000
BLOCK = 32


async def ask(system: System, n: int, tokens: int = TOKENS, **fields: Any) -> Any:
    rng = random.Random(repr((n, tokens, fields)))
    body = {
        "model": "demo",
        "prompt": [rng.randrange(5, 400) for _ in range(tokens)],
        "n": n,
        "temperature": 1.0,
        "max_tokens": 4,
        **fields,
    }
    reply = await system.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["choices"]) == n
    return reply


COMPUTED = "vllm:request_prefill_kv_computed_tokens_sum"


async def computed(system: System, worker: str) -> float:
    return await system.metric(worker, COMPUTED)


async def test_transfers_and_bytes_do_not_grow_with_n(system: System) -> None:
    seen = {}
    async with system.only("decode-0"):
        for n in (1, 4, 16, 64):
            before = await computed(system, "decode-0")
            reply = await ask(system, n)
            assert reply.headers["x-braid-path"] == "remote"
            seen[n] = (reply.headers["x-braid-kv-transfers"], reply.headers["x-braid-kv-bytes"])
            # Each sample computes the prompt's last token, for its logits, and nothing else; a single one not
            # even that, as it begins with the token that the prefill worker drew.
            alone = 0 if n == 1 else n
            assert await system.grown("decode-0", COMPUTED, before, alone) == alone
    assert len(set(seen.values())) == 1
    assert seen[1][0] == "1"
    print(f"\n(transfers, bytes) by n on one decode worker: {seen}")


async def test_two_decode_workers_take_two_transfers(system: System) -> None:
    one = await ask(system, 1, seed=1)
    two = await ask(system, 16, seed=2)
    assert two.headers["x-braid-kv-transfers"] == "2"
    assert int(two.headers["x-braid-kv-bytes"]) == 2 * int(one.headers["x-braid-kv-bytes"])


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64])
async def test_short_prompts_share_their_partial_block_too(system: System, tokens: int) -> None:
    async with system.only("decode-0"):
        before = await computed(system, "decode-0")
        reply = await ask(system, 4, tokens)
        assert reply.headers["x-braid-kv-transfers"] == "1"
        assert await system.grown("decode-0", COMPUTED, before, 4) == 4


@pytest.mark.parametrize("tokens", [33, 320])
async def test_a_prompt_that_no_transfer_brings_is_computed_once(system: System, tokens: int) -> None:
    """The decode worker computes the prompt before its samples are submitted, and each of them the last
    token."""
    n = 16
    async with system.only("decode-0"), system.without_prefill():
        before = await computed(system, "decode-0")
        reply = await ask(system, n, tokens)
        assert reply.headers["x-braid-path"] == "local"
        assert await computed(system, "decode-0") - before == tokens + n


async def test_full_prefix_blocks_are_held_once_while_the_group_runs(system: System) -> None:
    n, peak = 16, 0
    async with system.only("decode-0"):
        body = {
            "model": "demo",
            "prompt": [random.Random(5).randrange(5, 400) for _ in range(TOKENS)],
            "n": n,
            "temperature": 1.0,
            "max_tokens": 256,
            "ignore_eos": True,
            "stream": True,
        }
        async with system.client.stream("POST", "/v1/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                stats = (await system.stats())["decode-0"]
                if stats["running"] == n:
                    peak = stats["blocks"] - 1 - stats["free"]
                    break
    prefix = TOKENS // BLOCK
    per_sample = -(-(TOKENS % BLOCK + 256) // BLOCK) + 1
    assert prefix < peak <= prefix + 1 + n * per_sample


async def test_only_blocks_that_are_not_cached_are_moved(system: System) -> None:
    async with system.only("decode-0"):
        rng = random.Random(99)
        prompt = [rng.randrange(5, 400) for _ in range(TOKENS)]
        body = {"model": "demo", "prompt": prompt, "max_tokens": 2, "temperature": 0}
        first = await system.client.post("/v1/completions", json=body)
        body["prompt"] = prompt[: TOKENS * 9 // 10] + [rng.randrange(5, 400) for _ in range(TOKENS // 10)]
        second = await system.client.post("/v1/completions", json=body)
    moved, whole = (int(r.headers["x-braid-kv-bytes"]) for r in (second, first))
    blocks = -(-TOKENS // BLOCK)
    assert moved <= whole * 0.1 + whole / blocks  # a tenth of the blocks, plus one


async def test_most_of_a_long_prompt_has_left_before_its_last_chunk_is_computed(system: System) -> None:
    """Ten chunks of 512: all but the last one's blocks can be on their way by then."""
    names = "braid_kv_early_bytes_total", "braid_kv_sent_bytes_total"
    before = [await system.metric("prefill-0", name) for name in names]
    moved = int((await ask(system, 1, 5100)).headers["x-braid-kv-bytes"])
    assert await system.grown("prefill-0", names[1], before[1], moved) == moved
    early = await system.metric("prefill-0", names[0]) - before[0]
    print(f"\nof a prompt of 5,100 tokens {early / moved:.2f} had left before the last chunk was computed")
    assert early >= 0.8 * moved
