"""A group that is held back beside a single request still forks from one import."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.system.conftest import System

pytestmark = pytest.mark.system

COMPLETIONS = "/v1/completions"


def body(tokens: int, seed: int, **fields: object) -> dict[str, object]:
    prompt = [random.Random(seed * 7 + i).randrange(5, 400) for i in range(tokens)]
    return {"model": "demo", "prompt": prompt, "temperature": 1.0, "ignore_eos": True, "seed": seed, **fields}


async def test_samples_that_wait_for_seats_cost_no_transfer_and_one_prompt_token(system: System) -> None:
    computed = "vllm:request_prefill_kv_computed_tokens_sum"

    async def waits() -> bool:
        return await system.metric("decode-0", "braid_seats_waiting") > 0

    async with system.only("decode-0"):
        before = await system.metric("decode-0", computed)
        single = asyncio.create_task(system.client.post(COMPLETIONS, json=body(40, 1, max_tokens=1500)))
        await system.until(lambda: _held(system))
        options = {"strategy": "rollouts", "n": 128}
        group = asyncio.create_task(
            system.client.post(COMPLETIONS, json=body(1000, 2, max_tokens=8, reasoning=options))
        )
        await system.until(waits)
        reply = (await group).json()
        assert [s["state"] for s in reply["reasoning"]["samples"]] == ["finished"] * 128
        assert reply["braid"]["kv_transfers"] == 1
        await single
        # One token of the group's prompt a sample, and one of the single request's.
        assert await system.grown("decode-0", computed, before, 128 + 1) == 128 + 1


async def _held(system: System) -> bool:
    return await system.metric("decode-0", "braid_seats_held") > 0
