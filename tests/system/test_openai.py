"""What vLLM's OpenAI layer offers comes through unharmed, read by the official client."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.system.conftest import System

pytestmark = pytest.mark.system

QUESTION: list[Any] = [{"role": "user", "content": "Tom has 3 bags with 4 pens each. How many pens?"}]


@pytest.fixture
async def client(system: System) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=system.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_chat_answers_with_usage_and_proof(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=40
    )
    reply = raw.parse()
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0
    assert raw.headers["x-braid-path"] == "remote"
    assert reply.model_extra is not None
    assert reply.model_extra["braid"]["path"] == "remote"


async def test_stream_joins_the_samples_of_two_workers(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        n=4,
        temperature=1,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    ended: set[int] = set()
    usage, proof = None, None
    async for chunk in stream:
        usage = chunk.usage or usage
        proof = (chunk.model_extra or {}).get("braid", proof)
        ended.update(choice.index for choice in chunk.choices if choice.finish_reason)
    assert ended == {0, 1, 2, 3}
    assert usage is not None
    assert usage.completion_tokens <= 4 * 8
    assert proof is not None
    assert set(proof["decode"]) == {"decode-0", "decode-1"}


async def test_logprobs_penalties_and_stop_pass_through(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        temperature=0,
        max_tokens=30,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        stop=["answer"],
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    assert "answer" not in (choice.message.content or "")


async def test_structured_output_holds_for_every_sample(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        n=4,
        temperature=1,
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "[0-9]{3}-[ab]"}},
    )
    for choice in reply.choices:
        assert re.fullmatch("[0-9]{3}-[ab]", choice.message.content or "")


async def test_tools_are_taken_and_their_rules_kept(client: openai.AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    reply = await client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=20, tools=[tool], tool_choice="none"
    )
    assert reply.choices[0].message.content
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=20, tool_choice="required"
        )


async def test_several_prompts_keep_their_order(client: openai.AsyncOpenAI) -> None:
    prompts = ["One two", "Seven eight nine"]
    together = await client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=6)
    alone = [
        await client.completions.create(model="demo", prompt=p, temperature=0, max_tokens=6) for p in prompts
    ]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]


async def test_echo_with_logprobs_is_served_locally(system: System) -> None:
    body = {"model": "demo", "prompt": "One two", "echo": True, "logprobs": 1, "max_tokens": 2}
    reply = await system.client.post("/v1/completions", json=body)
    assert reply.json()["choices"][0]["text"].startswith("One two")
    assert reply.headers["x-braid-path"] == "local"


async def test_errors_of_the_engine_keep_their_status_and_shape(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="demo", prompt=[10**6], max_tokens=2)
    assert caught.value.body is not None
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="demo", prompt=[7] * 9000, max_tokens=2)


async def test_a_seeded_prompt_of_several_chunks_is_served_on_either_path(system: System) -> None:
    body = {"model": "demo", "prompt": [7, 8, 9] * 600, "seed": 1, "temperature": 1.0, "max_tokens": 8}
    remote = await system.client.post("/v1/completions", json=body)
    # `echo` keeps the prompt on the decode worker, where stock vLLM's CPU engine dies of it.
    local = await system.client.post("/v1/completions", json={**body, "echo": True})
    assert remote.status_code == local.status_code == 200
    assert local.headers["x-braid-path"] == "local"
    assert local.json()["choices"][0]["text"].endswith(remote.json()["choices"][0]["text"])


async def test_tokenize_and_models_answer(system: System) -> None:
    models = (await system.client.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["demo"]
    reply = await system.client.post("/tokenize", json={"model": "demo", "prompt": "One two"})
    assert reply.json()["count"] == len(reply.json()["tokens"]) > 0


async def test_a_response_is_prefilled_remotely_and_its_strategies_work(
    system: System, client: openai.AsyncOpenAI
) -> None:
    plain = await client.responses.create(
        model="demo", input="Ines has 4 boxes.", temperature=0, max_output_tokens=8
    )
    chat = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Ines has 4 boxes."}],
        temperature=0,
        max_completion_tokens=8,
    )
    assert plain.output_text == chat.choices[0].message.content
    assert (plain.model_extra or {})["braid"]["path"] == "remote"
    stream = await client.responses.create(
        model="demo",
        input="Ines has 4 boxes with 22 eggs each. How many eggs are there?",
        max_output_tokens=160,
        stream=True,
        extra_body={"reasoning": {"strategy": "self_consistency", "n": 4, "early_stop": False}, "seed": 1},
        extra_headers={"X-Braid-Group": "system-test"},
    )
    last = [event async for event in stream][-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.usage is not None
    assert last.response.usage.output_tokens > 4
    view = (await system.client.get("/v1/groups/system-test")).json()
    assert (view["state"], view["samples"]) == ("completed", {"finished": 4})


async def test_a_verification_counts_its_new_tokens_only(system: System) -> None:
    question = {"role": "user", "content": "Ines has 4 boxes with 22 eggs each. How many eggs are there?"}
    body = {"model": "demo", "messages": [question], "max_tokens": 120, "seed": 3}
    plain = (await system.client.post("/v1/chat/completions", json={**body, "temperature": 1.0})).json()
    genrm = {"strategy": "genrm", "n": 2, "k": 2, "cot": False}
    reply = (await system.client.post("/v1/chat/completions", json={**body, "reasoning": genrm})).json()
    prompt, usage = plain["usage"]["prompt_tokens"], reply["usage"]
    details = usage["prompt_tokens_details"]
    tokens = [one["tokens"] for one in reply["reasoning"]["samples"] if one.get("role") != "verification"]
    assert details["continued_tokens"] == 2 * prompt + sum(tokens)
    assert prompt < usage["prompt_tokens"] < prompt + 2 * 60
