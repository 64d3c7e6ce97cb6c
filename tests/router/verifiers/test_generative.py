"""The generative verifier: what it asks, and how chains become a score."""

from __future__ import annotations

from typing import Any

import pytest

from braid import services
from braid.errors import BadRequest, UpstreamFailed
from braid.wire import Verdict
from demo import tasks
from router.sampler import Sample
from router.strategies.options import ManyOptions
from router.strategies.scored import Scored
from router.verifiers import Check, GenerativeVerifier
from router.verifiers.base import check
from tests.router.strategies.scripted import Scripted, sample
from tests.router.verifiers.chains import CHAT, chain, run_of, scores, verdict


def verifier(**settings: Any) -> GenerativeVerifier:
    return GenerativeVerifier("judge", services.GenerativeVerifier(**settings))


async def test_a_score_is_the_mean_over_the_chains_of_each_sample() -> None:
    sampler = Scripted([verdict(0, 0.9), verdict(1, 0.7), verdict(2, 0.1), verdict(3, 0.3)])
    assert await scores(verifier(k=2), ["a", "b"], run_of(sampler)) == [
        pytest.approx(0.8),
        pytest.approx(0.2),
    ]


async def test_chains_without_a_verdict_drop_out() -> None:
    sampler = Scripted([verdict(0, 0.9), sample(1, "well"), sample(2, "hm"), sample(3, "hm")])
    assert await scores(verifier(k=2), ["a", "b"], run_of(sampler)) == [pytest.approx(0.9), None]


async def test_failed_chains_drop_out_too() -> None:
    sampler = Scripted([verdict(0, 0.9), sample(1, state="failed", tokens=0)])
    assert await scores(verifier(k=2), ["a"], run_of(sampler)) == [pytest.approx(0.9)]


async def test_it_asks_as_the_next_turn_and_runs_where_the_answer_is() -> None:
    sampler = Scripted([verdict(0, 0.9)])
    body = {
        **CHAT,
        "model": "m",
        "seed": 7,
        "cache_salt": "tenant",
        "temperature": 0.3,
        "stop": ["\n"],
        "max_tokens": 3,
        "response_format": {"type": "json_object"},
        "return_tokens_as_token_ids": True,
    }
    one = Scored(sample(5, " Four. "))
    await verifier().score(run_of(sampler), body, [one])
    [(asked, n)] = sampler.opened
    assert n == 1
    assert asked == {
        "model": "m",
        "seed": 7,
        "cache_salt": "tenant",
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": " Four. "},
            {"role": "user", "content": tasks.VERIFY_REQUEST},
        ],
        "temperature": 0.0,
    }
    assert sampler.after == [one.sample]
    assert sampler.watched == [Verdict(("yes",), ("no",), 20)], "the worker looks for it, nothing is shipped"


async def test_tools_stay_in_the_prompt_but_are_not_called() -> None:
    sampler = Scripted([verdict(0, 0.9)])
    tools = [{"type": "function", "function": {"name": "f"}}]
    await scores(verifier(), ["a"], run_of(sampler), {**CHAT, "tools": tools, "tool_choice": "auto"})
    assert (sampler.opened[0][0]["tools"], sampler.opened[0][0]["tool_choice"]) == (tools, "none")


async def test_a_completion_goes_on_from_its_text() -> None:
    sampler = Scripted([verdict(0, 0.9)])
    await scores(verifier(), [" 4"], run_of(sampler), {"prompt": ["2+2="]})
    asked = sampler.opened[0][0]
    assert asked["prompt"] == f"2+2= 4\n\n{services.VERIFY}\n"
    assert ("logprobs" in asked, asked["max_tokens"]) == (False, 512)


async def test_token_ids_cannot_be_read() -> None:
    with pytest.raises(BadRequest, match="text"):
        await scores(verifier(), ["4"], run_of(Scripted([verdict(0, 0.9)])), {"prompt": [1, 2]})


async def test_the_demo_models_own_prompt_can_be_a_template() -> None:
    template = tasks.verify_prompt("{question}", "{answer}")
    sampler = Scripted([verdict(0, 0.9)])
    question = f"What is {{answer}}?{tasks.WORKED_SUFFIX}"
    body = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": question}]}
    await scores(verifier(template=template), ["<think>?</think>Four {question}."], run_of(sampler), body)
    [message] = sampler.opened[0][0]["messages"]
    assert message["content"] == tasks.verify_prompt("What is {answer}?", "Four {question}.")
    assert sampler.after == [None], "another prompt has no tokens in common"


async def test_another_model_verifies_elsewhere() -> None:
    sampler = Scripted([verdict(0, 0.9)])
    await scores(verifier(model="judge-7b"), ["4"], run_of(sampler), {**CHAT, "model": "m"})
    assert (sampler.opened[0][0]["model"], sampler.after) == ("judge-7b", [None])


