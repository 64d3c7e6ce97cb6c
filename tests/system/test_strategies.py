"""Strategies on real engines."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.system.conftest import System

pytestmark = pytest.mark.system


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 96,
        "seed": 3,
        **fields,
    }


def question(problem: dict[str, str]) -> str:
    return problem["question"]


async def test_self_consistency_votes_over_both_workers(
    system: System, problems: list[dict[str, str]]
) -> None:
    request = body(
        question(problems[0]), reasoning={"strategy": "self_consistency", "n": 8, "early_stop": False}
    )
    reply = await system.client.post("/v1/chat/completions", json=request)
    report = reply.json()["reasoning"]
    assert [sample["state"] for sample in report["samples"]] == ["finished"] * 8
    assert sum(vote["votes"] for vote in report["votes"]) <= 8
    assert reply.json()["usage"]["completion_tokens"] == sum(s["tokens"] for s in report["samples"])
    assert reply.headers["x-braid-kv-transfers"] == "2"


async def test_the_model_suffix_and_the_field_give_the_same(
    system: System, problems: list[dict[str, str]]
) -> None:
    by_field = body(question(problems[1]), reasoning={"strategy": "best_of_n", "n": 4})
    by_name = body(question(problems[1])) | {"model": "demo+best_of_n:4"}
    answers = [
        (await system.client.post("/v1/chat/completions", json=request)).json()["choices"][0]["message"]
        for request in (by_field, by_name)
    ]
    assert answers[0]["content"] == answers[1]["content"]


async def test_a_decided_vote_cancels_the_rest_and_counts_their_tokens(
    system: System, problems: list[dict[str, str]]
) -> None:
    stopped = 0
    # Every answer is the same word, so the vote is decided by the ninth of sixteen.
    vote = {"strategy": "self_consistency", "n": 16, "extractor": "regex", "pattern": "(answer)"}
    for problem in problems[:8]:
        request = body(question(problem), reasoning=vote)
        reply = (await system.client.post("/v1/chat/completions", json=request)).json()
        samples = reply["reasoning"]["samples"]
        assert reply["usage"]["completion_tokens"] == sum(s["tokens"] for s in samples)
        stopped += sum(s["state"] == "stopped_early" for s in samples)
    assert stopped > 0
    await system.settled()


async def test_two_requests_of_one_id_do_not_end_each_other(
    system: System, problems: list[dict[str, str]]
) -> None:
    """A decided vote cancelled samples of whoever had sent the same ``x-request-id``."""
    vote = {"strategy": "self_consistency", "n": 16, "extractor": "regex", "pattern": "(answer)"}
    named = {"x-request-id": "one-of-two"}
    long = body("x", n=16, temperature=1.0, max_tokens=400, ignore_eos=True)
    plain = asyncio.create_task(system.client.post("/v1/chat/completions", json=long, headers=named))
    stopped = 0
    while not plain.done():
        request = body(question(problems[3]), reasoning=vote)
        reply = await system.client.post("/v1/chat/completions", json=request, headers=named)
        stopped += sum(s["state"] == "stopped_early" for s in reply.json()["reasoning"]["samples"])
    assert stopped > 0
    assert {choice["finish_reason"] for choice in (await plain).json()["choices"]} == {"length"}


@pytest.mark.parametrize("n", [1, 5])
async def test_what_only_the_engine_can_judge_is_refused_with_its_reason(system: System, n: int) -> None:
    """A vote said 502, "every sample failed"."""
    request = body("x", reasoning={"strategy": "self_consistency", "n": n}, logit_bias={"99999999": 1})
    reply = await system.client.post("/v1/chat/completions", json=request)
    assert reply.status_code == 400
    assert "99999999" in reply.json()["error"]["message"]
    await system.settled()


async def test_progress_is_streamed_before_the_answer(system: System, problems: list[dict[str, str]]) -> None:
    request = body(question(problems[2]), reasoning={"strategy": "self_consistency", "n": 4}, stream=True)
    events = []
    async with system.client.stream("POST", "/v1/chat/completions", json=request) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    kinds = [event.get("reasoning", {}).get("event") for event in events]
    assert "sample" in kinds
    last = next(e for e in events if e["choices"] and e["choices"][0]["finish_reason"])
    assert last["reasoning"]["strategy"] == "self_consistency"
    assert last["braid"]["path"] == "remote"
