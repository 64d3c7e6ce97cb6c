"""Where a verdict stands, and p(Yes) there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.verdict import Step, p_yes, says, verdict_at

YES, NO = ("yes",), ("no",)


def p(tokens: Sequence[str], candidates: Mapping[str, float] | None, text: str | None = None) -> float | None:
    """p(Yes) of a chain, by the probabilities of the candidates in place of its last token."""
    told = [Step(token, ()) for token in tokens]
    if candidates is not None:
        told[-1] = Step(tokens[-1], tuple((one, math.log(prob)) for one, prob in candidates.items()))
    return p_yes("".join(tokens) if text is None else text, False, told, YES, NO)


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
    assert p(["Verification", ":", " Yes"], candidates) == pytest.approx(0.75)


@pytest.mark.parametrize("said", [" No", " Yes"])
def test_p_is_of_the_verdict_not_of_what_was_sampled(said: str) -> None:
    assert p(["Verification", ":", said], {" Yes": 0.3, " No": 0.7}) == pytest.approx(0.3)


def test_no_yes_among_the_candidates_is_zero() -> None:
    assert p(["Verification", ":", " No"], {" No": 0.999}) == 0.0


def test_a_verdict_in_several_tokens_is_read_at_its_first() -> None:
    told = [
        Step("Verification:", (("Verification:", -0.1),)),
        Step(" Y", ((" Y", math.log(0.6)), (" N", math.log(0.4)))),
        Step("es", (("es", -0.01), ("ikes", -9.0))),
    ]
    assert p_yes("Verification: Yes", False, told, YES, NO) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["<|im_end|>"]),
        (["<think>", " No", "</think>"], []),
        (["Verification", ":", " No", "\n"], ["\n"]),
    ],
)
def test_the_place_is_found_among_tokens_that_the_text_lacks(before: list[str], after: list[str]) -> None:
    told = [Step(token, ((token, -1.0),)) for token in [*before, "So.\n", "Verification", ":"]]
    told += [Step(" Yes", ((" Yes", math.log(0.8)),)), *(Step(token, ((token, -1.0),)) for token in after)]
    assert p_yes("So.\nVerification: Yes", False, told, YES, NO) == pytest.approx(0.8)


def test_without_candidates_p_is_unknown() -> None:
    assert p(["Verification", ":", " Yes"], None) is None
    assert p_yes("Verification: Yes", False, [], YES, NO) is None


def test_a_verdict_without_its_tokens_is_unknown() -> None:
    assert p(["some", "thing"], {"thing": 1.0}, text="Verification: Yes") is None


def test_other_words_may_be_the_verdict() -> None:
    candidates = ((" correct", 0.7), (" incorrect", 0.2), (" in", 0.1))
    last = Step(" correct", tuple((word, math.log(prob)) for word, prob in candidates))
    told = [Step("Verdict", ()), Step(":", ()), last]
    assert p_yes("Verdict: correct", False, told, ["correct"], ["incorrect"]) == pytest.approx(0.7)


@given(
    st.lists(st.text(max_size=6), max_size=20),
    st.dictionaries(st.sampled_from([" Yes", "yes", " No", "x"]), st.floats(1e-9, 1.0), min_size=1),
    st.sampled_from([" Yes", " No", "?"]),
)
def test_p_is_a_probability_or_unknown(tokens: list[str], candidates: dict[str, float], last: str) -> None:
    told = p([*tokens, "Verification:", last], candidates)
    assert told is None or 0 <= told <= 1