@pytest.mark.parametrize("body", [CHAT, {"prompt": "2+2="}])
async def test_the_operator_bounds_a_chain(body: dict[str, Any]) -> None:
    sampler = Scripted([verdict(0, 0.9)])
    await scores(verifier(max_tokens=64), ["4"], run_of(sampler), body)
    assert sampler.opened[0][0]["max_tokens"] == 64


async def test_the_default_template_is_what_the_demo_model_knows() -> None:
    assert services.VERIFY == tasks.VERIFY_REQUEST


async def test_the_verdicts_of_the_demo_model_are_found() -> None:
    problem = tasks.make_problem("test", 0, 0)
    text = tasks.verification(problem, tasks.solve(problem))
    made = chain(0, [text.removesuffix(" Yes"), " Yes"], {" Yes": 0.97, " No": 0.03})
    assert await scores(verifier(), ["a"], run_of(Scripted([made]))) == [pytest.approx(0.97)]


@pytest.mark.parametrize(
    ("k", "given", "used"), [(1, None, 0.0), (4, None, 1.0), (4, 0.6, 0.6), (1, 0.6, 0.6)]
)
async def test_several_chains_differ(k: int, given: float | None, used: float) -> None:
    sampler = Scripted([verdict(i, 0.9) for i in range(k)])
    await scores(verifier(k=k, temperature=given), ["a"], run_of(sampler))
    assert sampler.opened[0][0]["temperature"] == used


async def test_an_answer_of_nothing_is_not_asked_about() -> None:
    sampler = Scripted([verdict(0, 0.9)])
    assert await scores(verifier(), ["<think>...", "4"], run_of(sampler)) == [None, pytest.approx(0.9)]
    assert sampler.waves == [1]


async def test_as_many_run_side_by_side_as_there_are_slots() -> None:
    sampler = Scripted([verdict(i, 0.5) for i in range(12)])
    run = run_of(sampler, ManyOptions(n=4))
    assert await scores(verifier(k=2), ["a"] * 6, run) == [pytest.approx(0.5)] * 6
    assert sampler.waves == [2] * 6
    assert sampler.most_open == 2


async def test_a_budget_inside_verification_leaves_the_rest_unknown() -> None:
    sampler = Scripted([verdict(i, 0.5 + i / 10) for i in range(4)])
    run = run_of(sampler, ManyOptions(n=1, budget_tokens=15))
    assert await scores(verifier(), ["a", "b", "c", "d"], run) == [
        pytest.approx(0.5),
        pytest.approx(0.6),
        None,
        None,
    ]
    assert (run.stopped, sampler.waves) == ("budget_tokens", [1, 1])


async def test_a_deadline_inside_verification_leaves_the_rest_unknown() -> None:
    sampler = Scripted([verdict(0, 0.5), verdict(1, 0.6)], hang_from=1)
    run = run_of(sampler, ManyOptions(n=2, deadline_s=0.1))
    run.ended.append(Scored(sample(9, "an answer")))
    assert await scores(verifier(), ["a", "b"], run) == [pytest.approx(0.5), None]
    assert run.stopped == "deadline"


async def test_on_failure_all_holds_for_verifications() -> None:
    samples: list[Sample] = [verdict(0, 0.5), sample(1, state="failed", tokens=0)]
    run = run_of(Scripted(samples), ManyOptions(n=2, on_failure="all"))
    with pytest.raises(UpstreamFailed):
        await scores(verifier(), ["a", "b"], run)


async def test_the_reason_is_the_chain_that_likes_it_least() -> None:
    tokens = ["<think>x</think>", "12*34=408, says 409, wrong.\n\n", "Verification", ":", " No"]
    samples = [verdict(0, 0.9), chain(1, tokens, {" Yes": 0.2, " No": 0.8}), sample(2, "hm"), sample(3, "hm")]
    run = run_of(Scripted(samples))
    told = await check(verifier(k=2), run, CHAT, [Scored(sample(0, "a")), Scored(sample(1, "b"))])
    assert told[0].score == pytest.approx(0.55)
    assert told[0].feedback == "12*34=408, says 409, wrong.\n\nVerification: No"
    assert told[1] == Check()


async def test_chains_count_as_samples_of_the_request() -> None:
    sampler = Scripted([verdict(i, 0.5) for i in range(3)])
    run = run_of(sampler)
    await scores(verifier(), ["a", "b", "c"], run)
    assert [one.role for one in run.in_order()] == ["verification"] * 3
    assert sum(usage.completion_tokens for usage in run.usages) == 30
