"""Simulated samples: the same everywhere, and worth voting on."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median

import pytest

from braid.sim.draws import Draw, Limits, Profile, draw
from braid.sim.tokens import Prompt, encode, render_chat, render_completion

LIMITS = Limits(most=1000)


def prompt(text: str = "How many eggs?") -> Prompt:
    return render_chat({"messages": [{"role": "user", "content": text}]})


def of(number: int, text: str = "How many eggs?", seed: int | None = 7, limits: Limits = LIMITS) -> Draw:
    return draw(prompt(text), Profile(), limits, seed, number)


def test_a_sample_is_a_function_of_prompt_seed_and_number() -> None:
    assert of(3).text == of(3).text
    assert len({of(3).text, of(4).text, of(3, seed=8).text, of(3, "How many boxes?").text}) == 4


def test_text_and_tokens_agree() -> None:
    for number in range(50):
        one = of(number)
        assert "".join(one.piece(i) for i in range(one.tokens)) == one.text
        assert one.ids(one.tokens) == encode(one.text)
        assert len(one.text) == 4 * one.tokens


def test_votes_follow_the_accuracy_that_a_prompt_asks_for() -> None:
    answers = Counter(of(i, "[sim answer=42 accuracy=0.7]").answer for i in range(2000))
    assert answers[42] / 2000 == pytest.approx(0.7, abs=0.04)
    assert answers.most_common(1)[0][0] == 42
    assert len(answers) == 1 + Profile().answers


def test_lengths_have_the_median_that_a_prompt_asks_for() -> None:
    assert median(of(i, "[sim tokens=200]").tokens for i in range(1000)) == pytest.approx(200, rel=0.1)


def test_right_samples_are_more_confident() -> None:
    draws = [of(i, "[sim answer=5]") for i in range(200)]
    means: dict[bool, list[float]] = {True: [], False: []}
    for one in draws:
        means[one.answer == 5].append(one.cumulative(one.tokens) / one.tokens)
    assert min(means[True]) < 0
    assert sum(means[True]) / len(means[True]) > sum(means[False]) / len(means[False])


def test_log_probabilities_add_up() -> None:
    one = of(1)
    assert one.cumulative(10) == pytest.approx(math.fsum(one.logprob(i) for i in range(10)))


def test_a_sample_that_is_cut_has_no_answer() -> None:
    one = of(1, limits=Limits(most=8))
    assert (one.tokens, one.finish, one.answer) == (8, "length", None)
    assert len(one.text) == 32


def test_a_stop_string_ends_a_sample_and_is_not_shown() -> None:
    one = of(1, limits=Limits(most=1000, stops=("\n\n", "never")))
    assert "\n\n" not in one.text
    assert (one.finish, one.answer) == ("stop", None)
    assert one.tokens * 4 >= len(one.text) + 2
    assert len(one.ids(one.tokens)) == one.tokens


@pytest.mark.parametrize("least", [0, 300])
def test_length_can_be_forced(least: int) -> None:
    assert of(1, limits=Limits(most=400, least=least)).tokens >= least
    forced = of(1, limits=Limits(most=400, ignore_eos=True))
    assert (forced.tokens, forced.finish) == (400, "length")


def test_a_length_beyond_all_bounds_costs_no_memory() -> None:
    assert of(1, "[sim tokens=1000000000000]").tokens == LIMITS.most
    assert of(1, "[sim tokens=0 accuracy=x]").tokens >= 1


def test_a_reply_that_is_repeated_has_the_same_tokens() -> None:
    said = of(1)
    before = prompt()
    after = render_chat(
        {
            "messages": [
                {"role": "user", "content": "How many eggs?"},
                {"role": "assistant", "content": said.text},
                {"role": "user", "content": "Sure?"},
            ]
        }
    )
    known = [*before.tokens, *said.ids(said.tokens)]
    assert list(after.tokens[: len(known)]) == known


def test_token_ids_and_lists_of_prompts_are_prompts() -> None:
    assert [list(p.tokens) for p in render_completion({"prompt": [[1, 2], [3]]})] == [[1, 2], [3]]
    assert len(render_completion({"prompt": ["one", "another"]})) == 2
