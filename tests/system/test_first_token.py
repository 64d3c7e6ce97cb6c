"""A single sample begins with the token that the prefill worker drew, and is what it would be without."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.system.conftest import System

pytestmark = pytest.mark.system

TAKEN = 'braid_first_tokens_total{outcome="taken"}'
GENERATED = "vllm:generation_tokens_total"
N = 12


async def ask(system: System, number: int, **fields: Any) -> dict[str, Any]:
    """A completion of a prompt that is another one for each number; with where it came from."""
    rng = random.Random(number)
    prompt = [rng.randrange(5, 400) for _ in range(100)]
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": N, "ignore_eos": True}
    body |= {"return_token_ids": True, **fields}
    reply = await system.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return {**reply.json(), "path": reply.headers["x-braid-path"]}


async def taken(system: System) -> float:
    workers = [name for name in await system.workers() if name.startswith("decode")]
    return sum([await system.metric(name, TAKEN) for name in workers])


def tokens(reply: dict[str, Any]) -> list[int]:
    found: list[int] = reply["choices"][0]["token_ids"]
    return found


async def test_a_sample_that_begins_elsewhere_is_the_same_and_one_step_shorter(system: System) -> None:
    async with system.only("decode-0"):
        async with system.without_prefill():
            alone = [await ask(system, seed) for seed in range(4)]
        assert {reply["path"] for reply in alone} == {"local"}
        await system.settled()  # a worker counts just after it answers
        before = await taken(system)
        on_d, on_p = [await system.metric(name, GENERATED) for name in ("decode-0", "prefill-0")]
        replies = [await ask(system, seed) for seed in range(4)]
        assert [tokens(reply) for reply in replies] == [tokens(reply) for reply in alone]
        assert [reply["usage"]["completion_tokens"] for reply in replies] == [N] * 4
        assert [reply["usage"]["prompt_tokens"] for reply in replies] == [100] * 4
        begun = int(await taken(system) - before)
        assert begun  # a late one is drawn on the decode worker
        assert await system.grown("decode-0", GENERATED, on_d, 4 * N - begun) == 4 * N - begun
        assert await system.grown("prefill-0", GENERATED, on_p, 4) == 4


async def test_the_first_token_is_drawn_as_the_client_wants_it(system: System) -> None:
    greedy = await ask(system, 10)
    before = await taken(system)
    sampled = await ask(system, 10, temperature=1.5, top_k=1)
    assert tokens(sampled) == tokens(greedy)
    firsts = {tokens(await ask(system, 10, temperature=2.0, max_tokens=2))[0] for _ in range(16)}
    assert await taken(system) > before
    assert len(firsts) > 1


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"temperature": 1.0, "seed": 5}])
async def test_what_has_to_be_drawn_on_the_decode_worker_is(system: System, fields: dict[str, Any]) -> None:
    before = await taken(system)
    reply = await ask(system, 20, **fields)
    assert reply["path"] == "remote"
    assert len(tokens(reply)) == N
    assert await taken(system) == before


@pytest.mark.parametrize("end", ["length", "stop token", "stop string"])
async def test_a_first_token_that_ends_the_sample_needs_no_step(system: System, end: str) -> None:
    prompt = "Ines has 4 boxes."  # of whole characters: what follows has a text of its own
    first = (await ask(system, 30, prompt=prompt, max_tokens=1))["choices"][0]
    (token,), text = first["token_ids"], first["text"]
    assert text
    ends: dict[str, dict[str, Any]] = {
        "length": {"max_tokens": 1},
        "stop token": {"stop_token_ids": [token]},
        "stop string": {"stop": [text]},
    }
    async with system.only("decode-0"):
        await system.settled()
        before, generated = await taken(system), await system.metric("decode-0", GENERATED)
        replies = [await ask(system, 30, prompt=prompt, **ends[end]) for _ in range(4)]
        begun = int(await taken(system) - before)
        assert begun
        assert await system.grown("decode-0", GENERATED, generated, 4 - begun) == 4 - begun
    for reply in replies:
        choice = reply["choices"][0]
        assert reply["usage"]["completion_tokens"] == 1
        assert choice["finish_reason"] == end.split()[0]
        assert choice["stop_reason"] == {"length": None, "stop token": token, "stop string": text}[end]
        assert choice["text"] == (text if end == "length" else "")
    await system.settled()


async def test_a_stream_counts_its_first_token(system: System) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Count."}], "max_tokens": N}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    before = await taken(system)
    events = []
    async with system.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        events = [line async for line in reply.aiter_lines() if line.startswith("data: {")]
    assert f'"completion_tokens":{N}' in events[-1].replace(" ", "")
    assert await taken(system) >= before
