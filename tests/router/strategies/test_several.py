"""Strategies over several models: ensemble and cascade."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from braid.errors import BadRequest, DeadlineExceeded, Unavailable, UpstreamFailed
from router import strategies
from router.sampler import Sample
from tests.router.strategies.scripted import Scripted, ask, sample
from tests.router.verifiers.chains import verdict

TWO = ["small", "large"]


def says(*answers: int | str, first: int = 0, **fields: Any) -> list[Sample]:
    return [sample(first + i, f"The answer is {a}." if a else "", **fields) for i, a in enumerate(answers)]


def asked(sampler: Scripted) -> list[tuple[str, int]]:
    return [(body["model"], n) for body, n in sampler.opened]


# Ensemble


async def test_an_ensemble_draws_n_of_each_model_side_by_side_and_the_majority_wins() -> None:
    sampler = Scripted(says(4, 5, 5, 7, 5, 5))
    got, _ = await ask("ensemble", sampler, n=3, models=TWO, early_stop=False)
    assert asked(sampler) == [("small", 3), ("large", 3)]
    assert sampler.most_open == 2
    assert (got.report["answer"], got.report["votes"][0]["votes"]) == ("5", 4)
    assert [one["model"] for one in got.report["samples"]] == ["small"] * 3 + ["large"] * 3
    assert got.report["models"] == [
        {"model": "small", "samples": 3, "finished": 3, "tokens": 30, "answer": "5"},
        {"model": "large", "samples": 3, "finished": 3, "tokens": 30, "answer": "5"},
    ]


async def test_both_models_prompts_and_tokens_are_counted() -> None:
    got, _ = await ask("ensemble", Scripted(says(4, 4)), n=1, models=TWO)
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in got.usages] == [(14, 20)]
    assert got.report["tokens"] == 20


async def test_a_models_weight_counts() -> None:
    answers = says(4, 4, 5, 5)
    got, _ = await ask("ensemble", Scripted(answers), n=2, models=TWO, weights={"small": 0.5})
    assert (got.report["answer"], got.report["confidence"]) == ("5", pytest.approx(2 / 3, abs=1e-6))


async def test_an_ensemble_ends_once_the_rest_cannot_change_the_winner() -> None:
    sampler = Scripted(says(4, 4, 4, 5), hang_from=3)
    got, _ = await ask("ensemble", sampler, n=2, models=TWO)
    assert (got.report["stopped_early"], got.report["samples_cancelled"]) == ("decided", 1)


async def test_a_model_that_cannot_be_served_leaves_the_others() -> None:
    sampler = Scripted(says(4, 4, 5, 5), errors={0: Unavailable("none is ready")})
    got, _ = await ask("ensemble", sampler, n=2, models=TWO)
    assert got.report["answer"] == "5"
    assert [one["finished"] for one in got.report["models"]] == [0, 2]


async def test_a_weight_of_another_model_is_refused() -> None:
    with pytest.raises(BadRequest, match="weights") as refused:
        await ask("ensemble", Scripted(says(4)), n=1, models=["small"], weights={"other": 1})
    assert refused.value.param == "reasoning.weights.other"


def test_slots_are_of_all_models_for_an_ensemble_and_of_one_for_a_cascade() -> None:
    assert strategies.get("ensemble").parse({"n": 3, "models": TWO}).slots == 6
    assert strategies.get("cascade").parse({"n": 3, "final_n": 5, "models": TWO}).slots == 5


@pytest.mark.parametrize("name", ["ensemble", "cascade"])
async def test_models_must_be_named_and_each_once(name: str) -> None:
    with pytest.raises(BadRequest, match="model_order"):
        await ask(name, Scripted(says(4, 4)))
    with pytest.raises(ValidationError, match="twice"):
        strategies.get(name).options.model_validate({"models": ("a", "a")})


# Cascade


async def test_an_answer_that_most_samples_give_is_accepted_and_the_dear_model_not_asked() -> None:
    sampler = Scripted(says(4, 4, 5, 4))
    got, _ = await ask("cascade", sampler, n=4, models=TWO, threshold=0.75)
    assert asked(sampler) == [("small", 4)]
    assert (got.report["answer"], got.report["model"], got.report["confidence"]) == ("4", "small", 0.75)
    assert got.report["models"] == [
        {"model": "small", "samples": 4, "tokens": 40, "answer": "4", "accepted": True, "score": 0.75}
    ]
    assert sampler.opened[0][0]["temperature"] == 1.0


async def test_an_answer_that_too_few_give_goes_on_to_the_next_model() -> None:
    sampler = Scripted([*says(4, 4, 5, 6), *says(7, first=4)])
    got, _ = await ask("cascade", sampler, n=4, models=TWO)
    assert asked(sampler) == [("small", 4), ("large", 1)]
    assert (got.report["answer"], got.report["model"], got.report["tokens"]) == ("7", "large", 50)
    assert [(m["answer"], m["score"], m["accepted"]) for m in got.report["models"]] == [
        ("4", 0.5, False),
        ("7", None, True),
    ]
    assert got.report["votes"] == [{"answer": "7", "votes": 1, "weight": 1.0, "samples": [4]}]
    assert [usage.prompt_tokens for usage in got.usages] == [7, 7]


async def test_a_single_sample_is_greedy_unless_a_temperature_is_given() -> None:
    for given, used in ((None, 0.0), (0.3, 0.3)):
        sampler = Scripted(says(4))
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "2+2?"}]}
        body = chat if given is None else {**chat, "temperature": given}
        await ask("cascade", sampler, body, n=2, models=["large"])
        assert sampler.opened[0][0]["temperature"] == used


async def test_samples_without_an_answer_agree_with_none() -> None:
    sampler = Scripted([*says(4, "", "", ""), *says(7, first=4)])
    got, _ = await ask("cascade", sampler, n=4, models=TWO)
    assert (got.report["models"][0]["score"], got.report["answer"]) == (0.25, "7")


async def test_the_rest_is_cancelled_once_it_cannot_undo_that_the_answer_is_accepted() -> None:
    sampler = Scripted(says(4, 4, 4, 5), hang_from=3)
    got, _ = await ask("cascade", sampler, n=4, models=TWO)
    assert (got.report["stopped_early"], got.report["answer"]) == ("accepted", "4")
    assert len(asked(sampler)) == 1


@pytest.mark.parametrize(("threshold", "answer"), [(0.3, "4"), (0.5, "7")])
async def test_a_sample_is_judged_by_its_mean_probability(threshold: float, answer: str) -> None:
    sampler = Scripted([sample(0, "The answer is 4.", logprob=-10.0), *says(7, first=1)])
    got, _ = await ask("cascade", sampler, n=1, models=TWO, by="margin", threshold=threshold)
    assert got.report["models"][0]["score"] == pytest.approx(0.367879, abs=1e-6)
    assert got.report["answer"] == answer


@pytest.mark.parametrize(
    ("text", "accepted"), [("2+2=4. The answer is 4.", True), ("2+2=5. It is 5.", False)]
)
async def test_a_verifier_judges_the_best_sample(text: str, accepted: bool) -> None:
    sampler = Scripted([sample(0, text), *says(4, first=1)])
    got, _ = await ask("cascade", sampler, n=1, models=TWO, by="arithmetic")
    assert got.report["models"][0]["accepted"] is accepted
    assert got.report["model"] == ("small" if accepted else "large")


@pytest.mark.parametrize(("p_yes", "model"), [(0.9, "small"), (0.4, "large")])
async def test_a_verification_goes_on_from_the_cheap_models_own_sample(p_yes: float, model: str) -> None:
    sampler = Scripted([*says(4), verdict(1, p_yes), *says(9, first=2)])
    got, _ = await ask("cascade", sampler, n=1, models=TWO, by="self")
    assert [asked_of for asked_of, _ in asked(sampler)][:2] == ["small", "small"]
    assert (sampler.kept[0], sampler.after[1]) == (True, sampler.samples[0])
    first = got.report["models"][0]
    assert (got.report["model"], first["score"], first["tokens"]) == (model, p_yes, 20)


async def test_an_unknown_verifier_is_refused_by_its_option() -> None:
    with pytest.raises(BadRequest) as refused:
        await ask("cascade", Scripted(says(4)), n=1, models=TWO, by="nobody")
    assert refused.value.param == "reasoning.by"


async def test_a_cheap_model_that_cannot_be_served_is_passed_over() -> None:
    sampler = Scripted([*says(4, 4), *says(7, first=2)], errors={0: Unavailable("none is ready")})
    got, _ = await ask("cascade", sampler, n=2, models=TWO)
    assert (got.report["answer"], got.report["models"][0]["error"]) == ("7", "none is ready")
    again = Scripted(says(4, 4), errors={0: Unavailable("none is ready")})
    with pytest.raises(Unavailable):
        await ask("cascade", again, n=2, models=TWO, on_failure="all")


async def test_the_dear_models_failure_leaves_the_cheap_answer_and_says_so() -> None:
    sampler = Scripted([*says(4, 5), *says(7, first=2)], errors={2: Unavailable("none is ready")})
    got, _ = await ask("cascade", sampler, n=2, models=TWO)
    assert (got.report["answer"], got.report["model"], got.report["stopped_early"]) == (
        "4",
        "small",
        "failed",
    )
    assert [m["accepted"] for m in got.report["models"]] == [False, False]


async def test_at_the_budget_the_cheap_answer_counts() -> None:
    sampler = Scripted([*says(4, 5), *says(7, first=2)])
    got, _ = await ask("cascade", sampler, n=2, models=TWO, budget_tokens=20)
    assert (got.report["stopped_early"], got.report["model"]) == ("budget_tokens", "small")


async def test_a_model_amid_the_others_that_cannot_be_served_is_passed_over() -> None:
    """The cheapest model's answer, which was not accepted, was the cascade's."""
    sampler = Scripted(
        [*says(4, 5), *says(6, 6, first=2), *says(7, first=4)], errors={2: Unavailable("none is ready")}
    )
    got, _ = await ask("cascade", sampler, n=2, models=["small", "medium", "large"])
    assert got.report["answer"] == "7"
    assert [one.get("error", "") for one in got.report["models"]] == ["", "none is ready", ""]
    assert got.report["stopped_early"] is None
    again = Scripted(sampler.samples, errors=sampler.errors)
    with pytest.raises(Unavailable, match="none is ready"):
        await ask("cascade", again, n=2, models=["small", "medium", "large"], on_failure="all")


async def test_all_failing_is_an_error_and_a_deadline_is_not_passed_over() -> None:
    failed = [sample(i, state="failed") for i in range(3)]
    with pytest.raises(UpstreamFailed):
        await ask("cascade", Scripted(failed), n=2, models=TWO)
    with pytest.raises(DeadlineExceeded):
        await ask("cascade", Scripted(says(4, 4, 4), entry_delay_s=30), n=2, models=TWO, deadline_s=0.05)


async def test_the_last_models_vote_ends_once_decided() -> None:
    sampler = Scripted([*says(4, 5), *says(7, 7, 8, first=2)], hang_from=4)
    got, _ = await ask("cascade", sampler, n=2, final_n=3, models=TWO)
    assert (got.report["answer"], got.report["stopped_early"]) == ("7", "decided")


def test_one_sample_has_nothing_to_agree_with() -> None:
    with pytest.raises(BadRequest, match="agreement needs"):
        strategies.get("cascade").parse({"n": 1, "models": TWO})
