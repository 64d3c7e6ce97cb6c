"""Reasoning effort: passed on to the engine, or a strategy chosen by the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from braid import wire
from braid.errors import BadRequest
from router import efforts
from router.efforts import LEVELS, Row, Table
from router.strategies import auto
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.strategies.scripted import Scripted, ask, sample
from tests.router.test_reasoning import votes

ROWS = [
    Row("plain", {"temperature": 0.0}, 0.1, 10, 0.1),
    Row("cot", {"temperature": 0.0, "reasoning": {"strategy": "cot"}}, 0.7, 50, 0.5),
    Row("vote:4", {"reasoning": {"strategy": "self_consistency", "n": 4}}, 0.8, 200, 1.0),
    Row("vote:16", {"reasoning": {"strategy": "self_consistency", "n": 16}}, 0.9, 800, 2.0),
]
NAMES = ("plain", "plain", "cot", "vote:4", "vote:16", "vote:16", "vote:16")
TABLE = Table("demo", "a test", ROWS, dict(zip(LEVELS, NAMES, strict=True)))  # type: ignore[arg-type]


def table_file(folder: Path, table: Table = TABLE) -> Path:
    (folder / "efforts.json").write_bytes(msgspec.json.encode(table))
    return folder / "efforts.json"


@pytest.mark.parametrize(
    ("level", "bounds", "chosen"),
    [
        ("none", {}, "plain"),
        ("medium", {}, "vote:4"),
        ("high", {}, "vote:16"),
        ("high", {"tokens": 800}, "vote:16"),
        ("high", {"tokens": 799}, "vote:4"),
        ("max", {"seconds": 0.7}, "cot"),
        ("max", {"samples": 8}, "vote:4"),
        ("max", {"greedy": True}, "cot"),
        ("max", {"tokens": 5}, "plain"),
        ("low", {"tokens": 10_000}, "cot"),
    ],
)
def test_effort_and_bounds_choose(level: str, bounds: dict[str, Any], chosen: str) -> None:
    assert TABLE.choose(level, **bounds).row.name == chosen


def test_what_no_row_keeps_is_said() -> None:
    assert "cheapest" in TABLE.choose("max", tokens=5).why
    assert "bounds" in TABLE.choose("max", tokens=60).why
    assert "effort max" in TABLE.choose("max").why


@pytest.mark.parametrize(
    "fields",
    [{"rows": []}, {"rows": ROWS[::-1]}, {"rows": [ROWS[0], ROWS[0]]}, {"levels": {"none": "plain"}}],
)
def test_a_table_that_can_not_be_used_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rows|level"):
        efforts.read(msgspec.json.encode(msgspec.structs.replace(TABLE, **fields)))


def test_a_row_that_can_not_be_run_keeps_the_router_from_starting() -> None:
    for reasoning in ({"strategy": "nope"}, {"strategy": "cot", "n": 3}, {"strategy": "auto"}):
        rows = [Row("plain", {"reasoning": reasoning}, 0.1, 1), *ROWS[1:]]
        with pytest.raises(ValueError, match="row 'plain'"):
            auto.check(msgspec.structs.replace(TABLE, rows=rows))


def test_the_shipped_table_can_be_run() -> None:
    table = efforts.load(None)
    auto.check(table)
    assert table.model == "demo"


async def test_auto_runs_what_it_chooses_and_says_why() -> None:
    shipped = efforts.shipped()
    cheapest = shipped.rows[0]
    sampler = Scripted([sample(i, "The answer is 4.") for i in range(cheapest.reasoning.get("n") or 1)])
    answer, _ = await ask("auto", sampler, effort="none", n=1024)
    assert (answer.report["strategy"], answer.report["then"]) == ("auto", cheapest.reasoning["strategy"])
    told = answer.report["auto"]
    assert (told["chosen"], told["effort"], told["source"]) == (cheapest.name, "none", shipped.source)
    assert told["expected"]["tokens"] == cheapest.tokens


def test_what_the_client_says_wins_over_the_row() -> None:
    assert auto.fields(ROWS[1], {"temperature": 0.5, "top_p": None})["temperature"] == 0.5
    assert auto.fields(ROWS[1], {"temperature": None})["temperature"] == 0.0


@pytest.mark.parametrize(
    ("body", "options", "mode", "left", "level"),
    [
        ({}, None, "pass", None, None),
        ({"reasoning_effort": "low"}, None, "pass", None, "low"),
        ({}, {"effort": "low", "summary": "auto"}, "pass", None, "low"),
        ({}, {"effort": None}, "auto", None, None),
        ({}, {"strategy": "cot", "effort": "low"}, "auto", {"strategy": "cot"}, "low"),
        ({}, {"strategy": "auto", "effort": "low"}, "pass", {"strategy": "auto", "effort": "low"}, None),
        ({"reasoning_effort": "low"}, None, "auto", {"strategy": "auto", "effort": "low"}, None),
        ({}, {"effort": "low", "n": 4}, "auto", {"strategy": "auto", "effort": "low", "n": 4}, None),
    ],
)
def test_effort_goes_to_the_engine_or_to_auto(
    body: dict[str, Any], options: Any, mode: Any, left: Any, level: str | None
) -> None:
    assert efforts.separate(body, options, mode) == left
    assert body.get("reasoning_effort") == level


def test_two_efforts_are_refused() -> None:
    with pytest.raises(BadRequest, match="differ"):
        efforts.separate({"reasoning_effort": "low"}, {"effort": "high"}, "pass")


async def test_an_effort_passes_through_unharmed(stand: Stand) -> None:
    _, d0 = await stand.workers()
    reply = await stand.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "hi"}], reasoning_effort="low"
    )
    assert reply.choices[0].message.content == "d0.0"
    decode = await d0.expect(wire.Decode)
    assert (decode.mode, msgspec.json.decode(decode.body)["reasoning_effort"]) == ("http", "low")


async def test_an_effort_chooses_where_the_operator_says_so(make_stand: MakeStand, tmp_path: Path) -> None:
    stand = await make_stand(effort="auto", effort_table=table_file(tmp_path))
    _, d0 = await stand.workers(decode=votes(7, 5, 7, 7))
    reply = (await stand.post(CHAT, chat(reasoning_effort="medium"))).json()
    assert (reply["reasoning"]["then"], reply["reasoning"]["n"]) == ("self_consistency", 4)
    assert reply["reasoning"]["auto"]["chosen"] == "vote:4"
    assert "reasoning_effort" not in msgspec.json.decode((await d0.expect(wire.Decode)).body)
    bounded = chat(reasoning={"strategy": "auto", "effort": "max", "budget_tokens": 60})
    reply = (await stand.post(CHAT, bounded)).json()
    assert (reply["reasoning"]["then"], reply["reasoning"]["auto"]["chosen"]) == ("cot", "cot")
    assert msgspec.json.decode((await d0.expect(wire.Decode, 2)).body)["temperature"] == 0.0
