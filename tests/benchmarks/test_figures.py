"""Percentiles, counters, prompts, and what is paired with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.machine import Load, LoadMeter, describe_machine
from benchmarks.measure import FanoutRecord, HandoverRecord
from benchmarks.prometheus import difference, totals
from benchmarks.prompts import Prompts, ascii_tokens
from benchmarks.report import (
    fanout_figures,
    fanout_table,
    handover_figures,
    handover_table,
    number,
    quiet_rounds,
    unequal_nice,
)
from benchmarks.stats import median_interval, summary


def test_summary_of_a_hundred_and_one_values() -> None:
    found = summary([float(value) for value in range(100, -1, -1)])
    assert (found["min"], found["p50"], found["p95"], found["max"], found["iqr"]) == (0, 50, 95, 100, 50)
    assert found["p50_ci95"] == [40, 61]


def test_summary_lies_between_ranks() -> None:
    assert summary([1.0, 2.0])["p50"] == 1.5
    assert summary([3.0])["p95"] == 3.0
    assert summary([])["p50"] is None


def test_the_interval_of_few_values_is_their_range() -> None:
    assert median_interval([1.0, 2.0, 3.0]) == [1.0, 3.0]


def test_totals_sum_labels_and_leave_out_buckets() -> None:
    page = (
        "# HELP vllm:nixl_bytes x\n"
        'vllm:nixl_bytes_sum{engine="0"} 4.0\n'
        'vllm:nixl_bytes_sum{engine="1"} 3e2\n'
        'vllm:nixl_bytes_bucket{le="1"} 9\n'
        "vllm:nixl_bytes_created 9\n"
        "other 1\n"
        "braid_kv_bytes_total 7\n"
    )
    assert totals(page, ("vllm:nixl_", "braid_")) == {
        "vllm:nixl_bytes_sum": 304.0,
        "braid_kv_bytes_total": 7.0,
    }


def test_difference_keeps_what_changed() -> None:
    assert difference({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 5.0, "c": 1.0}) == {"b": 3.0, "c": 1.0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    vocabulary = {"<end>": 0, "a": 1, "\u0120b": 2, "\u00c3": 3, "\u010a": 4, "c": 5}
    content = {"added_tokens": [{"id": 0}], "model": {"vocab": vocabulary}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


def test_only_whole_printable_characters_are_drawn(model: Path) -> None:
    assert ascii_tokens(model / "tokenizer.json") == [1, 2, 5]


def test_a_prompt_repeats_for_its_key_alone(model: Path) -> None:
    prompts = Prompts(model, seed=1)
    prompt = prompts.draw("x", 1, length=50)
    assert prompt == prompts.draw("x", 1, length=50)
    assert prompt != prompts.draw("x", 2, length=50)
    assert prompt != Prompts(model, seed=2).draw("x", 1, length=50)
    assert len(prompt) == 50


def handover(stack: str, number: int, ttft_s: float | None, text: str = "t") -> HandoverRecord:
    load = Load(wall_s=1.0, stack=1.0, others=0.5 if number else 0.0, nice=0.1)
    return HandoverRecord(
        stack,
        number,
        0,
        100,
        ttft_s=ttft_s,
        total_s=ttft_s and ttft_s + 0.010,
        text=text,
        error="" if ttft_s else "e",
        turn=load,
    )


RECORDS = [
    *(handover("plain", 0, 0.010), handover("plain", 1, 0.020), handover("plain", 2, None)),
    *(handover("braid", 0, 0.015), handover("braid", 1, 0.040, "u"), handover("braid", 2, 0.9)),
]


def test_handover_is_paired_by_prompt() -> None:
    plain, braid = handover_figures(RECORDS)
    assert (plain["stack"], plain["errors"], plain["ttft_ms"]["count"]) == ("plain", 1, 2)
    assert braid["handover_ms"]["count"] == 2
    assert braid["handover_ms"]["p50"] == pytest.approx(12.5)
    assert braid["over_plain_p50"] == pytest.approx(25.0)
    assert braid["ttft_ratio"]["p50"] == pytest.approx((1.5 + 2) / 2)
    assert braid["total_ratio"]["p50"] == pytest.approx((25 / 20 + 50 / 30) / 2)
    assert braid["same_text"] == 1


def test_quiet_rounds_leave_out_a_loud_round_for_every_stack() -> None:
    assert {record.round for record in quiet_rounds(RECORDS, 0.25)} == {0}
    assert quiet_rounds(RECORDS, 0.45) == RECORDS


def test_the_path_that_replies_tell_is_counted() -> None:
    record = handover("braid", 0, 0.1)
    record.headers = {"x-braid-path": "remote"}
    assert handover_figures([record, record])[0]["paths"] == {"remote": 2}
    assert "remote 2" in handover_table(handover_figures([record, record]))


def test_a_stack_at_another_nice_value_is_pointed_out() -> None:
    plain, braid = handover("plain", 0, 0.1), handover("braid", 0, 0.1)
    assert unequal_nice(handover_figures([plain, braid])) == ""
    assert braid.turn is not None
    braid.turn.stack_nice = 19
    assert "{'plain': [0], 'braid': [19]}" in unequal_nice(handover_figures([plain, braid]))


def test_fanout_reads_headers_and_counters() -> None:
    nixl = FanoutRecord("nixl", 0, 0, 4, 1000, wall_s=0.5, completion_tokens=128)
    nixl.counters = {
        "decode/vllm:nixl_bytes_transferred_count": 4.0,
        "decode/vllm:nixl_bytes_transferred_sum": 8e6,
    }
    braid = FanoutRecord("braid", 0, 1, 4, 1000, wall_s=0.2, completion_tokens=128)
    braid.headers = {"x-braid-kv-transfers": "1", "x-braid-kv-bytes": "2000000"}
    failed = FanoutRecord("braid", 1, 1, 4, 1000, error="x")
    first, second = fanout_figures([nixl, braid, failed])
    assert (first["stack"], first["transfers"], first["bytes"], first["errors"]) == ("braid", 1, 2e6, 1)
    assert (second["transfers"], second["bytes"], second["expired_leases"]) == (4, 8e6, 0)
    assert fanout_table([first, second]).count("\n") == 2


def test_numbers_have_three_digits_or_a_dash() -> None:
    assert [number(value) for value in (None, 1.234, -5.0, 123.4)] == ["-", "1.2", "-5.0", "123"]


def test_the_machine_is_described_without_its_name() -> None:
    assert set(describe_machine()) == {"processor", "cores", "memory_gib", "kernel", "load_average"}


def test_the_meter_tells_own_from_others() -> None:
    meter = LoadMeter()
    sum(range(3_000_000))
    load = meter.read()
    assert load.stack > 0
    assert load.others >= 0
