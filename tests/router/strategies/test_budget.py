"""A budget bounds every call of a request, whichever strategy makes it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.strategies.scripted import Scripted, ask, sample


def limits(sampler: Scripted) -> list[Any]:
    return [body.get("max_tokens") for body, _ in sampler.opened]


async def test_a_single_sample_gets_no_more_than_the_budget_and_says_that_it_ended_there() -> None:
    sampler = Scripted([sample(0, "First 2, th", tokens=20, finish_reason="length")])
    answer, _ = await ask("cot", sampler, budget_tokens=20)
    assert limits(sampler) == [20]
    assert answer.report["stopped_early"] == "budget_tokens"


async def test_an_answer_within_the_budget_was_not_stopped() -> None:
    sampler = Scripted([sample(0, "The answer is 4.", tokens=20)])
    answer, _ = await ask("cot", sampler, budget_tokens=20)
    assert answer.report["stopped_early"] is None


async def test_a_request_that_wants_less_stays_as_it_is() -> None:
    sampler = Scripted([sample(0, "The answer is 4.", tokens=5)])
    body = {"messages": [{"role": "user", "content": "2+2?"}], "max_completion_tokens": 7}
    await ask("cot", sampler, body, budget_tokens=20)
    assert (sampler.opened[0][0]["max_completion_tokens"], limits(sampler)) == (7, [None])


async def test_a_completion_is_not_made_longer_by_its_budget() -> None:
    sampler = Scripted([sample(0, "4", tokens=5)])
    await ask("cot", sampler, {"prompt": "2+2?"}, budget_tokens=500)
    assert limits(sampler) == [None]


async def test_each_call_gets_what_the_ones_before_left() -> None:
    drawn = [sample(i, "The answer is 4.", tokens=10) for i in range(4)]
    sampler = Scripted(drawn)
    answer, _ = await ask("genrm", sampler, n=2, k=1, budget_tokens=25)
    assert limits(sampler) == [25, 5, 5]
    assert answer.report["tokens"] == 40


async def test_a_long_sample_may_use_what_a_short_one_leaves() -> None:
    """A share of 15 for each would cut an answer that fits."""
    sampler = Scripted([sample(0, "The answer is 4.", tokens=8), sample(1, "The answer is 4.", tokens=22)])
    answer, _ = await ask("best_of_n", sampler, n=2, budget_tokens=30)
    assert limits(sampler) == [30]
    assert (answer.report["stopped_early"], answer.report["tokens"]) == (None, 30)


async def test_samples_side_by_side_cost_at_most_the_rest_of_the_budget_each() -> None:
    """The draw that goes over is the last one."""
    drawn = [sample(i, f"The answer is {i}.", tokens=20, finish_reason="length") for i in range(6)]
    sampler = Scripted(drawn)
    answer, _ = await ask("adaptive_consistency", sampler, n=6, wave=3, budget_tokens=20)
    assert limits(sampler) == [20]
    assert (answer.report["stopped_early"], answer.report["tokens"]) == ("budget_tokens", 3 * 20)


async def test_waves_inside_a_budget_have_one_prompt() -> None:
    drawn = [sample(i, f"The answer is {i % 3}.", tokens=10) for i in range(6)]
    sampler = Scripted(drawn)
    answer, _ = await ask("adaptive_consistency", sampler, wave=3, budget_tokens=1000)
    assert limits(sampler) == [1000, 970]
    assert len(answer.usages) == 1


@pytest.mark.parametrize("cut", [True, False])
async def test_a_step_cut_by_the_budget_is_no_ended_answer(cut: bool) -> None:
    reason = "length" if cut else "stop"
    sampler = Scripted([sample(i, f"Step {i}", tokens=30, finish_reason=reason) for i in range(2)])
    answer, _ = await ask("beam_of_steps", sampler, n=2, width=2, verifier="logprob", budget_tokens=30)
    assert [node["ended"] for node in answer.report["tree"]] == [not cut] * 2
    assert ("note" in answer.report) is cut


async def test_a_chain_cut_by_the_budget_is_answered_by_its_last_probe() -> None:
    chunk = sample(0, "2 and 2", tokens=8, finish_reason="length")
    probe = sample(1, " 4.", tokens=3)
    rest = sample(2, " is", tokens=4, finish_reason="length")
    sampler = Scripted([chunk, probe, rest])
    answer, _ = await ask("certaindex", sampler, n=1, every=8, budget_tokens=15)
    assert limits(sampler) == [8, 7, 4]
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("4", "budget_tokens")
