"""Confidence of tokens, groups and answers, exactly; and the strategies that go by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.errors import BadRequest, Unavailable
from braid.wire import Watch
from router import strategies
from router.sampler import Sample
from router.strategies.confidence import (
    Position,
    answer_margin,
    as_asked,
    confidences,
    group_confidences,
    last_span,
    margin,
    percentile,
    positions,
    token_confidence,
    trace_confidence,
    with_top,
)
from tests.router.strategies.scripted import Scripted, ask, sample
from tests.router.strategies.stepping import steps, with_logprobs

CHAT = {"messages": [{"role": "user", "content": "2+2?"}]}


# Reading


def test_positions_of_a_chat_are_sorted_as_the_engine_does_not() -> None:
    """The engine puts the sampled token first."""
    made = with_logprobs(sample(0, "b"), [("b", {"b": 0.2, "a": 0.7})])
    assert positions(made.choice) == [Position("b", (("a", math.log(0.7)), ("b", math.log(0.2))))]


def test_positions_of_a_completion() -> None:
    told = {
        "tokens": ["b", "c"],
        "top_logprobs": [{"b": -2.0, "a": -0.1}, None],
        "token_logprobs": [-2.0, -1.0],
    }
    assert positions({"logprobs": told}) == [Position("b", (("a", -0.1), ("b", -2.0))), Position("c", ())]


EMPTY: list[dict[str, Any]] = [{}, {"logprobs": None}, {"logprobs": {"content": None}}]


@pytest.mark.parametrize("choice", EMPTY)
def test_a_choice_without_log_probabilities_has_no_positions(choice: dict[str, Any]) -> None:
    assert positions(choice) == []
    assert confidences(choice, 5) == []


def test_log_probabilities_are_asked_for_as_each_endpoint_wants_them() -> None:
    assert with_top(CHAT, 5) == {**CHAT, "logprobs": True, "top_logprobs": 5}
    assert with_top({**CHAT, "logprobs": True, "top_logprobs": 9}, 5)["top_logprobs"] == 9
    assert with_top({"prompt": "x", "logprobs": 2}, 5) == {"prompt": "x", "logprobs": 5}


def test_log_probabilities_are_returned_only_to_a_client_that_asks() -> None:
    choice: dict[str, Any] = {"logprobs": {"content": []}}
    assert as_asked(choice, CHAT) == {"logprobs": None}
    assert as_asked(choice, {**CHAT, "logprobs": True}) == choice
    assert as_asked(choice, {"prompt": "x", "logprobs": 0}) == choice


# DeepConf's measures


def test_a_token_s_confidence_is_minus_the_mean_of_the_largest() -> None:
    assert token_confidence([-3.0, -0.5, -1.0], 2) == 0.75
    assert token_confidence([-3.0, -0.5, -1.0], 3) == 1.5
    assert token_confidence([-1.0], 20) == 1.0
    assert token_confidence([], 20) == 0.0


def test_a_group_is_a_run_of_so_many_tokens() -> None:
    assert group_confidences([1, 2, 3, 4, 5], 2) == [1.5, 2.5, 3.5, 4.5]
    assert group_confidences([1, 2, 3], 3) == [2]
    assert group_confidences([1, 2], 5) == [1.5], "one group where there are fewer"
    assert group_confidences([], 5) == []


@given(st.lists(st.floats(0, 40), min_size=1, max_size=60), st.integers(1, 70))
def test_sliding_means_are_the_means(tokens: list[float], window: int) -> None:
    width = min(window, len(tokens))
    expected = [math.fsum(tokens[i : i + width]) / width for i in range(len(tokens) - width + 1)]
    assert group_confidences(tokens, window) == pytest.approx(expected, abs=1e-9)


def test_a_sample_s_confidence_by_each_measure() -> None:
    tokens = [4.0, 4.0, 1.0, 1.0, 3.0, 3.0]
    assert trace_confidence(tokens, "lowest_group", 2) == 1.0
    assert trace_confidence(tokens, "tail", 2) == 3.0
    assert (
        trace_confidence(tokens, "tail", 99) == trace_confidence(tokens, "mean", 1) == pytest.approx(16 / 6)
    )
    assert trace_confidence(tokens, "bottom_groups", 2, share=0.4) == 1.5, "of 1, 2, 2, 2.5, 4 the lowest two"
    assert trace_confidence(tokens, "bottom_groups", 2) == 1.0, "one at least"
    assert trace_confidence([], "lowest_group", 2) == 0.0


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([5], 90, 5),
        ([1, 2], 50, 1.5),
        ([3, 1, 2], 0, 1),
        ([3, 1, 2], 100, 3),
        (range(11), 90, 9),
        (range(16), 10, 1.5),
    ],
)
def test_percentiles_interpolate(values: Any, q: float, expected: float) -> None:
    assert percentile(list(values), q) == pytest.approx(expected)


# CoT decoding's margin


def test_a_margin_is_of_the_token_against_the_best_other() -> None:
    def at(token: str, **p: float) -> float:
        return margin(Position(token, tuple((name, math.log(q)) for name, q in p.items())))

    assert at("a", a=0.7, b=0.2) == pytest.approx(0.5)
    assert at("b", a=0.7, b=0.2) == pytest.approx(-0.5)
    assert at("a", a=0.7) == pytest.approx(0.7)
    assert at("c", a=0.7, b=0.2) == pytest.approx(-0.7)


def path(*tokens: tuple[str, float]) -> list[Position]:
    """Tokens and their margins."""
    return [Position(t, ((t, math.log((1 + m) / 2)), ("?", math.log((1 - m) / 2)))) for t, m in tokens]


def test_only_the_answer_s_tokens_count() -> None:
    told = path(("The", 0.1), (" answer is", 0.2), (" ", 0.3), ("1", 0.8), ("6", 0.4), (".", 0.9))
    assert answer_margin(told, "16") == pytest.approx(0.6)
    assert answer_margin(told, "17") is None
    assert answer_margin([], "16") is None


def test_a_token_that_holds_a_part_of_the_answer_counts() -> None:
    assert answer_margin(path(("is 1", 0.8), ("6. End", 0.2), ("x", 0.0)), "16") == pytest.approx(0.5)


def test_the_answer_is_where_it_stands_last() -> None:
    told = path(("4", 0.1), (" or ", 0.9), ("4", 0.5), ("<|im_end|>", 0.9))
    assert answer_margin(told, "4") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "answer", "span"),
    [
        ("is 4, not 14", "4", (3, 4)),
        ("is 4 of 4.5", "4", (3, 4)),
        ("14", "4", (1, 2)),
        ("3.14", "14", (2, 4)),
        ("so 4.", "4", (3, 4)),
        ("x = 5", "x = 5", (0, 5)),
        ("no", "4", None),
        ("no", "", None),
    ],
)
def test_an_answer_is_a_word_of_its_own_if_it_can(text: str, answer: str, span: Any) -> None:
    assert last_span(text, answer) == span


# cot_decoding


def opening(**first: float) -> Sample:
    """The call for one token, whose most probable ones are these."""
    best = max(first, key=lambda token: first[token])
    return with_logprobs(sample(0, best, tokens=1, finish_reason="length"), [(best, first)])


def branch(index: int, answer: str, margin: float) -> Sample:
    """`` so the answer is {answer}.``, each of the answer's tokens with this margin."""
    rest = [(" so the answer is ", 0.99), *((digit, margin) for digit in answer), (".", 0.99)]
    tops = [(token, {token: (1 + m) / 2, "?": (1 - m) / 2}) for token, m in rest]
    return with_logprobs(sample(index, "".join(token for token, _ in rest)), tops)


