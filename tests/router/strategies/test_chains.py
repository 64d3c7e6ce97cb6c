"""Strategies that send several prompts one after the other: car, self_refine, mixture_of_agents."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from braid.errors import BadRequest, Unavailable, UpstreamFailed
from router.sampler import Sample
from router.strategies.car import Boundary, calibrate
from tests.router.strategies.scripted import Scripted, ask, sample

STEPS = "Let's think step by step."


# Certainty-based adaptive routing


def short_then_long(ppl: float) -> list[Sample]:
    return [sample(0, "5", -10 * math.log(ppl)), sample(1, "The answer is 4.", -1.0)]


@pytest.mark.parametrize(("ppl", "route", "answer"), [(1.05, "short", "5"), (1.5, "long", "4")])
async def test_long_reasoning_only_over_the_threshold(ppl: float, route: str, answer: str) -> None:
    sampler = Scripted(short_then_long(ppl))
    got, _ = await ask("car", sampler, n=1, threshold=1.2)
    assert (got.report["route"], got.report["answer"]) == (route, answer)
    assert got.report["perplexity"] == pytest.approx(ppl, abs=1e-5)
    assert sampler.prompts[0].startswith("2+2?\nAnswer with the final answer")
    assert sampler.prompts[1:] == ([f"2+2?\n{STEPS}"] if route == "long" else [])
    assert got.report["tokens"] == (20 if route == "long" else 10)


async def test_an_unknown_perplexity_is_uncertain() -> None:
    got, _ = await ask("car", Scripted([sample(0, "5", None), sample(1, "4")]), n=1)
    assert (got.report["route"], got.report["answer"]) == ("long", "4")


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"budget_tokens": 10}, "budget_tokens"), ({"errors": {1: Unavailable("no")}}, "failed")],
)
async def test_at_a_bound_the_short_answer_is_returned(more: dict[str, Any], reason: str) -> None:
    sampler = Scripted(short_then_long(2.0), errors=more.pop("errors", None))
    got, _ = await ask("car", sampler, n=1, **more)
    assert (got.report["route"], got.report["stopped_early"]) == ("short", reason)


async def test_a_short_answer_that_fails_is_followed_by_the_long_one() -> None:
    got, _ = await ask("car", Scripted([sample(0, state="failed"), sample(1, "4")]), n=1)
    assert (got.report["route"], got.report["perplexity"]) == ("long", None)
    with pytest.raises(UpstreamFailed):
        await ask("car", Scripted([sample(i, state="failed") for i in range(2)]), n=1)


async def test_a_boundary_is_used_instead_of_the_threshold() -> None:
    boundary = {"mean_right": 1.0, "std_right": 0.1, "mean_wrong": 2.0, "std_wrong": 0.1}
    for ppl, route in ((1.4, "short"), (1.6, "long")):
        got, _ = await ask("car", Scripted(short_then_long(ppl)), n=1, boundary=boundary, threshold=9)
        assert got.report["route"] == route


@given(st.floats(1, 5), st.floats(0.1, 3), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.05, 0.95))
def test_a_boundary_is_crossed_once(
    right: float, apart: float, std_right: float, std_wrong: float, prior: float
) -> None:
    boundary = Boundary(
        mean_right=right,
        std_right=std_right,
        mean_wrong=right + apart,
        std_wrong=std_wrong,
        prior_right=prior,
    )
    assert boundary.uncertain(right + apart + 5)
    assert not boundary.uncertain(right)


def test_calibration_is_of_means_and_spreads() -> None:
    boundary = calibrate([1.0, 1.2, 1.1], [1.9, 2.1])
    found = [boundary.mean_right, boundary.mean_wrong, boundary.std_wrong, boundary.prior_right]
    assert found == pytest.approx([1.1, 2.0, 0.1, 0.6])
    assert not boundary.uncertain(1.25)
    assert boundary.uncertain(1.9)
    with pytest.raises(ValidationError, match="mean_wrong must be over"):
        calibrate([2.0], [1.0])


async def test_a_wrong_boundary_is_refused_by_its_field() -> None:
    with pytest.raises(BadRequest) as caught:
        await ask("car", Scripted([sample(0)]), boundary={"mean_right": 0.5})
    assert caught.value.param == "reasoning.boundary.mean_right"


# Self-refine

CHAIN = ["It is 5.", "Wrong: 2+2 is 4.", "It is 4.", "Good. [ACCEPTED]", "never"]


def chain(*said: str) -> list[Sample]:
    return [sample(index, text) for index, text in enumerate(said)]


async def test_it_refines_until_the_feedback_accepts() -> None:
    sampler = Scripted(chain(*CHAIN))
    got, _ = await ask("self_refine", sampler, n=1)
    assert (got.report["answer"], got.report["rounds"], got.report["accepted"]) == ("4", 1, True)
    assert got.report["stopped_early"] == "accepted"
    roles = ["draft", "feedback", "refinement", "feedback"]
    assert [one["role"] for one in got.report["samples"]] == roles
    feedback, refinement = sampler.opened[1][0]["messages"], sampler.opened[2][0]["messages"]
    assert [m["content"] for m in feedback[:2]] == [f"2+2?\n{STEPS}", "It is 5."]
    assert "[ACCEPTED]" in feedback[2]["content"]
    assert "Wrong: 2+2 is 4." in refinement[2]["content"]
    assert [m["role"] for m in refinement] == ["user", "assistant", "user"]
    assert sampler.opened[3][0]["messages"][1]["content"] == "It is 4.", "feedback is on the latest answer"


async def test_it_refines_for_so_many_rounds() -> None:
    sampler = Scripted(chain("1", "no", "2", "no", "3"))
    got, _ = await ask("self_refine", sampler, n=1, rounds=2)
    assert (got.report["answer"], got.report["rounds"], got.report["accepted"]) == ("3", 2, False)
    assert got.report["stopped_early"] is None


async def test_without_early_stop_acceptance_ends_nothing() -> None:
    got, _ = await ask(
        "self_refine", Scripted(chain("1", "[ACCEPTED]", "2")), n=1, rounds=1, early_stop=False
    )
    assert (got.report["answer"], got.report["accepted"]) == ("2", False)


@pytest.mark.parametrize("failing", [1, 2])
async def test_a_call_that_fails_ends_it_with_the_latest_answer(failing: int) -> None:
    sampler = Scripted(chain(*CHAIN), errors={failing: BadRequest("context is full")})
    got, _ = await ask("self_refine", sampler, n=1)
    assert (got.report["answer"], got.report["stopped_early"]) == ("5", "failed")


async def test_a_schema_binds_the_answer_and_not_the_feedback() -> None:
    body = {"prompt": "2+2=", "response_format": {"type": "json_object"}, "stop": ["."]}
    sampler = Scripted(chain(*CHAIN))
    await ask("self_refine", sampler, body, n=1, cot=False)
    assert ["response_format" in sent for sent, _ in sampler.opened] == [True, False, True, False]
    assert sampler.opened[1][0]["prompt"].startswith("2+2=\nIt is 5.\n\nCheck the answer")


# Mixture of agents


async def test_layers_read_the_layer_before_and_the_aggregator_the_last() -> None:
    sampler = Scripted(chain("a1", "<think>x</think>a2", "b1", "b2", "The answer is 4."))
    got, _ = await ask("mixture_of_agents", sampler, n=2)
    assert sampler.waves == [2, 2, 1]
    assert "1. a1\n\n2. a2" in sampler.prompts[1]
    assert "1. b1\n\n2. b2" in sampler.prompts[2]
    assert all(prompt.startswith("2+2?\n") for prompt in sampler.prompts)
    assert (got.report["answer"], got.report["chosen"], got.report["aggregated"]) == ("4", 4, True)
    assert [one["role"] for one in got.report["samples"]] == ["proposer"] * 4 + ["aggregator"]
    assert ["temperature" in sent for sent, _ in sampler.opened] == [True, True, False]
    assert len(got.usages) == 3


async def test_a_proposer_that_fails_is_left_out() -> None:
    sampler = Scripted([sample(0, state="failed"), sample(1, "a2"), sample(2, "4")])
    got, _ = await ask("mixture_of_agents", sampler, n=2, layers=1)
    assert sampler.prompts[1].endswith("1. a2")
    assert got.report["answer"] == "4"


@pytest.mark.parametrize(("budget", "waves", "chosen"), [(20, [2], 1), (40, [2, 2], 3), (50, [2, 2, 1], 4)])
async def test_at_a_bound_the_last_layer_answers(budget: int, waves: list[int], chosen: int) -> None:
    said = [sample(i, f"answer {i}", -5.0 + i) for i in range(5)]
    sampler = Scripted(said)
    got, _ = await ask("mixture_of_agents", sampler, n=2, budget_tokens=budget)
    assert (sampler.waves, got.report["chosen"]) == (waves, chosen)
    assert got.report["stopped_early"] == (None if chosen == 4 else "budget_tokens")
