"""Counting what losers cost: the journal's reading, the decisive sample, the figures, the repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cancel, repeat
from benchmarks.counted import Ended, Late, journal, late_samples


def ended(number: int, steps: int, others: dict[int, int] | None = None, group: str = "g") -> Ended:
    def name(one: int) -> str:
        return f"chatcmpl-{group}-{one}-0a1b2c3d"

    then = {name(one): count for one, count in (others or {}).items()}
    return Ended(name(number), others is None, steps, steps, then)


def late_steps(ended: list[Ended], request: str, decided_by: int | None) -> list[int]:
    return [late.steps for late in late_samples(ended, request, decided_by)]


def test_steps_after_the_decision_are_those_of_the_others_alone() -> None:
    group = [ended(0, 10, {1: 10, 2: 9}), ended(1, 12, {2: 11}), ended(2, 13), ended(3, 5)]
    assert late_steps(group, "g", 0) == [2, 4]
    assert late_steps(group, "g", 1) == [2]
    assert late_steps(group, "g", None) == []


def test_groups_are_told_apart_and_an_unknown_sample_is_an_error() -> None:
    both = [ended(0, 10, {}), ended(0, 10, {1: 4}, "gg"), ended(1, 9, group="gg")]
    assert late_steps(both, "g", 0) == []
    assert late_steps(both, "gg", 0) == [5]
    with pytest.raises(LookupError, match="sample 7"):
        late_steps(both, "g", 7)


def test_a_journal_is_read_up_to_a_torn_line(tmp_path: Path) -> None:
    line = json.dumps({"id": "a-0-ff", "aborted": True, "steps": 3, "tokens": 2})
    (tmp_path / "1.jsonl").write_text(f'{line}\n{{"id": "b')
    (tmp_path / "2.jsonl").write_text(f"{line}\n")
    assert journal(tmp_path) == [Ended("a-0-ff", True, 3, 2)] * 2


def sample(index: int, votes: dict[str, list[int]], state: str = "finished") -> dict[str, Any]:
    standing = [{"answer": a, "votes": len(i), "weight": len(i), "samples": i} for a, i in votes.items()]
    return {"event": "sample", "index": index, "state": state, "votes": standing}


def test_the_decisive_sample_is_the_first_after_which_nothing_can_change() -> None:
    events = [sample(3, {"7": [3]}), sample(0, {"7": [0, 3]}), sample(2, {"7": [0, 2, 3]})]
    assert cancel.decisive(events, 4) == 2
    assert cancel.decisive(events, 8) is None
    split = [sample(0, {"7": [0]}), sample(1, {"7": [0], "8": [1]}), sample(2, {"7": [0, 2], "8": [1]})]
    assert cancel.decisive(split, 3) is None, "it took the last one"


def test_figures_are_of_the_losers_of_groups_that_were_decided_early() -> None:
    told = {"n": 3, "temperature": 1.0, "early": True, "error": "", "tokens": 30}
    late = [Late(1, True, 2), Late(2, False, 4), Late(3, False, 0)]
    groups = [{**told, "late": late}, {**told, "late": []}, {**told, "late": late, "error": "x"}]
    row = cancel.figures(3, 1.0, True, groups)
    assert (row["groups"], row["with_losers"], row["losers"], row["cancelled"]) == (2, 1, 2, 1)
    assert (row["steps_of_a_loser"]["p50"], row["steps_of_a_loser"]["max"]) == (3.0, 4)
    assert (row["steps_of_a_cancelled"]["max"], row["steps_of_a_group"]["max"]) == (2, 6)
    assert cancel.figures(3, 1.5, True, groups)["groups"] == 0


def group(answer: str, *samples: str) -> dict[str, Any]:
    voted = [[i, "finished", one, 9] for i, one in enumerate(samples)]
    return {"problem": "p", "answer": answer, "votes": [[answer, 2]], "samples": voted, "workers": 1}


def test_equal_groups_are_counted_and_others_listed() -> None:
    first = {"decode": 1, "all": [group("1", "1", "2"), group("3", "3")], "early": [group("1"), group("3")]}
    other = {
        "decode": 2,
        "all": [group("1", "1", "4"), group("3", "3")],
        "early": [group("1", "1"), group("3")],
    }
    found = repeat.compare(first, other)
    assert (found["groups"], found["equal"], found["equal_answers"]) == (2, 1, 2)
    assert [(one["run"], one["other"]["samples"][1][2]) for one in found["differ"]] == [("all", "4")]


def test_a_failed_group_is_not_equal_to_itself() -> None:
    failed = {"decode": 1, "all": [{"problem": "p", "error": "x"}], "early": [{"problem": "p", "error": "x"}]}
    found = repeat.compare(failed, failed)
    assert (found["equal"], found["equal_answers"], len(found["differ"])) == (0, 0, 2)