FIRST = {"The": 0.6, "Let": 0.3, "We": 0.1}


async def branches(
    *made: Sample, first: Any = FIRST, body: Any = CHAT, **options: Any
) -> tuple[Any, Scripted]:
    more = {key: options.pop(key) for key in ("errors", "hang_from") if key in options}
    sampler = Scripted([opening(**first), *made], **more)
    got, _ = await ask("cot_decoding", sampler, body, n=len(first), **options)
    return got, sampler


async def test_each_first_token_is_a_greedy_branch() -> None:
    got, sampler = await branches(branch(1, "5", 0.2), branch(2, "4", 0.9), branch(3, "6", 0.4))
    asked, n = sampler.opened[0]
    assert (asked["max_tokens"], asked["temperature"], asked["top_logprobs"], n) == (1, 0, 3, 1)
    assert sampler.waves == [1, 1, 1, 1]
    assert sampler.prompts == ["2+2?", "The", "Let", "We"]
    assert all(sent["temperature"] == 0 and sent["top_logprobs"] == 2 for sent, _ in sampler.opened[1:])
    assert got.choice["message"]["content"] == "Let so the answer is 4."
    assert got.choice["logprobs"] is None
    assert got.report["branches"] == [
        {"index": 1, "first": "The", "answer": "5", "margin": 0.2},
        {"index": 2, "first": "Let", "answer": "4", "margin": 0.9},
        {"index": 3, "first": "We", "answer": "6", "margin": 0.4},
    ]
    assert (got.report["chosen"], got.report["tokens"]) == (2, 31)


