"""``/v1/responses`` through OpenAI's client, on workers without engines."""

from __future__ import annotations

from typing import Any

import msgspec
import openai
import pytest

from braid import wire
from braid.errors import BadRequest
from router.responses import translate
from tests.router.conftest import Stand
from tests.router.fake_worker import (
    JSON_HEADERS,
    SSE_HEADERS,
    FakeWorker,
    Script,
    decode_fails,
    record,
)
from tests.router.test_reasoning import VOTE, votes

RESPONSES = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": None}


def answers(message: dict[str, Any], finish: str = "stop", **choice: Any) -> Script:
    """A script that answers with one chat completion."""

    async def script(worker: FakeWorker, work: wire.Decode) -> None:
        told = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **choice}
        body = {"object": "chat.completion", "model": "demo", "choices": [told], "usage": USAGE}
        head = wire.Head(work.ref, 200, JSON_HEADERS, record(work))
        await worker.send(head, wire.Body(work.ref, msgspec.json.encode(body), end=True, kv=record(work)))

    return script


USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def streams(*deltas: dict[str, Any], finish: str = "stop", cut: str = "") -> Script:
    """A script that streams these deltas of one choice; ``cut``: it ends before its end."""

    async def script(worker: FakeWorker, work: wire.Decode) -> None:
        chunks: list[dict[str, Any]] = [
            {"model": "demo", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            for delta in ({"role": "assistant", "content": ""}, *deltas)
        ]
        await worker.send(wire.Head(work.ref, 200, SSE_HEADERS, record(work)))
        if not cut:
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            chunks.append({"choices": [], "usage": USAGE})
        for chunk in chunks:
            await worker.send(wire.Body(work.ref, b"data: " + msgspec.json.encode(chunk) + b"\n\n"))
        data = b"" if cut else b"data: [DONE]\n\n"
        await worker.send(wire.Body(work.ref, data, end=True, kv=record(work), cut=cut))

    return script


async def sent(stand: Stand, worker: FakeWorker, **fields: Any) -> dict[str, Any]:
    """The chat body that a Responses body becomes."""
    reply = await stand.post(RESPONSES, {"model": "demo", "input": "hi", **fields})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = msgspec.json.decode((await worker.expect(wire.Decode)).body)
    return body


async def test_a_response_by_the_official_client(stand: Stand) -> None:
    p0, d0 = await stand.workers(decode=answers({"content": "Hello."}))
    reply = await stand.openai().responses.create(
        model="demo",
        instructions="Be brief.",
        input="hi",
        max_output_tokens=9,
        metadata={"a": "b"},
        reasoning={},
        store=False,
    )
    assert (reply.output_text, reply.status, reply.model) == ("Hello.", "completed", "demo")
    assert (reply.instructions, reply.metadata, reply.max_output_tokens) == ("Be brief.", {"a": "b"}, 9)
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (7, 3, 10)
    assert reply.usage.input_tokens_details.cached_tokens == 4
    assert (reply.model_extra or {})["braid"]["path"] == "remote"
    prefill, decode = await p0.expect(wire.Prefill), await d0.expect(wire.Decode)
    assert (prefill.target, prefill.body) == (decode.target, decode.body)  # so both render the same prompt
    assert decode.target == "/v1/chat/completions"
    assert msgspec.json.decode(decode.body) == {
        "model": "demo",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
    }
    assert stand.metric("braid_requests_total", endpoint="responses", outcome="completed") == 1


async def test_a_conversation_with_calls_becomes_messages(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=answers({"content": "x"}))
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"}
    body = await sent(
        stand,
        d0,
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        input=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, image]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
        ],
    )
    user, assistant, tool, last = body["messages"][1:]
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    assert assistant["reasoning"] == "hm"
    assert [call["id"] for call in assistant["tool_calls"]] == ["c1", "c2"]
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "sun"}
    assert last == {"role": "assistant", "content": "ok"}
    assert body["tools"][0]["function"]["name"] == "weather"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


