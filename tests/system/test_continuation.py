"""What goes on from a sample is computed where its KV is: its last token and what is new, and no more."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from braid.services import VERIFY
from tests.system.conftest import HELD, System

pytestmark = pytest.mark.system

FILLER = "Ada has 3 boxes with 12 pens each. " * 120
N, K = 4, 2


async def computed(system: System) -> float:
    """Prompt tokens that the decode workers in use have computed so far."""
    name = "vllm:request_prefill_kv_computed_tokens_sum"
    workers = [name for name, worker in (await system.workers()).items() if worker["role"] == "decode"]
    return sum([await system.metric(worker, name) for worker in workers])


async def length(system: System, messages: list[dict[str, str]], **fields: Any) -> int:
    reply = await system.client.post("/tokenize", json={"model": "demo", "messages": messages, **fields})
    assert reply.status_code == 200, reply.text
    return int(reply.json()["count"])


async def verify(system: System, prompt: str, **fields: Any) -> httpx.Response:
    reasoning = {"strategy": "genrm", "n": N, "k": K, "cot": False, "return_samples": True}
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 64,
        "seed": 5,
        "reasoning": reasoning,
        **fields,
    }
    reply = await system.client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply


@pytest.mark.parametrize("one", [True, False], ids=["one worker", "two workers"])
async def test_verifications_compute_their_own_new_tokens_only(system: System, one: bool) -> None:
    prompt = FILLER + f"How many pens does Ada have? (as {'one' if one else 'two'})"
    if one:
        async with system.only("decode-0"):
            spent, reply = await _spent(system, prompt)
    else:
        spent, reply = await _spent(system, prompt)
    samples = reply.json()["reasoning"]["samples"]
    answers = [s for s in samples if s.get("role") != "verification" and s["state"] == "finished"]
    chains = [s for s in samples if s.get("role") == "verification"]
    assert (len(answers), len(chains)) == (N, N * K)
    question = [{"role": "user", "content": prompt}]
    before, new = await length(system, question), {}
    for answer in answers:
        asked = [
            *question,
            {"role": "assistant", "content": answer["text"]},
            {"role": "user", "content": VERIFY},
        ]
        new[answer["index"]] = await length(system, asked) - before - answer["tokens"]
    # An answer computes the prompt's last token; a chain the answer's last token, and what follows it.
    allowed = N + sum(new[chain["of"]] + 2 for chain in chains)
    print(f"\n{spent:.0f} prompt tokens computed, {allowed} allowed, prompt of {before} tokens")
    assert spent <= allowed


async def _spent(system: System, prompt: str) -> tuple[float, httpx.Response]:
    before = await computed(system)
    reply = await verify(system, prompt)
    await system.settled()
    return await computed(system) - before, reply


async def test_nothing_is_kept_after_the_request(system: System) -> None:
    await verify(system, FILLER + "How many boxes?")

    async def nothing() -> bool:
        stats = (await system.stats("decode")).values()
        return not any(worker.get(name, 0) for worker in stats for name in (*HELD, "kept"))

    await system.until(nothing)