async def test_margins_add_up_or_the_largest_wins() -> None:
    made = [branch(1, "5", 0.5), branch(2, "4", 0.6), branch(3, "5", 0.3)]
    got, _ = await branches(*made)
    assert (got.report["answer"], got.report["chosen"]) == ("5", 1)
    assert [(vote["answer"], vote["weight"]) for vote in got.report["votes"]] == [("5", 0.8), ("4", 0.6)]
    got, _ = await branches(*made, select="best")
    assert (got.report["answer"], got.report["chosen"]) == ("4", 2)


async def test_an_answer_that_is_the_first_token_has_a_margin_too() -> None:
    done = with_logprobs(sample(1, "", tokens=1), [("<|im_end|>", {"<|im_end|>": 0.9, ".": 0.1})])
    got, _ = await branches(done, branch(2, "5", 0.3), first={"4": 0.7, "Let": 0.2})
    assert got.report["branches"][0] == {"index": 1, "first": "4", "answer": "4", "margin": 0.5}
    assert got.choice["message"]["content"] == "4"


async def test_special_tokens_and_pieces_of_characters_are_no_first_tokens() -> None:
    first = {"The": 0.5, "<|im_end|>": 0.2, "</s>": 0.1, "\ufffd": 0.1, "<b>": 0.05}
    _, sampler = await branches(branch(1, "4", 0.5), branch(2, "4", 0.5), first=first)
    assert sampler.prompts[1:] == ["The", "<b>"]


async def test_a_branch_without_an_answer_has_no_margin() -> None:
    none = with_logprobs(sample(1, " I can't say"), [(" I can't say", {" I can't say": 0.9})])
    got, _ = await branches(none, branch(2, "4", 0.1), branch(3, "5", 0.05))
    assert (got.report["answer"], got.report["branches"][0]["margin"]) == ("4", None)
    got, _ = await branches(none, first={"The": 0.9})
    assert got.choice["message"]["content"] == "The I can't say"
    assert "no branch has an answer" in got.report["note"]


async def test_a_branch_that_fails_is_left_out() -> None:
    made = [branch(1, "5", 0.9), branch(2, "4", 0.9), branch(3, "4", 0.5)]
    got, _ = await branches(*made, errors={1: Unavailable("gone")})
    assert (got.report["answer"], [one["index"] for one in got.report["branches"]]) == ("4", [2, 3])


async def test_at_a_bound_the_branches_that_have_ended_decide() -> None:
    made = [branch(1, "5", 0.9), branch(2, "4", 0.95), branch(3, "4", 0.5)]
    got, _ = await branches(*made, hang_from=2, deadline_s=1.5)
    assert (got.report["answer"], got.report["stopped_early"]) == ("5", "deadline")
    got, sampler = await branches(*made, budget_tokens=1)
    assert (sampler.waves, got.report["stopped_early"]) == ([1], "budget_tokens")
    assert got.choice["message"]["content"] == "The"


