"""The figures of a compressed wire; the run itself is made by hand."""

from __future__ import annotations

import pytest

from benchmarks.codec import RUNS, Answer, figures, table
from kvtransfer.codec import CODECS


def answer(right: bool, text: str = "a", *logprobs: float) -> Answer:
    return Answer(right, text, list(logprobs), "remote", 100)


def test_a_run_is_told_against_the_reference_problem_by_problem() -> None:
    reference = [answer(True, "a", -1.0, -0.5), answer(True), answer(False), answer(False, "b")]
    run = [answer(True, "a", -1.5, -0.5), answer(False, "c", -9.0), answer(False), answer(True, "b")]
    found = figures(run, reference)
    assert (found["right"], found["accuracy"], found["other_text"]) == (2, 0.5, 1)
    assert (found["logprob_apart_mean"], found["logprob_apart_max"]) == (0.25, 0.5)
    assert (found["kv_bytes"], found["remote"], found["mcnemar_p"]) == (100, 4, 1.0)
    low, high = found["difference_ci95"]
    assert low == pytest.approx(-high)
    assert "1 of 4" in [*table({"int8": found}).columns[3].cells]


def test_every_codec_has_a_run_beside_two_without() -> None:
    assert {codec for _, codec in RUNS} == {"none", *CODECS}
    assert [codec for _, codec in RUNS].count("none") == 2
