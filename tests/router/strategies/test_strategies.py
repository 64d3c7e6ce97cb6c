from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.errors import BadRequest, DeadlineExceeded, UpstreamFailed
from router.strategies.prompt import with_sampling, with_trigger
from tests.router.strategies.scripted import Scripted, ask, sample

STEPS = "Let's think step by step."


def says(answer: object) -> str:
    return f"We see. The answer is {answer}."


async def test_direct_sends_the_body_as_it_is() -> None:
    body = {"prompt": [1, 2, 3], "temperature": 0}
    sampler = Scripted([sample(0, "Four: 4")])
    answer, _ = await ask("direct", sampler, body)
    assert sampler.opened == [(body, 1)]
    assert answer.choice["message"]["content"] == "Four: 4"
    assert answer.report["answer"] == "4"


async def test_cot_appends_its_trigger_and_draws_one() -> None:
    sampler = Scripted([sample(0, says(4))])
    answer, events = await ask("cot", sampler)
    body, n = sampler.opened[0]
    assert (body["messages"][-1]["content"], n) == (f"2+2?\n{STEPS}", 1)
    assert "temperature" not in body
    assert answer.report["answer"] == "4"
    assert [event["event"] for event in events] == ["sample", "decided"]


async def test_the_majority_wins_in_the_words_of_its_most_confident_sample() -> None:
    samples = [sample(0, says(5), -0.1), sample(1, says(4), -9.0), sample(2, says("4.0"), -2.0)]
    answer, _ = await ask("self_consistency", Scripted(samples))
    assert answer.choice["message"]["content"] == says("4.0")
    assert answer.choice["index"] == 0
    assert answer.report["votes"] == [
        {"answer": "4", "votes": 2, "weight": 2.0, "samples": [1, 2]},
        {"answer": "5", "votes": 1, "weight": 1.0, "samples": [0]},
    ]
    assert answer.report["confidence"] == pytest.approx(2 / 3, abs=1e-6)
    assert answer.report["chosen"] == 2
    assert answer.report["stopped_early"] is None


async def test_a_decided_vote_cancels_the_rest() -> None:
    sampler = Scripted([sample(i, says(4)) for i in range(8)], hang_from=5)
    answer, events = await ask("self_consistency", sampler)
    assert sampler.cancels == 1
    assert sampler.closed
    assert answer.report["stopped_early"] == "decided"
    assert answer.report["samples_cancelled"] == 3
    assert [one["state"] for one in answer.report["samples"]] == ["finished"] * 5 + ["stopped_early"] * 3
    assert answer.report["tokens"] == 80, "cancelled samples' tokens count"
    assert events[-1] == {
        "event": "decided",
        "answer": "4",
        "confidence": 1.0,
        "stopped_early": "decided",
        "samples_cancelled": 3,
    }


async def test_without_early_stop_every_sample_is_heard() -> None:
    sampler = Scripted([sample(i, says(4)) for i in range(8)])
    answer, _ = await ask("self_consistency", sampler, early_stop=False)
    assert sampler.cancels == 0
    assert answer.report["votes"][0]["votes"] == 8


@given(
    outcomes=st.lists(st.sampled_from(["4", "5", "6", "none", "failed"]), min_size=1, max_size=12),
    weight=st.sampled_from(["uniform", "mean_logprob"]),
    data=st.data(),
)
def test_early_stop_gives_the_answer_of_a_full_run(
    outcomes: list[str], weight: str, data: st.DataObject
) -> None:
    logprob = st.floats(-50, 0)
    samples = [
        sample(i, state="failed", error="lost")
        if outcome == "failed"
        else sample(i, "I can't say" if outcome == "none" else says(outcome), data.draw(logprob))
        for i, outcome in enumerate(outcomes)
    ]
    if all(outcome == "failed" for outcome in outcomes):
        return
    ended = data.draw(st.permutations(samples))

    async def both() -> tuple[Any, Any]:
        early, _ = await ask("self_consistency", Scripted(ended), weight=weight)
        full, _ = await ask("self_consistency", Scripted(ended), weight=weight, early_stop=False)
        return early, full

    early, full = asyncio.run(both())
    assert early.report["answer"] == full.report["answer"]
    assert [one["index"] for one in early.report["samples"]] == list(range(len(outcomes)))