async def test_the_client_s_limit_counts_the_first_token() -> None:
    _, sampler = await branches(branch(1, "4", 0.5), first={"The": 0.9}, body={**CHAT, "max_tokens": 30})
    assert [sent["max_tokens"] for sent, _ in sampler.opened] == [1, 29]


# deepconf


def trace(index: int, answer: str, confidence: float) -> Sample:
    """A sample of one token whose only log-probability is minus its confidence."""
    text = f"The answer is {answer}."
    return with_logprobs(sample(index, text), [(text, {text: math.exp(-confidence)})])


async def deep(*made: tuple[str, float], **options: Any) -> tuple[Any, Scripted]:
    sampler = Scripted([trace(index, *one) for index, one in enumerate(made)])
    got, _ = await ask("deepconf", sampler, **{"top": 1, "window": 4, **options})
    return got, sampler


async def test_offline_the_most_confident_tenth_votes() -> None:
    """Confidences 0 to 10: the 90th percentile is 9."""
    made = [("5", float(i)) for i in range(9)] + [("4", 9.0), ("6", 10.0)]
    got, sampler = await deep(*made, early_stop=False)
    assert sampler.waves == [11]
    assert (got.report["threshold"], got.report["filtered"]) == (9.0, 9)
    assert got.report["answer"] == "6"
    assert [(vote["answer"], vote["weight"]) for vote in got.report["votes"]] == [("6", 1.0), ("4", 0.9)]
    assert got.choice["logprobs"] is None


async def test_offline_all_but_the_least_confident_tenth_vote() -> None:
    made = [
        ("6", 0.0),
        ("6", 1.0),
        *(("4", 2.0) for _ in range(4)),
        ("5", 9.0),
        *(("6", 1.0) for _ in range(4)),
    ]
    got, _ = await deep(*made, early_stop=False, filter="high")
    assert (got.report["threshold"], got.report["filtered"], got.report["answer"]) == (1.0, 1, "5")


async def test_a_warm_up_sets_the_threshold_and_waves_follow_until_consensus() -> None:
    warm = [("4", 1.0), ("5", 3.0), ("4", 3.0), ("5", 2.0)]
    more = [("4", 3.0), ("9", 0.5), ("4", 6.0), ("4", 3.0)]
    got, sampler = await deep(*warm, *more, n=12, warmup=4, wave=2, filter="high", tau=0.7)
    assert sampler.waves == [4, 2, 2]
    assert got.report["threshold"] == pytest.approx(1.3)
    assert (got.report["answer"], got.report["stopped_early"], got.report["n"]) == ("4", "agreed", 12)
    assert got.report["confidence"] == pytest.approx(15 / 20)
    assert [one["confidence"] for one in got.report["confidences"]] == pytest.approx(
        [1, 3, 3, 2, 3, 0.5, 6, 3]
    )


async def test_a_warm_up_that_agrees_is_enough() -> None:
    got, sampler = await deep(*[("4", 1.0)] * 4, n=32, warmup=4)
    assert (sampler.waves, got.report["stopped_early"]) == ([4], "agreed")


async def test_if_no_confident_sample_has_an_answer_all_vote() -> None:
    made = [with_logprobs(sample(0, "no idea"), [("no idea", {"no idea": 1e-9})]), trace(1, "4", 1.0)]
    got, _ = await ask("deepconf", Scripted(made), top=1)
    assert got.report["answer"] == "4"


async def test_without_log_probabilities_all_votes_are_equal_and_none_is_refused() -> None:
    answers = (5, 4, 6, 4)
    got, _ = await ask(
        "deepconf", Scripted([sample(i, f"The answer is {a}.") for i, a in enumerate(answers)])
    )
    assert (got.report["threshold"], got.report["answer"], got.report["confidence"]) == (0.0, "4", 0.5)


@pytest.mark.parametrize(
    ("options", "slots"), [({}, 16), ({"early_stop": False}, 32), ({"n": 4}, 4), ({"wave": 20}, 20)]
)
def test_slots_are_the_largest_wave(options: dict[str, Any], slots: int) -> None:
    assert strategies.get("deepconf").parse(options).slots == slots


