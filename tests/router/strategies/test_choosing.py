"""Strategies that choose among the samples of one prompt: mbr, universal_consistency, rejection_sampling,
first_finish, rollouts."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.errors import BadRequest, Unavailable
from router.sampler import Sample
from router.strategies import acceptance
from router.strategies.rejection_sampling import RejectionSamplingOptions
from router.strategies.universal_consistency import picked
from tests.router.strategies.scripted import Scripted, ask, sample


def texts(*said: str) -> list[Sample]:
    return [sample(index, text) for index, text in enumerate(said)]


# Minimum Bayes risk


async def test_mbr_returns_the_sample_most_like_the_others() -> None:
    sampler = Scripted(texts("red fish", "the cat sat here", "the cat sat", "the cat slept"))
    answer, _ = await ask("mbr", sampler)
    assert answer.report["chosen"] == 2
    assert max(answer.report["utilities"], key=answer.report["utilities"].get) == 2


async def test_mbr_compares_texts_without_their_thinking() -> None:
    said = texts("<think>a b c d</think>x y", "<think>a b c d</think>z w", "x y")
    answer, _ = await ask("mbr", Scripted(said), utility="exact")
    assert (answer.report["chosen"], answer.report["utilities"][1]) == (0, pytest.approx(1 / 3, abs=1e-6))


@given(st.lists(st.sampled_from(["4", "5", "50%", "1/2", "none"]), min_size=1, max_size=10))
def test_exact_mbr_over_answers_is_a_majority_vote(answers: list[str]) -> None:
    said = texts(*("no" if a == "none" else f"The answer is {a}." for a in answers))

    async def both() -> tuple[Any, Any]:
        mbr, _ = await ask("mbr", Scripted(said), utility="exact", over="answer")
        vote, _ = await ask("self_consistency", Scripted(said), early_stop=False)
        return mbr.report, vote.report

    mbr, vote = asyncio.run(both())
    if vote["answer"] is None:
        assert "no sample has an answer" in mbr["note"]
    else:
        assert mbr["chosen"] in vote["votes"][0]["samples"]


async def test_the_deadline_cuts_the_comparison_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.strategies.run.Run.left_s", 0.0)
    answer, _ = await ask("mbr", Scripted(texts("a", "b", "b")), deadline_s=60)
    assert (answer.report["stopped_early"], answer.report["chosen"]) == ("deadline", 0)


# Universal self-consistency


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The most consistent response is Response 2", 2),
        ("the most consistent response is: **Response 3**, as it agrees with Response 1.", 3),
        ("<think>Response 1?</think>The most consistent response is 2.", 2),
        ("Response 2", 2),
        (" 3. ", 3),
        ("Responses 1 and 3 agree, response 2 does not.", None),
        ("The most consistent response is Response 0", None),
        ("The most consistent response is Response 4", None),
        ("The most consistent response is Response 99999", None),
        ("All of them.", None),
        ("", None),
    ],
)
def test_a_pick_is_read_or_it_is_none(text: str, number: int | None) -> None:
    assert picked(text, 3) == number


POEMS = (
    "roses are red",
    "roses are really red",
    "violets are blue",
    "The most consistent response is Response 3",
)


async def test_the_model_picks() -> None:
    sampler = Scripted(texts(*POEMS))
    body = {
        "messages": [{"role": "user", "content": "A poem?"}],
        "response_format": {"type": "json_object"},
        "max_tokens": 9,
    }
    answer, events = await ask("universal_consistency", sampler, body, n=3)
    assert (answer.report["chosen"], answer.report["selected_by"]) == (2, "model")
    assert answer.choice["message"]["content"] == "violets are blue"
    asked, n = sampler.opened[1]
    assert (n, asked["temperature"], asked["max_tokens"], "response_format" in asked) == (1, 0, 9, False)
    assert sampler.prompts[1].startswith("A poem?\n")
    assert "Response 1: roses are red\n\nResponse 2: roses are really red" in sampler.prompts[1]
    assert [one.get("role") for one in answer.report["samples"]] == [None, None, None, "selection"]
    assert answer.report["tokens"] == 40, "the tokens of the call that picks count"
    assert len(answer.usages) == 2, "two prompts"
    assert events[-2]["role"] == "selection"


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("All of them.", {}),
        ("Response 3", {"budget_tokens": 30}),
        ("Response 3", {"errors": {3: Unavailable("no worker")}}),
    ],
)
async def test_without_a_pick_the_medoid_is_returned(said: str, more: dict[str, Any]) -> None:
    errors = more.pop("errors", None)
    sampler = Scripted(texts(*POEMS[:3], said), errors=errors)
    answer, _ = await ask("universal_consistency", sampler, n=3, **more)
    assert (answer.report["chosen"], answer.report["selected_by"]) == (0, "medoid")
    assert bool(more) == (answer.report["stopped_early"] == "budget_tokens")


async def test_one_response_needs_no_pick() -> None:
    sampler = Scripted([sample(0, "a"), sample(1, "b", state="failed"), sample(2, "Response 1")])
    answer, _ = await ask("universal_consistency", sampler, n=2)
    assert (sampler.waves, answer.report["selected_by"]) == ([2], "only")


# Rejection sampling


async def test_it_draws_until_a_sample_passes() -> None:
    said = texts(*["The answer is 5."] * 6, "The answer is 4.0", *["The answer is 4"] * 9)
    sampler = Scripted(said)
    answer, _ = await ask("rejection_sampling", sampler, expected="8/2", wave=4, growth=1)
    assert sampler.waves == [4, 4]
    assert (answer.report["accepted"], answer.report["chosen"]) == ([6, 7], 6)
    assert answer.report["stopped_early"] == "accepted"


async def test_the_first_accepted_in_submission_order_is_returned() -> None:
    said = texts("no", "The answer is 4", "4 it is", "no")
    answer, _ = await ask("rejection_sampling", Scripted(said[::-1]), expected="4")
    assert answer.report["chosen"] == 1


async def test_several_can_be_wanted_and_all_checks_must_pass() -> None:
    said = texts("cat 4", "dog 4", "cat 5", "cat 4", "cat 4", "cat 4")
    sampler = Scripted(said)
    answer, _ = await ask(
        "rejection_sampling", sampler, expected="4", accept_regex="cat", wanted=2, wave=2, growth=1
    )
    assert (sampler.waves, answer.report["accepted"]) == ([2, 2], [0, 3])


SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


async def test_a_schema_accepts() -> None:
    said = texts('{"town": 1}', '{"city": 1}', 'Here:\n```json\n{"city": "Bern"}\n```', "Bern")
    answer, _ = await ask("rejection_sampling", Scripted(said), accept_schema=SCHEMA)
    assert answer.report["accepted"] == [2]


async def test_if_none_passes_the_most_confident_is_returned_and_the_report_says_so() -> None:
    said = [sample(0, "a", -5.0), sample(1, "b", -1.0), sample(2, "c", -3.0)]
    answer, _ = await ask("rejection_sampling", Scripted(said), accept_regex="z", wave=2)
    assert (answer.report["chosen"], answer.report["accepted"]) == (1, [])
    assert "no sample was accepted" in answer.report["note"]
    assert answer.report["stopped_early"] is None


async def test_without_early_stop_it_generates_all() -> None:
    answer, _ = await ask("rejection_sampling", Scripted(texts(*["4"] * 6)), expected="4", early_stop=False)
    assert answer.report["accepted"] == list(range(6))


async def test_the_soft_form_accepts_by_reward_and_seed() -> None:
    said = [sample(i, "x", -10.0 * i) for i in range(200)]

    async def accepted(seed: int) -> list[int]:
        body = {"prompt": "x", "seed": seed}
        answer, _ = await ask("rejection_sampling", Scripted(said), body, beta=20.0)
        found: list[int] = answer.report["accepted"]
        return found

    first = await accepted(1)
    assert first == await accepted(1) != await accepted(2)
    assert first[0] == 0, "the best is always accepted"
    expected = sum(math.exp(-i / 20) for i in range(200))
    assert len(first) == pytest.approx(expected, abs=4 * math.sqrt(expected))


async def test_the_soft_form_draws_one_group() -> None:
    sampler = Scripted(texts(*["a"] * 9))
    answer, _ = await ask("rejection_sampling", sampler, beta=1.0, accept_regex="a")
    assert sampler.waves == [9]
    assert answer.report["accepted"] == list(range(9)), "equal rewards are all the best"
    assert RejectionSamplingOptions(n=9, beta=1.0).slots == 9


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"accept_regex": "("}, "reasoning.accept_regex"),
        ({"accept_schema": {"type": "nonsense"}}, "reasoning.accept_schema"),
        ({"accept_schema": {"$ref": "https://example.com/schema.json"}}, "reasoning"),
        ({"accept_schema": {"$ref": "#"}}, "reasoning"),
        ({}, "reasoning"),
    ],
)
async def test_a_check_that_cannot_be_made_is_refused_before_anything_runs(
    options: dict[str, Any], param: str
) -> None:
    sampler = Scripted(texts("a"))
    with pytest.raises(BadRequest) as caught:
        await ask("rejection_sampling", sampler, **options)
    assert caught.value.param == param
    assert not sampler.opened


async def test_after_the_deadline_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance.Gate, "_fits", None)
    monkeypatch.setattr("router.strategies.run.Run.left_s", 0.0)
    answer, _ = await ask("rejection_sampling", Scripted(texts("4")), expected="4")
    assert answer.report["accepted"] == []


# First finish


async def test_the_first_to_finish_wins_and_the_others_are_cancelled() -> None:
    said = [sample(2, "5"), sample(0, "4"), sample(1, "4")]
    sampler = Scripted(said, hang_from=1)
    answer, _ = await ask("first_finish", sampler)
    assert (answer.report["answer"], answer.report["finishers"]) == ("5", [2])
    assert (answer.report["stopped_early"], answer.report["samples_cancelled"]) == ("first_finish", 2)


async def test_the_first_few_vote_and_later_ones_do_not() -> None:
    said = [sample(3, "5"), sample(1, "x", state="failed"), sample(2, "4"), sample(4, "5"), sample(0, "4")]
    answer, _ = await ask("first_finish", Scripted(said), finishers=3, early_stop=False)
    assert answer.report["answer"] == "5"
    assert answer.report["finishers"] == [3, 2, 4]


async def test_a_finisher_without_an_answer_is_still_the_first() -> None:
    said = [sample(1, "none", -9.0), sample(0, "4", -1.0)]
    answer, _ = await ask("first_finish", Scripted(said), early_stop=False)
    assert answer.report["chosen"] == 1


# Rollouts


def rollout(index: int, logprobs: list[float], chat: bool = True, **fields: Any) -> Sample:
    content = [{"token": "t", "logprob": p, "bytes": [116]} for p in logprobs]
    told = {"content": content} if chat else {"token_logprobs": logprobs, "tokens": ["t"] * len(logprobs)}
    made = sample(index, "text", sum(logprobs), len(logprobs), **fields)
    return Sample(**{name: getattr(made, name) for name in Sample.__slots__ if name != "choice"}, choice={
        **made.choice, "token_ids": list(range(len(logprobs))), "logprobs": told,
    })  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
async def test_each_rollout_has_tokens_logprobs_reward_and_advantage(chat: bool) -> None:
    said = [
        rollout(1, [-3.0], chat),
        rollout(0, [-0.5, -1.5], chat),
        rollout(2, [-1.0], chat, state="failed", error="lost"),
    ]
    sampler = Scripted(said)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]} if chat else {"prompt": "?"}
    answer, _ = await ask("rollouts", sampler, body)
    first, second, lost = answer.report["samples"]
    assert (first["token_ids"], first["logprobs"], first["reward"]) == ([0, 1], [-0.5, -1.5], -1.0)
    assert (first["advantage"], second["advantage"]) == (1.0, -1.0)
    assert "token_ids" not in lost
    assert (answer.report["chosen"], answer.report["reward"]) == (0, -1.0)
    sent, _ = sampler.opened[0]
    assert sent == {**body, "temperature": 1.0, "return_token_ids": True, "logprobs": True if chat else 0}
    json.dumps(answer.report, allow_nan=False)


async def test_what_the_client_asks_of_logprobs_is_kept() -> None:
    sampler = Scripted([rollout(0, [-1.0], False)])
    await ask("rollouts", sampler, {"prompt": "?", "logprobs": 5})
    assert sampler.opened[0][0]["logprobs"] == 5


async def test_equal_or_unknown_rewards_have_no_advantage() -> None:
    answer, _ = await ask("rollouts", Scripted([rollout(0, [-1.0]), rollout(1, [-1.0])]))
    assert [one["advantage"] for one in answer.report["samples"]] == [0.0, 0.0]
    answer, _ = await ask("rollouts", Scripted([sample(0, "a", None)]))
    assert answer.report["samples"][0]["advantage"] is None
    assert answer.report["samples"][0]["logprobs"] is None