async def test_a_format_and_logprobs_are_asked_for_as_in_chat(stand: Stand) -> None:
    content = [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}]
    _, d0 = await stand.workers(decode=answers({"content": "x"}, logprobs={"content": content}))
    schema = {"type": "object", "properties": {}}
    body = await sent(
        stand,
        d0,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert body["response_format"]["json_schema"] == {"name": "n", "schema": schema, "strict": True}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
    reply = await stand.post(RESPONSES, {"model": "demo", "input": "hi"})
    assert reply.json()["output"][0]["content"][0]["logprobs"] == content


async def test_thinking_and_calls_are_items_of_their_own(stand: Stand) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
    await stand.workers(
        decode=answers({"content": None, "reasoning": "hm", "tool_calls": [call]}, "tool_calls")
    )
    reply = await stand.openai().responses.create(model="demo", input="hi", tools=[WEATHER])  # type: ignore[list-item]
    thought, made = reply.output
    assert thought.type == "reasoning"
    assert thought.content
    assert thought.content[0].text == "hm"
    assert made.type == "function_call"
    assert (made.call_id, made.name, made.arguments) == ("c1", "weather", '{"a": 1}')


async def test_an_answer_cut_at_its_limit_is_incomplete(stand: Stand) -> None:
    await stand.workers(decode=answers({"content": "Hel"}, "length"))
    reply = await stand.openai().responses.create(model="demo", input="hi", max_output_tokens=1)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output_text == "Hel"


async def test_a_stream_has_the_official_events(stand: Stand) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": "{}"}}
    deltas = ({"reasoning": "h"}, {"content": "He"}, {"content": "y"}, {"tool_calls": [call]})
    await stand.workers(decode=streams(*deltas, {"tool_calls": [more]}, finish="tool_calls"))
    stream = await stand.openai().responses.create(model="demo", input="hi", stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Hey"
    assert [item.type for item in last.response.output] == ["reasoning", "message", "function_call"]
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 3
    assert (last.response.model_extra or {})["braid"]["path"] == "remote"


async def test_the_clients_own_accumulator_takes_the_stream(stand: Stand) -> None:
    await stand.workers(decode=streams({"content": "He"}, {"content": "y"}))
    async with stand.openai().responses.stream(model="demo", input="hi") as stream:
        final = await stream.get_final_response()
    assert final.output_text == "Hey"


async def test_a_stream_that_breaks_off_ends_in_a_failed_response(stand: Stand) -> None:
    await stand.workers(decode=streams({"content": "He"}, cut="engine died"))
    stream = await stand.openai().responses.create(model="demo", input="hi", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.output_text == "He"


async def test_a_strategy_works_through_a_response(stand: Stand) -> None:
    await stand.workers(decode=votes(7, 5, 7, 7))
    reply = await stand.openai().responses.create(
        model="demo", input="hi", extra_body={"reasoning": {"effort": "low", **VOTE}}
    )
    assert reply.output_text == "The answer is 7."
    assert reply.reasoning is not None
    assert reply.reasoning.effort == "low"
    assert (reply.reasoning.model_extra or {})["votes"][0]["votes"] == 3
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (7, 20)


async def test_a_streamed_strategy_tells_progress_then_the_answer(stand: Stand) -> None:
    await stand.workers(decode=votes(7, 5, 7, 7))
    body = {"model": "demo+self_consistency:4", "input": "hi", "stream": True}
    async with stand.http.stream("POST", RESPONSES, json=body) as reply:
        lines = [line async for line in reply.aiter_lines() if line.startswith("data: ")]
    events = [msgspec.json.decode(line[6:]) for line in lines]
    told = [event["reasoning"]["event"] for event in events if "reasoning" in event]
    assert told[-1] == "decided"
    assert told.count("sample") >= 3
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["reasoning"]["strategy"] == "self_consistency"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "The answer is 7."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"instructions": 5}, "instructions"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": ["x"]}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0]"),
        ({"stream": "yes"}, "stream"),
        ({"what": 1}, "what"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
    ],
)
def test_what_is_not_kept_here_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        translate({"model": "demo", "input": "hi", **fields})
    assert caught.value.param == param


async def test_what_chat_refuses_is_refused_in_the_words_of_the_request(stand: Stand) -> None:
    _, d0 = await stand.workers()
    refused: dict[str, dict[str, Any]] = {
        "background": {"background": True},
        "tool_choice": {"tool_choice": "required"},
        "text.format": {"text": {"format": {"type": "json_schema"}}},
        "max_output_tokens": {"max_output_tokens": 0},
        "input": {"input": [{"role": "nobody", "content": "x"}]},
        "reasoning.effort": {"reasoning": {"effort": "lots"}},
        "reasoning.n": {"reasoning": {"strategy": "direct", "n": 2}},
    }
    for param, fields in refused.items():
        reply = await stand.post(RESPONSES, {"model": "demo", "input": "hi", **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert d0.got(wire.Decode) == []


async def test_an_engines_error_passes_through(stand: Stand) -> None:
    await stand.workers(decode=decode_fails(400, "too long"))
    with pytest.raises(openai.BadRequestError, match="too long"):
        await stand.openai().responses.create(model="demo", input="hi")