async def test_votes_can_weigh_by_confidence() -> None:
    samples = [sample(0, says(5), -30.0), sample(1, says(5), -30.0), sample(2, says(4), -1.0)]
    answer, _ = await ask("self_consistency", Scripted(samples), weight="mean_logprob")
    assert answer.report["answer"] == "4"


async def test_a_sample_without_an_answer_never_votes() -> None:
    samples = [sample(0, "no idea"), sample(1, "none"), sample(2, says(4))]
    answer, _ = await ask("self_consistency", Scripted(samples))
    assert answer.report["answer"] == "4"
    assert answer.report["confidence"] == 1.0


async def test_if_nobody_answers_the_most_confident_sample_is_returned_and_the_report_says_so() -> None:
    answer, _ = await ask("self_consistency", Scripted([sample(0, "no", -5.0), sample(1, "idea", -1.0)]))
    assert answer.choice["message"]["content"] == "idea"
    assert answer.report["answer"] is None
    assert answer.report["votes"] == []
    assert "no sample has an answer" in answer.report["note"]


async def test_a_chain_cut_off_at_its_limit_has_no_last_number() -> None:
    samples = [sample(0, "first 12 * 3", finish_reason="length"), sample(1, says(36))]
    answer, _ = await ask("self_consistency", Scripted(samples))
    assert answer.report["samples"][0]["answer"] is None
    assert answer.report["answer"] == "36"


async def test_a_failed_sample_is_declared_and_does_not_vote() -> None:
    samples = [sample(0, says(5), state="failed", error="worker gone"), sample(1, says(4))]
    answer, _ = await ask("self_consistency", Scripted(samples))
    assert answer.report["samples"][0] == {
        "index": 0,
        "state": "failed",
        "answer": None,
        "tokens": 10,
        "mean_logprob": -0.1,
        "finish_reason": None,
        "error": "worker gone",
    }
    assert answer.report["answer"] == "4"


async def test_on_failure_all_fails_the_request() -> None:
    sampler = Scripted([sample(0, state="failed"), sample(1, says(4))])
    with pytest.raises(UpstreamFailed):
        await ask("self_consistency", sampler, on_failure="all")
    assert sampler.closed


async def test_if_all_fail_the_request_fails() -> None:
    with pytest.raises(UpstreamFailed):
        await ask("best_of_n", Scripted([sample(i, state="failed") for i in range(3)]))


async def test_the_token_budget_bounds_the_group() -> None:
    sampler = Scripted([sample(i, says(i)) for i in range(6)], hang_from=3)
    answer, _ = await ask("best_of_n", sampler, budget_tokens=25)
    assert answer.report["stopped_early"] == "budget_tokens"
    assert answer.report["samples_cancelled"] == 3


async def test_at_the_deadline_the_best_answer_so_far_is_returned() -> None:
    sampler = Scripted([sample(0, says(4)), sample(1, says(5)), sample(2, says(5))], hang_from=1)
    answer, _ = await ask("self_consistency", sampler, deadline_s=0.3)
    assert answer.report["answer"] == "4"
    assert answer.report["stopped_early"] == "deadline"