async def test_workers_measure_and_end_samples_of_later_waves() -> None:
    """The percentile of the warm-up's confidences: what falls below it later is ended."""
    made = [sample(i, f"The answer is {i % 2}.", confidence=float(i)) for i in range(4)]
    cut = [sample(4, state="stopped_early", confidence=1.0), sample(5, "The answer is 0.", confidence=9.0)]
    sampler = Scripted([*made, *cut])
    got, _ = await ask("deepconf", sampler, n=6, warmup=4, wave=2, window=8, top=5, tau=1.0)
    assert (sampler.waves, got.report["stopped_early"]) == ([4, 2], None), (
        "the one vote over it is no consensus"
    )
    got, _ = await ask("deepconf", sampler := Scripted([*made, *cut]), n=6, warmup=4, filter="high", tau=1.0)
    assert [watch.least for watch in sampler.watched if isinstance(watch, Watch)] == [
        None,
        pytest.approx(0.3),
    ]
    assert "top_logprobs" not in sampler.opened[0][0]


async def test_an_ended_sample_never_votes_and_its_tokens_count() -> None:
    made = [sample(i, f"The answer is {i % 2}.", confidence=2.0) for i in range(4)]
    cut = [sample(4, state="stopped_early", confidence=1.0), sample(5, "The answer is 1.", confidence=4.0)]
    sampler = Scripted([*made, *cut])
    got, _ = await ask("deepconf", sampler, n=6, warmup=4, wave=2, window=8, top=5)
    assert sampler.waves == [4, 2]
    assert sampler.watched == [Watch(8, 5), Watch(8, 5, 2.0)]
    assert (got.report["answer"], got.report["tokens"], got.report["samples_cancelled"]) == ("1", 60, 1)
    assert [(vote["answer"], vote["weight"]) for vote in got.report["votes"]] == [("1", 2.0), ("0", 1.0)]
    assert got.report["confidences"][4] == {"index": 4, "confidence": 1.0}


async def test_offline_no_sample_is_ended() -> None:
    sampler = Scripted([sample(i, "The answer is 1.", confidence=2.0) for i in range(4)])
    await ask("deepconf", sampler, early_stop=False)
    assert sampler.watched == [Watch(2048, 20)]


@pytest.mark.parametrize("measure", ["tail", "mean", "bottom_groups"])
async def test_other_measures_come_from_log_probabilities(measure: str) -> None:
    got, sampler = await deep(("4", 1.0), ("5", 2.0), ("4", 3.0), measure=measure, early_stop=False)
    assert (sampler.opened[0][0]["top_logprobs"], sampler.watched) == (1, [None])
    assert [one["confidence"] for one in got.report["confidences"]] == [1.0, 2.0, 3.0]


async def test_a_warm_up_that_fails_sets_no_threshold() -> None:
    made = [sample(i, state="failed") for i in range(2)] + [sample(2, "The answer is 4.", confidence=1.0)]
    sampler = Scripted(made)
    got, _ = await ask("deepconf", sampler, n=3, warmup=2)
    assert (sampler.watched, got.report["answer"]) == ([Watch(2048, 20)] * 2, "4")


@pytest.mark.parametrize("budget", [20, 40])
async def test_at_the_budget_the_confident_votes_so_far_count(budget: int) -> None:
    sampler = Scripted([sample(i, f"The answer is {i % 2}.", confidence=2.0) for i in range(6)])
    got, _ = await ask("deepconf", sampler, warmup=2, wave=2, budget_tokens=budget)
    assert (got.report["stopped_early"], got.report["tokens"]) == ("budget_tokens", budget)


# certaindex


async def probed(*texts: str, body: Any = CHAT, **options: Any) -> tuple[Any, Scripted]:
    more = {key: options.pop(key) for key in ("errors", "hang_from") if key in options}
    sampler = Scripted(steps(*texts), **more)
    got, _ = await ask("certaindex", sampler, body, **{"n": 1, "every": 10, "agree": 2, **options})
    return got, sampler


