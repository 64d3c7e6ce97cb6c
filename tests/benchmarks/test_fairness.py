"""Fairness and deadlines: their figures, and a run over simulated workers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from benchmarks import deadlines, fairness
from tests.sim.conftest import Fleet, fleet, make_fleet, make_stand, no_helper_is_left

__all__ = ["fleet", "make_fleet", "make_stand", "no_helper_is_left"]


def test_a_reply_after_the_deadline_is_late_and_one_without_a_reason_is_told() -> None:
    ask = deadlines.Ask(0.0, 4, 1.0, "?", False)
    refused = msgspec.json.encode({"error": {"message": ""}})
    cut = {"samples": [{"state": "finished"}, {"state": "stopped_early"}], "stopped_early": "deadline"}
    answer = msgspec.json.encode({"reasoning": cut, "usage": {"completion_tokens": 9}})
    found = deadlines.figures(
        [deadlines.outcome(ask, 0.2, 504, refused), deadlines.outcome(ask, 0.05, 200, answer)]
    )
    assert (found["late_by_more_than_100_ms"], found["without_answer_or_reason"]) == (1, 1)
    assert found["reasons"] == {"504": 1, "200 deadline": 1}
    assert found["latest_s"] == 0.2


def test_deadlines_span_what_they_are_said_to() -> None:
    asks = deadlines.plan(200, 4.0, 0)
    assert asks == deadlines.plan(200, 4.0, 0)
    assert 0.2 <= min(a.deadline_s for a in asks) < 0.3
    assert 4 < max(a.deadline_s for a in asks) <= 5


def test_ratios_are_of_the_pooled_latencies_and_the_mean_throughput() -> None:
    found = fairness.figures(
        [
            fairness.Phase("alone", 2.0, [1.0, 1.0]),
            fairness.Phase("groups", 2.0, [], 100),
            fairness.Phase("together", 2.0, [3.0, 1.0], 60),
            fairness.Phase("together", 4.0, [3.0], 160),
        ]
    )
    assert (found["p50_ratio"], found["p99_ratio"]) == (3.0, 3.0)
    assert found["groups_keep"] == 35 / 50


def test_only_ended_samples_of_a_stream_count() -> None:
    assert fairness.tokens_in('data: {"reasoning": {"event": "sample", "tokens": 7}}') == 7
    assert fairness.tokens_in('data: {"reasoning": {"tokens": {"total": 9}}}') == 0
    assert fairness.tokens_in("data: [DONE]") == 0


@pytest.mark.slow
async def test_both_run_on_a_live_server_and_say_that_it_is_simulated(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.pairs()
    out = [tmp_path / "deadlines.json", tmp_path / "fairness.json"]
    url = ["--url", fleet.stand.url, "--out"]
    await asyncio.to_thread(deadlines.main, [*url, str(out[0]), "--groups", "8", "--rate", "50"])
    short = ["--seconds", "0.5", "--warm-s", "0.1", "--rest-s", "0", "--repeats", "1", "--rate", "10"]
    await asyncio.to_thread(fairness.main, [*url, str(out[1]), "--groups", "2", "--n", "8", *short])
    late, fair = (msgspec.json.decode(path.read_bytes()) for path in out)
    assert late["simulated"]
    assert fair["simulated"]
    assert len(late["outcomes"]) == 8
    assert late["without_answer_or_reason"] == 0
    assert fair["errors"] == 0
    assert fair["singles_s"]["together"]["count"] == 5
    assert fair["groups_tokens_per_s"]["groups"] > 0
