from __future__ import annotations

from typing import Any

import pytest

from braid.errors import BadRequest
from router.checks import MAX_JSON, conforms, matches

FIELD = "reasoning.accept_schema"
NUMBERS = {"type": "array", "items": {"type": "integer"}}


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("[1, 2]", True),
        (" [1]\n", True),
        ('[1, "2"]', False),
        ("[1, 2", False),
        ("Here: [1]", False),
        ("Here:\n```json\n[1]\n```\nDone.", True),
        ("```\n[1]\n```\n```json\n{}\n```", False),
        ("<think>[]</think>[1]", True),
        ("<think>[1]", False),
        ("[" * 100_000, False),
        ("[" + " " * MAX_JSON + "]", False),
    ],
)
async def test_a_text_conforms_or_not(text: str, fits: bool) -> None:
    assert await conforms(NUMBERS, text, FIELD) is fits


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "https://example.com/other.json"},
        {"$ref": "#/$defs/absent"},
        {"pattern": "("},
    ],
)
async def test_what_is_no_schema_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        await conforms(schema, '"text"', FIELD)
    assert caught.value.param == FIELD


async def test_a_reference_inside_is_followed() -> None:
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    assert await conforms(schema, "1", FIELD)
    assert not await conforms(schema, '"1"', FIELD)


async def test_a_pattern_that_runs_away_is_stopped_and_the_next_check_works() -> None:
    with pytest.raises(BadRequest, match="too long"):
        await conforms({"pattern": "^(a+)+$"}, '"' + "a" * 64 + '!"', FIELD)
    assert await conforms({}, "1", FIELD)


async def test_a_pattern_is_looked_for_outside_the_thinking() -> None:
    assert await matches("^b", "<think>a</think>b", "reasoning.accept_regex")
    assert not await matches("a", "<think>a</think>b", "reasoning.accept_regex")
    assert await matches("", "b", "reasoning.accept_regex"), "an empty match is one"
    with pytest.raises(BadRequest) as caught:
        await matches("(", "", "reasoning.accept_regex")
    assert caught.value.param == "reasoning.accept_regex"
