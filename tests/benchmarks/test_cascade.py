"""The cascade benchmark's arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.cascade import LARGE, PARAMETERS, SMALL, Outcome, calibrate, cascade, figures, judged_alone
from benchmarks.placement import Cell, request
from router import strategies


def small(score: float, right: bool) -> Outcome:
    return Outcome(right, 0.1, {SMALL: 10}, score)


def large(right: bool) -> Outcome:
    return Outcome(right, 0.2, {LARGE: 10})


def test_the_cheapest_threshold_that_loses_nothing_is_taken() -> None:
    scores = [small(0.9, True), small(0.8, True), small(0.6, False), small(0.3, False)]
    found = calibrate(scores, [large(True)] * 4)
    assert (found["threshold"], found["right"], found["right_alone"]) == (0.8, 4, 4)
    ratio = PARAMETERS[SMALL] / PARAMETERS[LARGE]
    assert found["cost_share"] == pytest.approx(0.5 + ratio)


def test_a_small_model_that_is_right_where_the_large_one_is_not_may_be_asked_more() -> None:
    scores = [small(0.9, True), small(0.8, False), small(0.7, True)]
    assert calibrate(scores, [large(False), large(True), large(True)])["threshold"] == 0.7


def test_some_slack_takes_a_cheaper_threshold_and_none_that_fits_is_said() -> None:
    scores = [small(0.9, True), small(0.5, False), small(0.4, True), small(0.3, True)]
    assert calibrate(scores, [large(True)] * 4)["threshold"] == 0.9
    assert calibrate(scores, [large(True)] * 4, slack=0.25)["threshold"] == 0.3
    wrong = calibrate([small(1.0, False)], [large(True)])
    assert (wrong["threshold"], wrong["cost_share"], wrong["right"]) == (1.0, None, None)


def test_figures_count_both_models_and_compare_on_the_same_problems() -> None:
    base = [large(True), large(False)]
    mixed = [Outcome(True, 0.1, {SMALL: 10}, accepted=True), Outcome(True, 0.3, {SMALL: 10, LARGE: 20})]
    told = figures(mixed, base, [0.4])
    assert (told["right"], told["accepted"], told["tokens"]) == (2, 1, {SMALL: 20, LARGE: 20})
    assert told["parameter_tokens"] == 20 * sum(PARAMETERS.values())
    assert told["cost_share"] == pytest.approx(1 + PARAMETERS[SMALL] / PARAMETERS[LARGE])
    assert told["mcnemar_p"] == 1.0


def test_what_is_asked_are_valid_requests() -> None:
    for way in ("margin", "agreement of 2", "agreement of 4"):
        for body in (judged_alone(way), cascade(way, 0.5), cascade("arithmetic", 1.0)):
            strategies.get(body["reasoning"]["strategy"]).parse(body["reasoning"])
    asked = request(4, 512, 20, 7)
    assert strategies.get("self_consistency").parse(asked["reasoning"]).n == 4
    assert len(asked["messages"][0]["content"]) == 4 * 512


def test_auto_is_compared_with_the_better_of_the_others() -> None:
    seconds = {"pack": [0.2, 0.3, 9.0], "spread": [0.5], "auto": [0.33]}
    assert Cell("fast", 4, 64, seconds, {}).ratio == pytest.approx(1.1)
