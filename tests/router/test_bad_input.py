"""Bad input as raw bytes: refused with OpenAI's error body, before any worker hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid import wire
from braid.errors import BadRequest
from router.validate import parse_body, validate
from tests.router.conftest import CHAT, COMPLETIONS, LONG_S, MakeStand, Stand, chat

MARK = "s3cret-input"
"""Is put into refused values: no message may echo it."""


def refused(endpoint: str, body: dict[str, Any]) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        validate(endpoint, parse_body(json.dumps(body).encode()), max_n=8)  # type: ignore[arg-type]
    assert MARK not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  ",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": 1} {"b": 2}',
        b'{"a": "\n"}',
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_a_body_that_is_not_a_strict_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_body(raw)


def test_wide_bodies_are_not_deep() -> None:
    assert parse_body(json.dumps({"a": [[i] for i in range(5000)]}).encode())


TEXT = {"messages": [{"role": "user", "content": MARK}]}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 10**400, "12", 1.5, True]),
        ("max_completion_tokens", [0, -1, 10**400, "12", 1.5, True]),
        ("min_tokens", [-1, True]),
        ("temperature", [-1, 2.1, "1", True, [1]]),
        ("top_p", [0, 1.1, -0.1, False]),
        ("min_p", [-0.1, 1.1]),
        ("top_k", [-2, 1.5, "1"]),
        ("presence_penalty", [3, -3]),
        ("frequency_penalty", [3, -3]),
        ("repetition_penalty", [0, -1]),
        ("n", [0, -1, 9, 10**9, True, 1.0, "2"]),
        ("seed", [1.5, 2**64, "1", True]),
        ("stop", ["", [], [""], [1], 5, ["a"] * 5, "x" * 10**6, {"a": 1}]),
        ("logit_bias", [[], {MARK: 1}, {"-1": 1}, {"1": 101}, {"1": True}, {str(i): 1 for i in range(2000)}]),
        ("stream", ["true", 1]),
        ("stream_options", [{"include_usage": True}, 5]),
        ("top_logprobs", [1, "1", -2]),
        ("logprobs", [1, "yes"]),
        ("tool_choice", ["auto", "required", {"type": "function"}]),
        ("tools", [5, [1], "x"]),
        ("stop_token_ids", [5, [-1], [True]]),
        ("kv_transfer_params", [None, {}, {"remote_host": MARK}]),
        ("ec_transfer_params", [{}]),
        ("kv_hints", [{}]),
        ("request_id", [MARK]),
        ("vllm_xargs", [5, {"kv_transfer_params": MARK}]),
        ("chat_template", [MARK]),
        ("chat_template_kwargs", [5, {"chat_template": MARK}]),
        ("model", ["", 5, "m" * 300]),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        error = refused("chat", {**TEXT, field: value})
        assert field in error.message


def test_stream_options_take_true_or_false_only() -> None:
    refused("chat", {**TEXT, "stream": True, "stream_options": {"include_usage": 1}})


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [5],
        [{}],
        [{"role": MARK, "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_bad_messages_are_refused(messages: object) -> None:
    assert "messages" in refused("chat", {"messages": messages}).message


def test_an_assistant_may_have_tool_calls_instead_of_content() -> None:
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}
    assert validate("chat", body, 8).chars == 0


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [""],
        ["a", 1],
        [1, "a"],
        [1, True],
        [-1],
        [2**40],
        [[1], "a"],
        [[]],
        [[1], []],
        5,
        {},
        ["a"] * 2000,
    ],
)
def test_bad_prompts_are_refused(prompt: object) -> None:
    assert "prompt" in refused("completions", {"prompt": prompt}).message


@pytest.mark.parametrize(
    ("prompt", "prompts", "chars"),
    [("abc", 1, 3), (["ab", "c"], 2, 3), ([1, 2, 3, 4], 1, 4), ([[1, 2], [3]], 2, 3)],
)
def test_prompts_are_counted(prompt: object, prompts: int, chars: int) -> None:
    request = validate("completions", {"prompt": prompt}, 8)
    assert (request.prompts, request.chars) == (prompts, chars)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "response_format",
    [
        5,
        {},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"$ref": "#"}}}}},
        {
            "type": "json_schema",
            "json_schema": {
                "schema": {
                    "$ref": "#/$defs/a",
                    "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"items": {"$ref": "#/$defs/a"}}},
                }
            },
        },
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://peer/schema"}}},
        {"type": "json_schema", "json_schema": {"schema": nested(50)}},
    ],
)
def test_schemas_that_are_missing_recursive_or_too_deep_are_refused(response_format: object) -> None:
    assert "response_format" in refused("chat", {**TEXT, "response_format": response_format}).message


def test_a_schema_may_use_a_definition_twice() -> None:
    properties = {"a": {"$ref": "#/$defs/x"}, "b": {"$ref": "#/$defs/x"}}
    schema = {"properties": properties, "$defs": {"x": {"type": "string"}}}
    body = {
        **TEXT,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }
    assert validate("chat", body, 8)


def test_what_openai_clients_send_is_accepted() -> None:
    body = {
        **TEXT,
        "model": "demo",
        "n": 8,
        "temperature": 0,
        "top_p": 1,
        "stop": ["a", "b", "c", "d"],
        "seed": -1,
        "logprobs": True,
        "top_logprobs": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "logit_bias": {"5": -100},
        "max_tokens": None,
    }
    assert validate("chat", body, 8).n == 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "n",
    "stop",
    "tools",
    "response_format",
    "logit_bias",
    "stream_options",
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from(["chat", "completions"]))
def test_any_object_is_either_valid_or_a_bad_request(body: dict[str, Any], endpoint: str) -> None:
    with contextlib.suppress(BadRequest):
        parsed = parse_body(json.dumps(body).encode())
        validate(endpoint, parsed, 8)  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_any_bytes_are_either_json_or_a_bad_request(raw: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(parse_body(raw), dict)


# Over the socket


async def raw_reply(stand: Stand, data: bytes) -> tuple[int, dict[str, Any]]:
    """The status and error of what a client gets that sends these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
    writer.write(data)
    await writer.drain()
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LONG_S)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = json.loads(await reader.readexactly(length))
    writer.close()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert MARK not in body["error"]["message"]
    return int(head.split(b" ")[1]), body["error"]


