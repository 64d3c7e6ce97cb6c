from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.sampler import Sample
from router.toolcalls import MAX_ARGUMENTS, MAX_CALLS, TOOL_PARTS, ToolPart, called, read
from tests.router.strategies.scripted import Scripted, ask, sample


def choice(*calls: tuple[Any, Any]) -> dict[str, Any]:
    """A chat choice that makes these calls: names and arguments."""
    told = [
        {"id": f"call-{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"message": {"role": "assistant", "content": None, "tool_calls": told}}


def key(made: dict[str, Any], part: ToolPart) -> str | None:
    found = read(made, part)
    return None if found is None else found[1]


def test_what_is_compared() -> None:
    made = choice(("weather", '{"city": "Bern", "days": 2}'))
    assert read(made, "tool_name") == ("weather", 'tool_name:["weather"]')
    assert (read(made, "tool_arguments") or ("",))[0] == '{"city":"Bern","days":2}'
    assert (read(made, "tool_call") or ("",))[0] == 'weather({"city":"Bern","days":2})'


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}'),
        ('{"a": 1.0}', '{"a": 1}'),
        ('{"a": 1e3}', '{"a": 1000}'),
        ('{"a": "\\u00e9"}', '{"a": "é"}'),
        ("{}", ""),
        ("{}", None),
    ],
)
def test_arguments_are_equal_as_values(one: str, other: str | None) -> None:
    assert key(choice(("f", one)), "tool_call") == key(choice(("f", other)), "tool_call") is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [('{"a": "B"}', '{"a": "b"}'), ('{"a": 1}', '{"a": "1"}'), ('{"a": [1, 2]}', '{"a": [2, 1]}')],
)
def test_arguments_that_differ_are_told_apart(one: str, other: str) -> None:
    assert key(choice(("f", one)), "tool_arguments") != key(choice(("f", other)), "tool_arguments")


def test_the_order_of_parallel_calls_does_not_matter() -> None:
    calls = (("f", "{}"), ("g", '{"a": 1}'))
    for part in ("tool_name", "tool_arguments", "tool_call"):
        assert key(choice(*calls), part) == key(choice(*calls[::-1]), part)  # type: ignore[arg-type]
    assert key(choice(("f", "{}"), ("f", "{}")), "tool_name") != key(choice(("f", "{}")), "tool_name")


@pytest.mark.parametrize(
    "arguments",
    ['{"a": 1', "[1,", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, '"' + "a" * MAX_ARGUMENTS + '"', 7],
)
def test_arguments_that_are_not_json_have_a_name_only(arguments: Any) -> None:
    made = choice(("f", arguments))
    assert key(made, "tool_name") is not None
    assert key(made, "tool_call") is key(made, "tool_arguments") is None


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"message": None},
        {"message": {"tool_calls": None}},
        {"message": {"tool_calls": []}},
        {"message": {"tool_calls": ["f"]}},
        {"message": {"tool_calls": [{"function": {}}]}},
        {"text": "f()"},
        choice(("", "{}")),
        choice((None, "{}")),
        choice(*[("f", "{}")] * (MAX_CALLS + 1)),
    ],
)
def test_what_is_no_call_has_no_vote(made: dict[str, Any]) -> None:
    assert all(key(made, part) is None for part in TOOL_PARTS)  # type: ignore[arg-type]


LEAF = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text()
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.booleans())
def test_spelling_does_not_matter(value: dict[str, Any], ascii_only: bool) -> None:
    plain = json.dumps(value)
    other = json.dumps(dict(reversed(value.items())), ensure_ascii=ascii_only, indent=1)
    assert key(choice(("f", plain)), "tool_call") == key(choice(("f", other)), "tool_call") is not None


# Votes


def calling(index: int, name: str, arguments: str, text: str = "") -> Sample:
    made = sample(index, text)
    return Sample(index, "finished", text, "tool_calls", made.tokens, made.logprob, choice((name, arguments)))


@pytest.mark.parametrize(
    ("extractor", "winner"),
    [
        ("tool_name", "weather"),
        ("tool_arguments", '{"q":"Bern"}'),
        ("tool_call", 'search({"q":"Bern"})'),
        ("auto", 'search({"q":"Bern"})'),
    ],
)
async def test_votes_over_tool_calls(extractor: str, winner: str) -> None:
    samples = [
        calling(0, "search", '{"q": "Bern"}'),
        calling(1, "weather", '{"q": "Basel"}'),
        calling(2, "weather", '{"q": "Bern"}'),
        calling(3, "search", '{"q":"Bern"}'),
        calling(4, "weather", '{"q": "Chur"}'),
    ]
    assert all(called(one.choice) for one in samples)
    answer, _ = await ask("self_consistency", Scripted(samples), extractor=extractor, early_stop=False)
    assert answer.report["answer"] == winner
    assert answer.choice["message"]["tool_calls"]


async def test_a_sample_that_calls_no_tool_does_not_vote_on_tools() -> None:
    samples = [sample(0, "4"), sample(1, "4"), calling(2, "weather", "{}", text="4")]
    answer, _ = await ask("self_consistency", Scripted(samples), extractor="tool_name")
    assert (answer.report["answer"], answer.report["confidence"]) == ("weather", 1.0)
    answer, _ = await ask("self_consistency", Scripted(samples), extractor="last_number", early_stop=False)
    assert answer.report["votes"][0]["votes"] == 3, "a text extractor reads texts only"
