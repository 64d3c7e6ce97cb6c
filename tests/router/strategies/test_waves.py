"""What draws waves: adaptive_consistency, early_stopping_consistency, and bounds over several groups."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.errors import BadRequest, DeadlineExceeded, Unavailable, UpstreamFailed
from router.sampler import GroupUsage, Sample
from router.strategies import early_stopping_consistency
from router.strategies.adaptive_consistency import AdaptiveConsistencyOptions, certainty, counts, least
from router.strategies.options import WaveOptions
from router.strategies.voting import Ballot, tally
from tests.router.strategies.scripted import Scripted, ask, sample

OUTCOMES = st.lists(st.sampled_from(["4", "4", "4", "5", "6", "none"]), min_size=40, max_size=40)


def says(answer: object, index: int, **fields: Any) -> Sample:
    return sample(index, "I can't say" if answer == "none" else f"The answer is {answer}.", **fields)


def all_say(*answers: object) -> list[Sample]:
    return [says(answer, index) for index, answer in enumerate(answers)]


# The stop rule of adaptive consistency


@pytest.mark.parametrize(("v1", "v2", "p"), [(4, 0, 0.96875), (7, 1, 0.98046875), (0, 0, 0.5), (3, 3, 0.5)])
def test_certainty_is_the_vector_of_the_definition(v1: int, v2: int, p: float) -> None:
    assert certainty(v1, v2) == p


@pytest.mark.parametrize(("v1", "v2"), [(4, 0), (6, 1), (8, 2), (9, 3), (11, 4), (12, 5)])
def test_least_leads_at_95_percent(v1: int, v2: int) -> None:
    assert certainty(v1, v2) >= 0.95 > certainty(v1 - 1, v2)


@given(st.integers(0, 60), st.integers(0, 60))
def test_certainty_is_the_beta_integral(v1: int, v2: int) -> None:
    """1 - I_{1/2}(a, b) with the binomial tail from the other side, exactly."""
    n = v1 + v2 + 1
    tail = Fraction(sum(comb(n, j) for j in range(v1 + 1, n + 1)), 2**n)
    assert certainty(v1, v2) == float(1 - tail)
    assert certainty(v1 + 1, v2) >= certainty(v1, v2) >= certainty(v1, v2 + 1)


@given(st.integers(0, 12), st.integers(0, 12), st.floats(0.51, 0.99), st.integers(1, 40))
def test_no_wave_is_larger_than_the_least_that_can_stop(a: int, b: int, tau: float, most: int) -> None:
    v1, v2 = max(a, b), min(a, b)
    votes = tally([Ballot(i, "a" if i < v1 else "b", "a" if i < v1 else "b") for i in range(v1 + v2)])
    assert counts(votes) == (v1, v2)
    size = least(votes, tau, most)
    assert 1 <= size <= most
    assert all(certainty(v1 + more, v2) < tau for more in range(1, size))
    assert size == most or certainty(v1 + size, v2) >= tau


# Adaptive consistency


async def test_four_equal_answers_are_enough() -> None:
    sampler = Scripted(all_say(*[4] * 8))
    answer, events = await ask("adaptive_consistency", sampler)
    assert sampler.waves == [4]
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("4", "agreed")
    assert (answer.report["certainty"], answer.report["n"]) == (0.96875, 8)
    assert events[-2]["votes"][0]["votes"] == 4


async def test_a_wave_is_as_large_as_the_doubt() -> None:
    sampler = Scripted(all_say(4, 5, 4, 4, 4, 4, 4, *[5] * 20))
    answer, _ = await ask("adaptive_consistency", sampler)
    assert sampler.waves == [4, 3], "3-1 needs three more to make 6-1"
    assert answer.report["answer"] == "4"


async def test_waves_can_be_given() -> None:
    sampler = Scripted(all_say(*[4, 5] * 10))
    await ask("adaptive_consistency", sampler, wave=2, growth=2)
    assert sampler.waves == [2, 4, 8, 6]


async def test_never_more_than_n() -> None:
    sampler = Scripted(all_say(4, 5, 4, 5, 5))
    answer, _ = await ask("adaptive_consistency", sampler)
    assert sum(sampler.waves) == 5
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("5", None)


async def test_a_lead_that_cannot_be_caught_up_ends_a_wave() -> None:
    sampler = Scripted(all_say(4, 4, 4, 4, 5, 5), hang_from=4)
    answer, _ = await ask("adaptive_consistency", sampler, wave=6, n=6)
    assert (answer.report["stopped_early"], answer.report["answer"]) == ("decided", "4")


async def test_without_early_stop_all_are_drawn_at_once() -> None:
    sampler = Scripted(all_say(*[4] * 12))
    answer, _ = await ask("adaptive_consistency", sampler, early_stop=False)
    assert (sampler.waves, answer.report["votes"][0]["votes"]) == ([12], 12)


def sequential(answers: list[str], tau: float) -> tuple[str | None, int]:
    """Adaptive consistency as published: one sample at a time. The answer, and how many were drawn."""
    votes = []
    for drawn in range(1, len(answers) + 1):
        cast = enumerate(answers[:drawn])
        votes = tally([Ballot(i, answer, answer) for i, answer in cast if answer != "none"])
        if votes and certainty(*counts(votes)) >= tau:
            break
    return (votes[0].answer if votes else None), drawn


@given(OUTCOMES)
def test_waves_of_the_least_size_draw_what_a_sequential_test_draws(answers: list[str]) -> None:
    sampler = Scripted(all_say(*answers))
    answer, _ = asyncio.run(ask("adaptive_consistency", sampler, n=40))
    expected, drawn = sequential(answers, 0.95)
    assert answer.report["answer"] == expected
    assert sum(sampler.waves) <= drawn, "a lead that cannot be caught up may end it sooner"
    assert sum(sampler.waves) == drawn or answer.report["stopped_early"] == "decided"


@given(OUTCOMES, st.data(), st.sampled_from([{}, {"wave": 3}, {"wave": 5, "growth": 2}]))
def test_the_order_in_which_samples_end_does_not_matter(
    answers: list[str], data: st.DataObject, options: dict[str, Any]
) -> None:
    samples = all_say(*answers)
    shuffled = data.draw(st.permutations(samples))
    esc: dict[str, Any] = {}
    for name, using in (("adaptive_consistency", options), ("early_stopping_consistency", esc)):
        first, _ = asyncio.run(ask(name, Scripted(samples), **using))
        other, _ = asyncio.run(ask(name, Scripted(shuffled), **using))
        assert first.report["answer"] == other.report["answer"], name


# Early-stopping consistency


async def test_the_first_window_that_agrees_ends_it() -> None:
    sampler = Scripted(all_say(5, 5, 5, 5, 4, *[4] * 5, *[5] * 30))
    answer, _ = await ask("early_stopping_consistency", sampler)
    assert sampler.waves == [5, 5]
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("4", "agreed")
    assert answer.report["votes"] == [
        {"answer": "4", "votes": 5, "weight": 5.0, "samples": [5, 6, 7, 8, 9]},
    ]


async def test_the_windows_of_the_paper_are_the_default() -> None:
    options = early_stopping_consistency.EarlyStoppingConsistencyOptions()
    assert (options.window, options.n, options.slots) == (5, 40, 5)


async def test_without_a_window_that_agrees_all_vote() -> None:
    sampler = Scripted(all_say(*[4, 4, 4, 5, 5] * 2, 5, 5))
    answer, _ = await ask("early_stopping_consistency", sampler)
    assert sampler.waves == [5, 5, 2], "the last window is cut short and ends nothing"
    assert answer.report["answer"] == "4"
    assert sum(vote["votes"] for vote in answer.report["votes"]) == 12


@pytest.mark.parametrize("odd", [says("none", 2), says(4, 2, state="failed", error="lost")])
async def test_a_sample_without_an_answer_agrees_with_none(odd: Sample) -> None:
    samples = [odd if one.index == 2 else one for one in all_say(*[4] * 10)]
    sampler = Scripted(samples)
    await ask("early_stopping_consistency", sampler)
    assert sampler.waves == [5, 5]


# Bounds over waves


async def test_the_token_budget_is_of_all_waves() -> None:
    sampler = Scripted(all_say(*[4, 5, 6, 7, 8] * 8))
    answer, _ = await ask("early_stopping_consistency", sampler, budget_tokens=120)
    assert sampler.waves == [5, 5, 5]
    assert answer.report["stopped_early"] == "budget_tokens"
    assert answer.report["samples_cancelled"] == 3, "the twelfth sample spends it"
    assert answer.report["tokens"] == 150, "cancelled samples' tokens count"


async def test_a_budget_spent_by_a_whole_wave_draws_no_other() -> None:
    sampler = Scripted(all_say(*[4, 5, 6, 7, 8] * 8))
    answer, _ = await ask("early_stopping_consistency", sampler, budget_tokens=50)
    assert (sampler.waves, answer.report["stopped_early"]) == ([5], "budget_tokens")


async def test_the_deadline_is_of_all_waves() -> None:
    sampler = Scripted(all_say(*[4, 5, 6, 7, 8] * 8), hang_from=7)
    answer, _ = await ask("early_stopping_consistency", sampler, deadline_s=0.5)
    assert answer.report["stopped_early"] == "deadline"
    states = [one["state"] for one in answer.report["samples"]]
    assert states == ["finished"] * 7 + ["stopped_early"] * 3


async def test_a_failed_wave_ends_it_with_the_best_answer_so_far() -> None:
    sampler = Scripted(all_say(*[4, 4, 5, 6, 7] * 8), errors={5: Unavailable("no worker")})
    answer, _ = await ask("early_stopping_consistency", sampler)
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("4", "failed")
    failed = answer.report["samples"][5:]
    assert [(one["state"], one["error"]) for one in failed] == [("failed", "no worker")] * 5


async def test_a_wave_that_runs_into_the_requests_own_deadline_is_cut_by_it() -> None:
    sampler = Scripted(all_say(*[4, 4, 5, 6, 7] * 8), errors={5: DeadlineExceeded("too late")})
    answer, _ = await ask("early_stopping_consistency", sampler)
    assert answer.report["stopped_early"] == "deadline"
    assert answer.report["samples"][5]["state"] == "stopped_early"


@pytest.mark.parametrize("errors", [{0: Unavailable("no worker")}, {5: Unavailable("no worker")}])
async def test_under_on_failure_all_a_failed_wave_fails_the_request(errors: dict[int, Unavailable]) -> None:
    sampler = Scripted(all_say(*[4, 5, 6, 7, 8] * 8), errors=errors)
    with pytest.raises(Unavailable):
        await ask("early_stopping_consistency", sampler, on_failure="all")


async def test_a_first_wave_that_fails_is_the_requests_error() -> None:
    with pytest.raises(Unavailable):
        await ask("adaptive_consistency", Scripted(all_say(*[4] * 8), errors={0: Unavailable("no")}))


async def test_a_wave_whose_samples_fail_is_followed_by_another() -> None:
    samples = [says(4, i, state="failed") if i < 4 else says(4, i) for i in range(8)]
    answer, _ = await ask("adaptive_consistency", Scripted(samples))
    assert answer.report["answer"] == "4"
    failing = [says(4, i, state="failed") for i in range(8)]
    with pytest.raises(UpstreamFailed):
        await ask("adaptive_consistency", Scripted(failing))


async def test_the_prompt_of_all_waves_counts_once() -> None:
    answer, _ = await ask("early_stopping_consistency", Scripted(all_say(*[4, 5, 6, 7, 8] * 2)))
    assert answer.usages == [GroupUsage(prompt_tokens=7, completion_tokens=100)]


async def test_waves_of_greedy_samples_are_refused() -> None:
    with pytest.raises(BadRequest, match="temperature"):
        await ask("adaptive_consistency", Scripted(all_say(4, 4)), {"prompt": "x", "temperature": 0})


@pytest.mark.parametrize(
    ("options", "slots"), [({}, 16), ({"n": 6}, 6), ({"wave": 5}, 5), ({"wave": 5, "early_stop": False}, 40)]
)
async def test_slots_of_adaptive_waves(options: dict[str, Any], slots: int) -> None:
    assert AdaptiveConsistencyOptions(**options).slots == slots


async def test_no_wave_is_wider_than_its_slots() -> None:
    sampler = Scripted(all_say(*[4, 5] * 30))
    await ask("adaptive_consistency", sampler, tau=0.999)
    assert max(sampler.waves) == 16


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"n": 16}, 4),
        ({"n": 3}, 3),
        ({"n": 16, "growth": 2}, 8),
        ({"n": 1024, "wave": 128, "growth": 4}, 512),
    ],
)
def test_slots_are_those_of_the_largest_wave(options: dict[str, Any], slots: int) -> None:
    assert WaveOptions(**options).slots == slots