async def test_a_chain_ends_when_its_probes_agree() -> None:
    got, sampler = await probed("one ...", " 5.", "two ...", " 4.", "three ...", " 4.0")
    assert sampler.prompts == [
        "2+2?\nLet's think step by step.",
        "one \n\nThe answer is",
        "one ",
        "one two \n\nThe answer is",
        "one two ",
        "one two three \n\nThe answer is",
    ]
    assert got.choice["message"]["content"] == "one two three \n\nThe answer is 4.0"
    assert (got.report["answer"], got.report["stopped_early"], got.report["chosen"]) == ("4.0", "certain", 5)
    assert [probe["answer"] for probe in got.report["probes"]] == ["5", "4", "4.0"]
    probe, chunk = sampler.opened[1][0], sampler.opened[2][0]
    assert (probe["temperature"], probe["max_tokens"], probe["stop"]) == (0, 24, ["\n"])
    assert (chunk["max_tokens"], chunk.get("stop")) == (10, None)
    assert [None if one is None else one.index for one in sampler.after] == [None, 0, 0, 2, 2, 4]
    assert sampler.kept == [True, False] * 3


async def test_a_chain_that_ends_by_itself_is_the_answer() -> None:
    got, _ = await probed("one ...", " 5.", "The answer is 4.")
    assert got.choice["message"]["content"] == "one The answer is 4."
    assert (got.report["answer"], got.report["stopped_early"]) == ("4", None)
    got, sampler = await probed("4")
    assert (sampler.waves, got.report["probes"], got.report["answer"]) == ([1], [], "4")


async def test_a_hedged_probe_is_not_certain() -> None:
    got, sampler = await probed("a...", " 4.", "b...", " 4, but wait", "c...", " 4.", "d...", " 4.")
    assert (len(sampler.waves), got.report["stopped_early"]) == (8, "certain")
    got, sampler = await probed("a...", " 4.", "b...", " 4. But wait", hedges=[])
    assert len(sampler.waves) == 4


async def test_a_probe_without_an_answer_agrees_with_none() -> None:
    _, sampler = await probed("a...", " unclear", "b...", " unclear", "c", extractor="last_number")
    assert len(sampler.waves) == 5


async def test_without_early_stop_probes_are_told_and_end_nothing() -> None:
    got, sampler = await probed("a...", " 4.", "b...", " 4.", "The answer is 5.", early_stop=False)
    assert (len(sampler.waves), got.report["answer"], len(got.report["probes"])) == (5, "5", 2)


@pytest.mark.parametrize(
    ("budget", "text"), [(10, "a"), (20, "a\n\nThe answer is 4."), (30, "a\n\nThe answer is 4.")]
)
async def test_at_a_bound_the_last_probe_answers(budget: int, text: str) -> None:
    got, _ = await probed("a...", " 4.", "b...", " 5.", budget_tokens=budget)
    assert (got.choice["message"]["content"], got.report["stopped_early"]) == (text, "budget_tokens")


async def test_a_probe_that_fails_is_followed_by_the_next_chunk_s_absence() -> None:
    got, _ = await probed("a...", " 4.", "b...", " 5.", errors={3: Unavailable("gone")})
    assert (got.report["answer"], got.report["stopped_early"]) == ("4", "failed")


async def test_at_the_client_s_limit_the_last_probe_answers() -> None:
    got, sampler = await probed("a...", " 4.", "b...", " 5.", body={**CHAT, "max_tokens": 20})
    assert [sent["max_tokens"] for sent, _ in sampler.opened] == [10, 24, 10, 24]
    assert got.choice["message"]["content"] == "ab\n\nThe answer is 5."
    got, _ = await probed("a...", " no", body={**CHAT, "max_tokens": 10}, extractor="last_number")
    assert (got.choice["finish_reason"], got.choice["message"]["content"]) == ("length", "a")


@pytest.mark.parametrize("name", ["certaindex", "cot_decoding"])
async def test_answers_with_a_grammar_are_refused(name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await ask(name, Scripted([]), {**CHAT, "response_format": {"type": "json_object"}}, n=1)
    assert caught.value.param == "response_format"
