"""Strategies that choose by a verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from braid.errors import BadRequest, DeadlineExceeded, Unavailable, UpstreamFailed
from router import strategies
from router.sampler import Sample
from router.strategies.run import Run
from router.strategies.scored import Scored
from router.verifiers import Check
from tests.router.strategies.scripted import Scripted, ask, sample
from tests.router.verifiers.chains import verdict


class Table:
    """A verifier that knows the score of each text."""

    name = "table"

    def __init__(self, scores: Mapping[str, float | None], words: str = "") -> None:
        self.scores = scores
        self.words = words
        self.asked: list[list[int]] = []

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        return [one.score for one in await self.check(run, body, samples)]

    async def check(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[Check]:
        self.asked.append([one.sample.index for one in samples])
        return [Check(self.scores.get(one.sample.text), self.words) for one in samples]


def answers(*texts: str, **fields: Any) -> list[Sample]:
    return [sample(index, text, **fields) for index, text in enumerate(texts)]


def by_table(samples: Sequence[Sample], scores: Mapping[str, float | None], **more: Any) -> Scripted:
    sampler = Scripted(samples, **more)
    sampler.verifiers["table"] = Table(scores)
    return sampler


def asked(sampler: Scripted) -> list[list[int]]:
    table = sampler.verifiers["table"]
    assert isinstance(table, Table)
    return table.asked


FOURS = answers("The answer is 4.", "The answer is 5.", "It is 4. The answer is 4.")

# GenRM


def verified(*ps: float, said: Sequence[Sample] = FOURS) -> list[Sample]:
    """Answers, then the verdicts on them."""
    return [*said, *(verdict(len(said) + place, p) for place, p in enumerate(ps))]


async def test_genrm_returns_the_most_probably_right_sample() -> None:
    sampler = Scripted(verified(0.2, 0.4, 0.9, 0.7, 0.5, 0.1))
    answer, events = await ask("genrm", sampler, n=3, k=2)
    assert (answer.report["chosen"], answer.report["answer"]) == (1, "5")
    assert answer.report["score"] == pytest.approx(0.8)
    assert [one.get("score") for one in answer.report["samples"][:3]] == [
        pytest.approx(0.3),
        pytest.approx(0.8),
        pytest.approx(0.3),
    ]
    assert answer.report["tokens"] == 90
    assert len(answer.usages) == 2
    assert events[-1]["event"] == "decided"


async def test_genrm_can_add_up_the_scores_of_an_answer() -> None:
    sampler = Scripted(verified(0.4, 0.7, 0.4))
    answer, _ = await ask("genrm", sampler, n=3, k=1, select="sum")
    assert answer.report["answer"] == "4"
    assert answer.report["votes"][0]["weight"] == pytest.approx(0.8)
    assert answer.report["confidence"] == pytest.approx(0.8 / 1.5, abs=1e-6)


async def test_each_verification_says_what_it_is_of() -> None:
    sampler = Scripted([*FOURS, verdict(3, 0.2), sample(4, "well"), verdict(5, 0.9)])
    answer, _ = await ask("genrm", sampler, n=3, k=1)
    told = [(one.get("role"), one.get("of"), one.get("p_yes")) for one in answer.report["samples"]]
    assert told[:3] == [(None, None, None)] * 3
    assert told[3:] == [
        ("verification", 0, pytest.approx(0.2)),
        ("verification", 1, None),
        ("verification", 2, pytest.approx(0.9)),
    ]
    assert answer.report["chosen"] == 2


async def test_verifications_go_on_from_kept_answers_side_by_side() -> None:
    sampler = Scripted(verified(0.1, 0.2, 0.3))
    await ask("genrm", sampler, n=3, k=1)
    assert sampler.kept == [True, False, False, False]
    assert sampler.after == [None, *FOURS]
    assert sampler.most_open == 3
    turns = [body["messages"] for body, _ in sampler.opened]
    assert all(turn[:1] == turns[0] for turn in turns[1:])
    assert [turn[1]["content"] for turn in turns[1:]] == [one.text for one in FOURS]


async def test_failed_samples_are_not_verified() -> None:
    said = [sample(0, state="failed", tokens=0), *FOURS[1:]]
    sampler = Scripted(verified(0.1, 0.2, said=said))
    answer, _ = await ask("genrm", sampler, n=3, k=1)
    assert (len(sampler.opened), answer.report["chosen"]) == (3, 2)


@pytest.mark.parametrize("select", ["max", "sum"])
async def test_without_a_single_verdict_the_majority_is_returned(select: str) -> None:
    sampler = Scripted([*FOURS, *(sample(i, "well") for i in (3, 4, 5))])
    answer, _ = await ask("genrm", sampler, n=3, k=1, select=select)
    assert answer.report["answer"] == "4"
    assert "the majority" in answer.report["note"]


@pytest.mark.parametrize("select", ["max", "sum"])
async def test_without_verdicts_or_answers_a_sample_is_returned(select: str) -> None:
    sampler = Scripted([*answers("hm", "so"), sample(2, "well"), sample(3, "well")])
    answer, _ = await ask("genrm", sampler, n=2, k=1, select=select)
    assert (answer.report["chosen"], "no sample has an answer" in answer.report["note"]) == (0, True)


async def test_a_budget_spent_on_answers_leaves_the_majority() -> None:
    sampler = Scripted(FOURS)
    answer, _ = await ask("genrm", sampler, n=3, k=1, budget_tokens=30)
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("4", "budget_tokens")
    assert len(sampler.opened) == 1


async def test_a_budget_hit_inside_verification_counts_what_ended() -> None:
    samples = verified(0.1, 0.9, 0.8)
    sampler = Scripted(samples, hang_from=5)
    answer, _ = await ask("genrm", sampler, n=3, k=1, budget_tokens=45)
    assert (answer.report["stopped_early"], answer.report["chosen"]) == ("budget_tokens", 1)
    assert [one["state"] for one in answer.report["samples"]].count("stopped_early") == 1
    assert answer.report["tokens"] == 60


async def test_a_deadline_inside_verification_gives_the_best_so_far() -> None:
    sampler = Scripted(verified(0.3, 0.9, 0.8), hang_from=4)
    answer, _ = await ask("genrm", sampler, n=3, k=1, deadline_s=0.5)
    assert (answer.report["stopped_early"], answer.report["chosen"]) == ("deadline", 0)
    assert answer.report["samples_cancelled"] == 2


async def test_a_deadline_before_any_answer_is_an_error() -> None:
    with pytest.raises(DeadlineExceeded):
        await ask("genrm", Scripted(FOURS, hang_from=0), n=3, k=1, deadline_s=0.05)


async def test_a_lost_verification_costs_its_own_sample_only() -> None:
    sampler = Scripted(verified(0.3, 0.9, 0.8), errors={4: Unavailable("gone")})
    answer, _ = await ask("genrm", sampler, n=3, k=1)
    assert (answer.report["chosen"], answer.report["samples"][4]["state"]) == (2, "failed")


async def test_if_no_verification_can_run_the_answers_stand() -> None:
    sampler = Scripted(verified(0.3, 0.9, 0.8), errors={i: Unavailable("gone") for i in (3, 4, 5)})
    answer, _ = await ask("genrm", sampler, n=3, k=1)
    assert (answer.report["answer"], answer.report["stopped_early"]) == ("4", "failed")


async def test_on_failure_all_holds_for_verifications() -> None:
    samples = [*FOURS, verdict(3, 0.5), sample(4, state="failed", tokens=0), verdict(5, 0.5)]
    with pytest.raises(UpstreamFailed):
        await ask("genrm", Scripted(samples), n=3, k=1, on_failure="all")


async def test_genrm_needs_a_verifier_that_generates() -> None:
    sampler = Scripted(FOURS)
    with pytest.raises(BadRequest, match="generative"):
        await ask("genrm", sampler, n=3, verifier="arithmetic")
    assert sampler.opened == []


def test_genrm_holds_slots_for_verifications_side_by_side() -> None:
    parse = strategies.get("genrm").parse
    assert [parse(given).slots for given in ({"n": 4, "k": 4}, {"n": 32, "k": 4}, {"n": 100, "k": 2})] == [
        16,
        64,
        100,
    ]


# Any verifier by name


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("genrm", "verifier"),
        ("best_of_n", "reward"),
        ("self_consistency", "weight"),
        ("rejection_sampling", "verifier"),
        ("self_refine", "verifier"),
        ("tools", "verifier"),
    ],
)
async def test_an_unknown_verifier_is_refused_before_anything_is_drawn(name: str, option: str) -> None:
    sampler = Scripted(answers("a"))
    with pytest.raises(BadRequest, match="self, arithmetic, logprob") as caught:
        await ask(name, sampler, None, **{"n": 1, option: "nope"})
    assert (caught.value.param, sampler.opened) == (f"reasoning.{option}", [])


@pytest.mark.parametrize("name", ["http://evil/", "../x", "A", ""])
def test_a_url_is_no_name(name: str) -> None:
    with pytest.raises(BadRequest):
        strategies.get("best_of_n").parse({"reward": name})


# Best of n


async def test_the_best_is_what_the_verifier_scores_highest() -> None:
    sampler = by_table(answers("a", "b", "c", "d"), {"a": 0.5, "b": 0.9, "c": None, "d": 0.1})
    answer, _ = await ask("best_of_n", sampler, reward="table")
    assert (answer.report["chosen"], answer.report["reward"]) == (1, 0.9)
    assert [one.get("score") for one in answer.report["samples"]] == [0.5, 0.9, None, 0.1]
    assert sampler.kept == [False], "an answer is kept only for a verifier that goes on from it"


async def test_of_equal_scores_the_most_confident_wins() -> None:
    said = [sample(0, "a", logprob=-5.0), sample(1, "b", logprob=-1.0), sample(2, "c", logprob=-1.0)]
    answer, _ = await ask("best_of_n", by_table(said, dict.fromkeys("abc", 1.0)), reward="table")
    assert answer.report["chosen"] == 1


async def test_without_scores_the_most_confident_is_returned_and_it_says_so() -> None:
    said = [sample(0, "a", logprob=-5.0), sample(1, "b", logprob=-1.0)]
    answer, _ = await ask("best_of_n", by_table(said, {}), reward="table")
    assert (answer.report["chosen"], answer.report["reward"]) == (1, None)
    assert "scored no sample" in answer.report["note"]


async def test_a_generative_reward_verifies_each_sample() -> None:
    sampler = Scripted(verified(0.3, 0.9, 0.8))
    answer, _ = await ask("best_of_n", sampler, n=3, reward="self")
    assert (answer.report["chosen"], sampler.kept) == (1, [True, False, False, False])
    assert [one.get("role") for one in answer.report["samples"]] == [None] * 3 + ["verification"] * 3


async def test_after_the_deadline_no_verifier_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.strategies.run.Run.left_s", 0.0)
    sampler = by_table(answers("a", "b"), {"a": 1.0})
    answer, _ = await ask("best_of_n", sampler, reward="table")
    assert (asked(sampler), answer.report["stopped_early"]) == ([], "deadline")


# Weighted votes


async def test_a_vote_weighs_its_score() -> None:
    said = answers("The answer is 4.", "The answer is 5.", "The answer is 4.")
    scores = {"The answer is 4.": 0.2, "The answer is 5.": 0.9}
    answer, _ = await ask("self_consistency", by_table(said, scores), weight="table")
    assert (answer.report["answer"], answer.report["votes"][0]["weight"]) == ("5", 0.9)
    assert answer.report["samples"][0]["score"] == 0.2


async def test_a_vote_without_a_score_does_not_count() -> None:
    said = answers("The answer is 4.", "The answer is 5.", "The answer is 4.", "none")
    sampler = by_table(said, {"The answer is 5.": 0.1})
    answer, _ = await ask("self_consistency", sampler, weight="table")
    assert [one["answer"] for one in answer.report["votes"]] == ["5"]
    assert asked(sampler) == [[0, 1, 2]], "a sample without an answer is not scored"


async def test_where_all_agree_nothing_is_verified() -> None:
    said = answers("The answer is 4.", "It is 4. The answer is 4.")
    sampler = by_table(said, {})
    answer, _ = await ask("self_consistency", sampler, weight="table")
    assert (answer.report["answer"], asked(sampler)) == ("4", [])
    await ask("self_consistency", sampler := by_table(said, {}), weight="table", early_stop=False)
    assert asked(sampler) == [[0, 1]]


async def test_without_scores_all_votes_weigh_the_same() -> None:
    answer, _ = await ask("self_consistency", by_table(FOURS, {}), weight="table")
    assert (answer.report["answer"], "weigh the same" in answer.report["note"]) == ("4", True)


async def test_without_answers_there_is_nothing_to_weigh() -> None:
    answer, _ = await ask(
        "self_consistency", by_table(answers("hm", "so"), {}), weight="table", early_stop=False
    )
    assert "no sample has an answer" in answer.report["note"]


# Rejection sampling


async def test_a_sample_is_accepted_from_the_threshold_on() -> None:
    said = answers("a", "b", "c", "d")
    sampler = by_table(said, {"a": 0.49, "b": None, "c": 0.5, "d": 1.0})
    answer, _ = await ask("rejection_sampling", sampler, verifier="table", wave=4)
    assert (answer.report["accepted"], answer.report["chosen"]) == ([2, 3], 2)
    assert [one.get("score") for one in answer.report["samples"]] == [0.49, None, 0.5, 1.0]


async def test_the_verifier_is_asked_only_where_the_other_checks_pass() -> None:
    sampler = by_table(answers("ab", "b", "ac"), {"ab": 0.1, "ac": 0.9})
    answer, _ = await ask("rejection_sampling", sampler, verifier="table", accept_regex="a", wave=4)
    assert (asked(sampler), answer.report["accepted"]) == ([[0, 2]], [2])


async def test_verifications_are_no_candidates() -> None:
    said = [sample(0, "a"), sample(1, "b"), verdict(2, 0.1), verdict(3, 0.2), sample(4, "c"), verdict(5, 0.9)]
    answer, _ = await ask("rejection_sampling", Scripted(said), n=3, verifier="self", wave=2)
    assert (answer.report["accepted"], answer.report["chosen"]) == ([4], 4)


async def test_if_none_is_accepted_the_highest_score_is_returned() -> None:
    sampler = by_table(answers("a", "b", "c"), {"a": 0.1, "b": 0.3})
    answer, _ = await ask("rejection_sampling", sampler, verifier="table")
    assert (answer.report["chosen"], "no sample was accepted" in answer.report["note"]) == (1, True)


async def test_the_soft_form_takes_the_score_as_its_reward() -> None:
    said = [sample(0, "a", logprob=-1.0), sample(1, "b", logprob=-9.0), sample(2, "c")]
    sampler = by_table(said, {"a": 0.1, "b": 0.9})
    answer, _ = await ask("rejection_sampling", sampler, verifier="table", beta=1e-6)
    assert answer.report["accepted"] == [1]


# Self-refine


async def test_a_verifier_accepts_the_draft() -> None:
    sampler = by_table(answers("good"), {"good": 0.5})
    answer, _ = await ask("self_refine", sampler, verifier="table")
    assert (answer.report["accepted"], answer.report["stopped_early"]) == (True, "accepted")
    assert answer.report["samples"][0]["score"] == 0.5


async def test_what_a_verifier_says_is_the_feedback() -> None:
    sampler = Scripted(answers("1+1=3", "1+1=2"))
    answer, _ = await ask("self_refine", sampler, n=1, verifier="arithmetic", threshold=1.0)
    assert (answer.report["chosen"], answer.report["rounds"], answer.report["accepted"]) == (1, 1, True)
    assert "1+1 = 2, not 3." in sampler.prompts[1]
    assert sampler.after[1] == sampler.samples[0]


async def test_a_verifier_without_words_gives_its_score() -> None:
    sampler = by_table(answers("bad", "bad", "good"), {"bad": 0.25, "good": 1.0})
    answer, _ = await ask("self_refine", sampler, n=1, verifier="table", rounds=2)
    assert "0.25 of 1" in sampler.prompts[1]
    assert (answer.report["rounds"], answer.report["accepted"]) == (2, False), "the last is not checked again"


async def test_without_a_score_the_draft_stands() -> None:
    answer, _ = await ask("self_refine", by_table(answers("a"), {}), verifier="table")
    assert (answer.report["rounds"], answer.report["accepted"]) == (0, False)


# Tools


async def test_the_check_selects() -> None:
    sampler = by_table(answers("a", "b", "c"), {"a": 0.5, "b": 1.0, "c": 1.0})
    answer, _ = await ask("tools", sampler, verifier="table")
    assert (answer.report["chosen"], answer.report["passed"], answer.report["rounds"]) == (1, True, 0)
    assert answer.report["stopped_early"] == "accepted"


async def test_what_the_check_finds_corrects_the_best() -> None:
    sampler = Scripted([*answers("1+1=3. 2+2=4", "1+1=3"), sample(2, "1+1=2")])
    answer, _ = await ask("tools", sampler, n=2)
    assert (answer.report["chosen"], answer.report["passed"], answer.report["rounds"]) == (2, True, 1)
    assert sampler.after[1] == sampler.samples[0]
    assert "1+1 = 2, not 3." in sampler.prompts[1]
    assert [one.get("role") for one in answer.report["samples"]] == [None, None, "correction"]
    assert [one["score"] for one in answer.report["samples"]] == [0.5, 0.0, 1.0]


async def test_a_correction_that_is_worse_is_not_returned() -> None:
    sampler = by_table([*answers("a", "b"), sample(2, "c"), sample(3, "d")], {"a": 0.6, "b": 0.1, "c": 0.2})
    answer, _ = await ask("tools", sampler, n=2, verifier="table", rounds=2)
    assert (answer.report["chosen"], answer.report["passed"], answer.report["rounds"]) == (0, False, 2)
    assert answer.report["stopped_early"] is None


async def test_the_check_may_only_select() -> None:
    sampler = by_table(answers("a", "b"), {"a": 0.6, "b": 0.1})
    answer, _ = await ask("tools", sampler, verifier="table", rounds=0)
    assert (answer.report["chosen"], len(sampler.opened)) == (0, 1)


async def test_without_a_result_the_most_confident_is_returned() -> None:
    said = [sample(0, "a", logprob=-5.0), sample(1, "b", logprob=-1.0)]
    answer, _ = await ask("tools", by_table(said, {}), verifier="table")
    assert (answer.report["chosen"], "scored no sample" in answer.report["note"]) == (1, True)


async def test_a_budget_ends_the_corrections() -> None:
    sampler = Scripted([*answers("1+1=3", "1+1=4"), sample(2, "1+1=2")])
    answer, _ = await ask("tools", sampler, n=2, budget_tokens=20)
    assert (answer.report["stopped_early"], answer.report["rounds"]) == ("budget_tokens", 0)
