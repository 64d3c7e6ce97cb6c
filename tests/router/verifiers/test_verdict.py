"""Where a verdict stands, and p(Yes) there."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.sampler import Sample
from router.verifiers.verdict import p_yes, says, steps, verdict_at
from tests.router.strategies.scripted import sample
from tests.router.verifiers.chains import chain, verdict

YES, NO = ("yes",), ("no",)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ok.\n\nVerification: Yes", "Yes"),
        ("ok.\n\nVerification: No", "No"),
        ("**Verification:** yes.", "yes"),
        ("Verdict - NO!", "NO"),
        ("Verification: Is the answer correct (Yes/No)? No", "No"),
        ("Verification: Yes\nVerification: No\nbye", "No"),
        ("Verification: No. That is all there is to say", "No"),
        ("So the answer is: yes", "yes"),
        ("<think>Verification: No</think>Verification: Yes", "Yes"),
        ("It is right. Yes**", "Yes"),
        ("Verification: Yesterday", None),
        ("I know", None),
        ("Yes, but then it goes on for a while", None),
        ("<think>Verification: Yes", None),
        ("", None),
    ],
)
def test_the_verdict_is_after_its_mark_or_the_last_word(text: str, found: str | None) -> None:
    at = verdict_at(text, [*YES, *NO])
    assert (None if at is None else text[at : at + len(found or "")]) == found


def test_a_text_that_was_cut_off_needs_the_mark() -> None:
    assert verdict_at("There is no", [*YES, *NO], truncated=True) is None
    assert verdict_at("Verification: no, as", [*YES, *NO], truncated=True) == 14


@pytest.mark.parametrize(
    ("token", "yes"),
    [
        (" Yes", True),
        ("YES", True),
        ("▁yes", True),
        ("Ġyes", True),
        ("**Yes**", True),
        (": Yes", True),
        ("Y", True),
        ("Ye", True),
        ("Yes.", True),
        ("Yesterday", False),
        (" No", False),
        ("N", False),
        ("", False),
        (" ", False),
        ("\n\n", False),
    ],
)
def test_what_counts_as_a_yes(token: str, yes: bool) -> None:
    assert says(token, YES, NO) is yes


def test_the_beginning_of_both_counts_as_neither() -> None:
    assert not says("in", ["invalid"], ["incomplete"])
    assert says("inv", ["invalid"], ["incomplete"])


def test_all_variants_of_a_yes_add_up() -> None:
    candidates = {" Yes": 0.4, "Yes": 0.2, " yes": 0.1, " YES": 0.05, " No": 0.2, " no": 0.05}
    made = chain(0, ["Verification", ":", " Yes"], candidates)
    assert p_yes(made, YES, NO) == pytest.approx(0.75)


def test_p_is_of_the_verdict_not_of_what_was_sampled() -> None:
    assert p_yes(verdict(0, 0.3, said=" No"), YES, NO) == pytest.approx(0.3)
    assert p_yes(verdict(0, 0.3, said=" Yes"), YES, NO) == pytest.approx(0.3)


def test_no_yes_among_the_candidates_is_zero() -> None:
    assert p_yes(chain(0, ["Verification", ":", " No"], {" No": 0.999}), YES, NO) == 0.0


def test_a_sampled_yes_outside_the_listed_candidates_counts() -> None:
    made = chain(0, ["Verification", ":", " Yes"], {" No": 0.9})
    made.choice["logprobs"]["content"][-1]["logprob"] = math.log(0.02)
    assert p_yes(made, YES, NO) == pytest.approx(0.02)


def test_a_verdict_in_several_tokens_is_read_at_its_first() -> None:
    content = [
        {"token": "Verification:", "logprob": -0.1, "top_logprobs": []},
        {
            "token": " Y",
            "logprob": math.log(0.6),
            "top_logprobs": [{"token": " N", "logprob": math.log(0.4)}],
        },
        {"token": "es", "logprob": -0.01, "top_logprobs": [{"token": "ikes", "logprob": -9}]},
    ]
    made = sample(0, "Verification: Yes")
    made.choice["logprobs"] = {"content": content}  # type: ignore[index]
    assert p_yes(made, YES, NO) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["<|im_end|>"]),
        (["<think>", " No", "</think>"], []),
        (["Verification", ":", " No", "\n"], ["\n"]),
    ],
)
def test_the_place_is_found_among_tokens_that_the_text_lacks(before: list[str], after: list[str]) -> None:
    top = [{"token": " Yes", "logprob": math.log(0.8)}]
    tokens = [{"token": token, "logprob": -1.0, "top_logprobs": []} for token in before]
    tokens += [
        {"token": token, "logprob": -1.0, "top_logprobs": []} for token in ("So.\n", "Verification", ":")
    ]
    tokens += [{"token": " Yes", "logprob": math.log(0.8), "top_logprobs": top}]
    tokens += [{"token": token, "logprob": -1.0, "top_logprobs": []} for token in after]
    made = sample(0, "So.\nVerification: Yes")
    made.choice["logprobs"] = {"content": tokens}  # type: ignore[index]
    assert p_yes(made, YES, NO) == pytest.approx(0.8)


def test_completions_have_their_logprobs_in_columns() -> None:
    told = {
        "tokens": ["Verification", ":", " Yes"],
        "token_logprobs": [-0.1, None, math.log(0.5)],
        "top_logprobs": [None, {}, {" Yes": math.log(0.5), " yes": math.log(0.25)}],
    }
    made = Sample(0, "finished", "Verification: Yes", "stop", 3, -1.0, {"text": "", "logprobs": told})
    assert p_yes(made, YES, NO) == pytest.approx(0.75)
    assert [step.token for step in steps(made)] == ["Verification", ":", " Yes"]


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"logprobs": None},
        {"logprobs": {"content": None}},
        {"logprobs": {"content": []}},
        {"logprobs": {}},
    ],
)
def test_without_logprobs_p_is_unknown(choice: dict[str, Any]) -> None:
    assert p_yes(Sample(0, "finished", "Verification: Yes", "stop", 3, choice=choice), YES, NO) is None


def test_a_verdict_without_its_tokens_is_unknown() -> None:
    assert p_yes(chain(0, ["some", "thing"], {"thing": 1.0}, text="Verification: Yes"), YES, NO) is None


def test_other_words_may_be_the_verdict() -> None:
    made = chain(0, ["Verdict", ":", " correct"], {" correct": 0.7, " incorrect": 0.2, " in": 0.1})
    assert p_yes(made, ["correct"], ["incorrect"]) == pytest.approx(0.7)


@given(
    st.lists(st.text(max_size=6), max_size=20),
    st.dictionaries(st.sampled_from([" Yes", "yes", " No", "x"]), st.floats(1e-9, 1.0), min_size=1),
    st.sampled_from([" Yes", " No", "?"]),
)
def test_p_is_a_probability_or_unknown(tokens: list[str], candidates: dict[str, float], last: str) -> None:
    p = p_yes(chain(0, [*tokens, "Verification:", last], candidates), YES, NO)
    assert p is None or 0 <= p <= 1