@pytest.mark.parametrize("late", [{"hang_from": 0}, {"entry_delay_s": 30.0}])
async def test_a_deadline_before_any_sample_is_an_error(late: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await ask("cot", Scripted([sample(0, says(4))], **late), deadline_s=0.02)
    assert time.monotonic() - began < 5


async def test_a_client_that_leaves_closes_the_group() -> None:
    sampler = Scripted([sample(0, says(4))], hang_from=0)
    task = asyncio.create_task(ask("cot", sampler, deadline_s=60))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sampler.closed
    assert len(asyncio.all_tasks()) == 1


async def test_best_of_n_returns_the_highest_mean_logprob() -> None:
    samples = [sample(2, says(6), -9.0), sample(0, says(4), -3.0, tokens=3), sample(1, says(5), -5.0)]
    answer, events = await ask("best_of_n", Scripted(samples))
    assert (answer.report["chosen"], answer.report["reward"]) == (1, -0.5)
    assert [event.get("best") for event in events[:-1]] == [2, 2, 1]


async def test_best_of_n_without_logprobs_says_so() -> None:
    answer, _ = await ask("best_of_n", Scripted([sample(1, "b", None), sample(0, "a", None)]))
    assert answer.report["chosen"] == 0
    assert answer.report["reward"] is None
    assert "log-probability" in answer.report["note"]


@pytest.mark.parametrize("name", ["self_consistency", "best_of_n"])
async def test_several_greedy_samples_are_refused(name: str) -> None:
    sampler = Scripted([sample(0), sample(1)])
    with pytest.raises(BadRequest, match="temperature") as caught:
        await ask(name, sampler, {"prompt": "x", "temperature": 0})
    assert caught.value.param == "temperature"
    assert not sampler.opened


async def test_cot_can_be_switched_off() -> None:
    sampler = Scripted([sample(0, says(4))])
    await ask("self_consistency", sampler, {"prompt": "2+2="}, cot=False)
    assert sampler.opened[0][0] == {"prompt": "2+2=", "temperature": 1.0}


async def test_report_and_events_are_json_and_texts_come_on_request() -> None:
    samples = [sample(0, says(4), None), sample(1, says(4), float("-inf"))]
    answer, events = await ask("self_consistency", Scripted(samples), return_samples=True)
    json.dumps([answer.report, *events], allow_nan=False)
    assert answer.report["samples"][0]["text"] == says(4)
    assert answer.report["samples"][1]["mean_logprob"] is None


async def test_each_sample_event_carries_the_tally() -> None:
    _, events = await ask("self_consistency", Scripted([sample(1, says(4)), sample(0, says(5))]))
    assert events[0] == {
        "event": "sample",
        "index": 1,
        "state": "finished",
        "answer": "4",
        "tokens": 10,
        "votes": [{"answer": "4", "votes": 1, "weight": 1.0, "samples": [1]}],
    }
    assert [vote["answer"] for vote in events[1]["votes"]] == ["5", "4"]


async def test_an_invalid_pattern_is_refused_before_anything_runs() -> None:
    sampler = Scripted([sample(0)])
    with pytest.raises(BadRequest, match="not a regular expression"):
        await ask("direct", sampler, extractor="regex", pattern="(")
    assert not sampler.opened


async def test_votes_can_be_cast_by_a_pattern() -> None:
    samples = [sample(0, "x=1 y=2"), sample(1, "x=3 y=2")]
    answer, _ = await ask("self_consistency", Scripted(samples), extractor="regex", pattern=r"y=(\d+)")
    assert answer.report["votes"][0]["votes"] == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "2+2?"}, {"prompt": f"2+2?\n{STEPS}"}),
        ({"prompt": ["2+2?"]}, {"prompt": f"2+2?\n{STEPS}"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "user", "content": f"a\n{STEPS}"}, {"role": "assistant", "content": "b"}]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": f"a\n{STEPS}"}]}]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": STEPS}],
                    }
                ]
            },
        ),
    ],
)
def test_the_trigger_follows_the_question(body: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(body)
    assert with_trigger(body, STEPS) == expected
    assert json.dumps(body) == before, "the caller's body is left alone"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": [1, 2]},
        {"prompt": ["a", "b"]},
        {"messages": []},
        {"messages": "a"},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
    ],
)
def test_a_body_without_a_place_for_the_trigger_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        with_trigger(body, STEPS)


@pytest.mark.parametrize(("given", "n", "used"), [(None, 4, 1.0), (0.7, 4, 0.7), (0, 1, 0)])
def test_the_caller_s_temperature_is_kept(given: float | None, n: int, used: float) -> None:
    assert with_sampling({"temperature": given}, n) == {"temperature": used}