def post(body: bytes, *headers: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture
async def strict(make_stand: MakeStand) -> AsyncIterator[Stand]:
    """A router with a small body cap, whose workers must not hear of anything."""
    stand = await make_stand(max_body_bytes=1000)
    p0, d0 = await stand.workers()
    yield stand
    assert not p0.got(wire.Prefill)
    assert not d0.got(wire.Decode)
    assert stand.metric("braid_requests_accepted_total", endpoint="chat") == 0


GOOD = json.dumps(chat()).encode()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(b""), 400),
        (post(b'{"temperature": NaN}'), 400),
        (post(b'{"messages": "\\ud800"}'), 400),
        (post(json.dumps(chat(n=10**6)).encode()), 400),
        (post(json.dumps(chat(model=MARK)).encode()), 404),
        (post(GOOD, path="/v1/nothing"), 404),
        (post(GOOD, path="/v1/models"), 405),
        (b"GET " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (post(b"x" * 1001), 413),
        (post(b"", "content-length: 99999999999999999999"), 413),
        (post(b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n", "transfer-encoding: chunked"), 413),
        (post(GOOD, f"content-length: {len(GOOD)}", "transfer-encoding: chunked"), 400),
        (post(GOOD, f"content-length: {len(GOOD)}", "content-length: 5"), 400),
        (post(GOOD, "content-length: -1"), 400),
        (post(GOOD, "x-request-id: " + "a" * 129), 400),
        (post(GOOD, "x-request-id: a b"), 400),
        (post(GOOD, "x-data-parallel-rank: 0"), 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
    ],
)
async def test_bad_requests_are_refused_in_openais_shape(strict: Stand, data: bytes, status: int) -> None:
    assert (await raw_reply(strict, data))[0] == status


async def test_an_error_of_the_engine_passes_unharmed(stand: Stand) -> None:
    from tests.router.fake_worker import decode_fails

    await stand.workers(decode=decode_fails(400, "8 tokens are over 4"))
    reply = await stand.post(COMPLETIONS, {"model": "demo", "prompt": "hi"})
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": "8 tokens are over 4",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": 400,
    }
