"""The table that ``braid calibrate`` makes of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from braid.cli import main
from braid.evaluate.calibrate import calibrated, front, levels
from router.efforts import LEVELS, Row, load


def row(name: str, tokens: float, accuracy: float) -> Row:
    return Row(name, {"reasoning": {"strategy": "cot"}}, accuracy, tokens, 1.0)


def entry(tokens: float | None, accuracy: float, **request: Any) -> dict[str, Any]:
    costs = {"completion_tokens": {"per_problem": tokens}, "latency_s": {"p50": 0.5}}
    return {"request": request, "accuracy": accuracy, **costs}


def result(**methods: Any) -> dict[str, Any]:
    return {"model": "demo", "problems": {"count": 9}, "ended": "2026-11-21T10:00:00", "methods": methods}


def test_the_front_has_what_nothing_cheaper_reaches() -> None:
    measured = [
        row("d", 900, 0.9),
        row("b", 50, 0.8),
        row("a", 10, 0.1),
        row("c", 60, 0.79),
        row("e", 50, 0.7),
    ]
    assert [one.name for one in front(measured, 0.0)] == ["a", "b", "d"]


def test_a_gain_within_the_noise_is_not_worth_its_tokens() -> None:
    measured = [row("a", 10, 0.5), row("b", 20, 0.504), row("c", 30, 0.506)]
    assert [one.name for one in front(measured, 0.005)] == ["a", "c"]
    assert [one.name for one in front(measured, 0.0)] == ["a", "b", "c"]


def test_levels_rise_by_equal_factors_of_tokens() -> None:
    found = levels([row("a", 1, 0.1), row("b", 10, 0.2), row("c", 100, 0.3), row("d", 1e6, 0.4)])
    assert [found[level] for level in LEVELS] == ["a", "b", "c", "c", "c", "d", "d"]  # type: ignore[index]
    assert set(levels([row("a", 5, 0.1)]).values()) == {"a"}


def test_auto_itself_and_what_was_never_answered_are_left_out() -> None:
    methods = {
        "auto": entry(1, 1.0, reasoning={"strategy": "auto"}),
        "dead": entry(None, 0.0),
        "plain": entry(9, 0.1, temperature=0),
    }
    table = calibrated(result(**methods), "x.json")
    assert [one.name for one in table.rows] == ["plain"]
    assert table.source == "x.json: 9 problems, braid eval of 2026-11-21"


@pytest.mark.parametrize("wrong", [{}, result(), {"methods": 5}, result(plain={})])
def test_what_is_no_result_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no result|no strategy"):
        calibrated(wrong, "x.json")


def test_the_command_writes_a_table_that_the_router_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "demo.json", tmp_path / "out.json"
    source.write_text(
        json.dumps(result(plain=entry(9, 0.1), cot=entry(50, 0.8, reasoning={"strategy": "cot"})))
    )
    assert main(["calibrate", str(source), "--out", str(out)]) == 0
    assert load(out).levels["max"] == "cot"
    assert "cot" in capsys.readouterr().out
    source.write_text("[]")
    assert main(["calibrate", str(source), "--out", str(out)]) == 2
    assert "no result" in capsys.readouterr().err
