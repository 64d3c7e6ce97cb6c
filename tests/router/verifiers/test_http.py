"""Verifiers behind HTTP, against a real server on loopback."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from braid import services
from braid.errors import BadRequest
from router.metrics import Metrics
from router.strategies.options import ManyOptions
from router.strategies.scored import Scored
from router.verifiers import Check, Verifier, Verifiers
from router.verifiers.base import check
from tests.router.strategies.scripted import Scripted, sample
from tests.router.verifiers.chains import CHAT, run_of, scores
from tests.router.web import Answer, Web, always, http, never

pytestmark = pytest.mark.slow

Make = Callable[..., Awaitable[tuple[Verifier, Web]]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes a configured verifier and the server that it asks."""
    async with AsyncExitStack() as stack:

        async def made(answer: Answer, kind: str = "http", **fields: Any) -> tuple[Verifier, Web]:
            web = await stack.enter_async_context(Web(answer))
            table = {"kind": kind, "url": web.url, **fields}
            settings: Any = {"http": services.HttpVerifier, "score": services.ScoreVerifier}[kind](**table)
            verifiers = Verifiers({"judge": settings}, Metrics())
            stack.push_async_callback(verifiers.aclose)
            return verifiers.get("judge"), web

        yield made


async def test_each_sample_is_sent_with_its_prompt_and_answer(make: Make) -> None:
    verifier, web = await make(always(http({"score": 0.5})))
    one = Scored(sample(0, "<think>hm</think>The answer is 4."), "4", "=4")
    body = {**CHAT, "model": "m", "temperature": 1.0, "cache_salt": "secret"}
    assert await verifier.score(run_of(Scripted([sample(0)])), body, [one]) == [0.5]
    assert web.asked[0].payload == {**CHAT, "model": "m", "answer": "The answer is 4.", "extracted": "4"}


async def test_a_completion_is_sent_with_its_prompt(make: Make) -> None:
    verifier, web = await make(always(http({"score": 1})))
    assert await scores(verifier, ["4"], body={"prompt": "2+2="}) == [1.0]
    assert web.asked[0].payload == {"prompt": "2+2=", "answer": "4", "extracted": None}


@pytest.mark.parametrize(
    "reply", [{"score": 1.01}, {"score": -0.1}, {"score": True}, {"score": None}, {}, []]
)
async def test_what_is_no_score_leaves_it_unknown(make: Make, reply: Any) -> None:
    verifier, _ = await make(always(http(reply)))
    assert await scores(verifier, ["a"]) == [None]


async def test_a_failure_costs_its_own_sample_only(make: Make) -> None:
    async def answer(payload: Any) -> bytes:
        return http({"score": 0.25} if payload["answer"] != "b" else {"error": "x"}, 200)

    verifier, _ = await make(answer)
    assert await scores(verifier, ["a", "b", "c"]) == [0.25, None, 0.25]


async def test_its_words_are_the_reason(make: Make) -> None:
    verifier, _ = await make(always(http({"score": 0, "feedback": "Line 2 is wrong."})))
    told = await check(verifier, run_of(Scripted([sample(0)])), CHAT, [Scored(sample(0, "a"))])
    assert told == [Check(0.0, "Line 2 is wrong.")]


async def test_the_runs_deadline_bounds_the_call(make: Make) -> None:
    verifier, _ = await make(never, timeout_s=60)
    run = run_of(Scripted([sample(0)]), ManyOptions(n=1, deadline_s=0.1))
    async with asyncio.timeout(60):
        assert await scores(verifier, ["a", "b"], run) == [None, None]
    assert run.left_s == 0


# An engine's score and pooling endpoints


def scored(value: float) -> bytes:
    data = [{"index": 0, "object": "score", "score": value}]
    return http({"id": "x", "object": "list", "model": "rm", "data": data, "usage": {"prompt_tokens": 3}})


def pooled(value: Any) -> bytes:
    return http({"object": "list", "data": [{"index": 0, "object": "pooling", "data": value}]})


