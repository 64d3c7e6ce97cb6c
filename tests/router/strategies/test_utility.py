from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.strategies.utility import MAX_WORDS, UTILITIES, Name, exact, expected, rouge_l, token_f1, words

WORDS = st.lists(st.sampled_from("abcde"), max_size=12).map(tuple)


def longest(one: Sequence[str], other: Sequence[str]) -> int:
    """Longest common subsequence by the table of the textbook."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row[:]
        for place, theirs in enumerate(other, 1):
            row[place] = before[place - 1] + 1 if word == theirs else max(before[place], row[place - 1])
    return row[-1]


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_textbook(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    total = len(one) + len(other)
    assert rouge_l(one, other) == (2 * longest(one, other) / total if total else 1.0)


@given(WORDS, WORDS)
def test_utilities_are_symmetric_and_highest_for_the_same(
    one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    for measure in UTILITIES.values():
        assert measure(one, other) == measure(other, one)
        assert 0 <= measure(one, other) <= 1 == measure(one, one)


def test_order_counts_for_rouge_only() -> None:
    assert token_f1(("a", "b"), ("b", "a")) == 1
    assert rouge_l(("a", "b"), ("b", "a")) == 0.5
    assert exact(("a", "b"), ("b", "a")) == 0
    assert token_f1(("a", "a", "b"), ("a", "c")) == pytest.approx(2 / 5)


def test_words_are_caseless_and_only_the_last_count() -> None:
    assert words("It's 4.") == ("it", "'", "s", "4", ".")
    assert words("a " * 5000 + "b") == ("a",) * (MAX_WORDS - 1) + ("b",)


@pytest.mark.parametrize("utility", UTILITIES)
async def test_the_mean_is_over_all_references(utility: Name) -> None:
    means = await expected(["x y", "x y", "z"], utility)
    assert means == [pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(1 / 3)]


async def test_it_stops_at_the_references_so_far() -> None:
    assert await expected(["x", "y", "y"], "exact", stop=lambda: True) == [1, 0, 0]


async def test_others_run_between_pairs() -> None:
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            ran += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await expected(["a b c"] * 10, "rouge_l")
    task.cancel()
    assert ran >= 99