async def test_a_score_is_of_question_and_answer(make: Make) -> None:
    verifier, web = await make(always(scored(0.75)), "score", model="rm")
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]}
    assert await scores(verifier, ["4"], body=body) == [0.75]
    assert web.asked[0].payload == {"model": "rm", "text_1": "2+2?", "text_2": "4"}


async def test_the_trigger_is_no_part_of_the_question(make: Make) -> None:
    verifier, web = await make(always(scored(0.75)), "score")
    options = ManyOptions(n=1)
    body = {"messages": [{"role": "user", "content": f"2+2?\n{options.trigger}"}]}
    await scores(verifier, ["4"], run_of(Scripted([sample(0)]), options), body)
    assert web.asked[0].payload["text_1"] == "2+2?"


async def test_pooling_gets_the_conversation(make: Make) -> None:
    verifier, web = await make(always(pooled([2.0])), "score", api="pooling", activation="sigmoid")
    assert await scores(verifier, ["4"]) == [pytest.approx(1 / (1 + math.exp(-2)))]
    assert web.asked[0].payload == {"messages": [*CHAT["messages"], {"role": "assistant", "content": "4"}]}


async def test_pooling_of_a_completion_gets_one_text(make: Make) -> None:
    verifier, web = await make(always(pooled([0.5])), "score", api="pooling")
    assert await scores(verifier, [" 4"], body={"prompt": "2+2="}) == [0.5]
    assert web.asked[0].payload == {"input": "2+2= 4"}


STEPS = [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]


@pytest.mark.parametrize(
    ("steps", "score"), [("last", 0.8), ("min", 0.1), ("mean", 1.4 / 3), ("product", 0.04)]
)
async def test_rewards_of_steps_become_one(make: Make, steps: str, score: float) -> None:
    verifier, _ = await make(always(pooled(STEPS)), "score", api="pooling", steps=steps)
    assert await scores(verifier, ["4"]) == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("data", "score"), [([0.25], 0.25), ([0.75, 0.25], 0.25), ([[0.25]], 0.25), ([1], 1.0), ([0], 0.0)]
)
async def test_one_number_or_two_classes_are_a_reward(make: Make, data: Any, score: float) -> None:
    verifier, _ = await make(always(pooled(data)), "score", api="pooling")
    assert await scores(verifier, ["4"]) == [score]


@pytest.mark.parametrize(
    "data", [[0.1, 0.2, 0.3], [[0.1, 0.2, 0.3]], [0.1, [0.2]], [], [[]], "AAAA", [1.5], [-1]]
)
async def test_what_is_no_reward_leaves_it_unknown(make: Make, data: Any) -> None:
    verifier, _ = await make(always(pooled(data)), "score", api="pooling")
    assert await scores(verifier, ["4"]) == [None]


@pytest.mark.parametrize("value", [-1000.0, 1000.0, 0.0])
async def test_any_logit_is_a_score(make: Make, value: float) -> None:
    verifier, _ = await make(always(scored(value)), "score", activation="sigmoid")
    [score] = await scores(verifier, ["4"])
    assert score == pytest.approx({-1000.0: 0.0, 1000.0: 1.0, 0.0: 0.5}[value])


@pytest.mark.parametrize(
    "reply", [http({"data": []}), http({"data": [{"score": 1}] * 2}), http("", 500), None]
)
async def test_an_engine_that_fails_leaves_it_unknown(make: Make, reply: bytes | None) -> None:
    verifier, _ = await make(always(reply), "score")
    assert await scores(verifier, ["4"]) == [None]


async def test_a_prompt_that_cannot_be_read_is_refused_before_anything_is_asked(make: Make) -> None:
    verifier, web = await make(always(scored(1.0)), "score")
    with pytest.raises(BadRequest):
        await scores(verifier, ["4"], body={"prompt": [1, 2, 3]})
    assert web.asked == []
