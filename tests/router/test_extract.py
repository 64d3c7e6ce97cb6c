from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.errors import BadRequest
from router import equivalence
from router.bounded import BoundedProcess, LimitExceeded
from router.equivalence import canonical, clean, number
from router.extract import EXTRACTORS, MAX_ANSWER, MAX_TEXT, extract
from tests.cost import least_cpu_s


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # boxed
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \fbox{5}}", r"x = \fbox{5}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7", "7"),
        (r"} \boxed{5}", "5"),
        (r"The answer is 3. \boxed{4}", "4"),
        (r"\boxed{} The answer is 3.", "3"),
        # the answer is
        ("The answer is 42.", "42"),
        ("The answer is 3.5 apples. Done", "3.5 apples"),
        ("The answer is X. The answer is Y.", "Y"),
        ("the final answer is: **12**", "12"),
        ("**Answer:** 42", "42"),
        ("Answer = 42", "42"),
        ("Final answer:\n\n 42", "42"),
        ("The answer is 42 because 6 * 7 is.", "42"),
        ("The answer is (B).", "(B)"),
        ("The answer is Paris, 12 votes to 3", "Paris, 12 votes to 3"),
        # GSM8K
        ("1+1=2\n#### 2", "2"),
        ("#### 1 #### 1,234\nthanks", "1,234"),
        # JSON
        ('{"answer": 12.5}', "12.5"),
        ('```json\n{"steps": [{"n": 1}], "final_answer": "Rome"}\n```', "Rome"),
        ('{"answer": [1, 2]}', "[1, 2]"),
        ('{"answer": true} {"other": 1}', "true"),
        ('{"answer": null} 7', "7"),
        ('{"answer": 5', "5"),
        # a letter on the last line
        ("First 3, then 4.\n(B)", "B"),
        ("Option C.", "C"),
        ("choice: d", "D"),
        # last number
        ("5-3 costs $1,234.50.", "$1,234.50"),
        ("it fell by -5", "-5"),
        ("half: 1/2", "1/2"),
        ("about 50%", "50%"),
        ("I have 3 and H2O", "3"),
        # none
        ("", None),
        ("no idea", None),
        # thinking
        ("<think>The answer is 3.</think> 4", "4"),
        ("The answer is 3.</think> The answer is 4.", "4"),
        ("<think> 3 and so", None),
    ],
)
async def test_the_chain(text: str, answer: str | None) -> None:
    assert await extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("then 12 + 3 = 1", None),
        ("The answer is 12", None),
        ("#### 12", None),
        ("The answer is 12 and", "12"),
        ("The answer is 12.\nCheck: 4", "12"),
        (r"\boxed{12}", "12"),
        ('{"answer": 12}', "12"),
        ("so\nB", None),
    ],
)
async def test_a_truncated_text_answers_only_where_it_is_marked_and_complete(
    text: str, answer: str | None
) -> None:
    assert await extract(text, truncated=True) == answer


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("boxed", "The answer is 3.", None),
        ("answer_is", r"\boxed{2} The answer is 3.", "3"),
        ("hashes", "#### 3\n4", "3"),
        ("json", 'The answer is 3. {"result": 4}', "4"),
        ("choice", "I rule out (A) and take (C), as 7 says.", "C"),
        ("choice", "the answer is B", "B"),
        ("choice", "A dog", None),
        ("last_number", r"\boxed{3} 4", "4"),
    ],
)
async def test_a_named_extractor_looks_in_its_own_way_only(
    extractor: Any, text: str, answer: str | None
) -> None:
    assert await extract(text, extractor) == answer


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"=\s*(\d+)", "a=1 b= 2", "2"),
        (r"\d+", "a1 b2", "2"),
        (r"(x)|y(?P<answer>\d)", "y5", "5"),
        (r"z", "a", None),
    ],
)
async def test_a_pattern_of_the_caller(pattern: str, text: str, answer: str | None) -> None:
    assert await extract(text, "regex", pattern) == answer


@pytest.mark.parametrize("pattern", ["(", "a" * 1000, "(?P<a>x)(?P<a>y)"])
async def test_an_invalid_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await extract("x", "regex", pattern)
    assert caught.value.param == "reasoning.pattern"


async def test_a_pattern_that_runs_away_is_stopped_and_the_next_one_works() -> None:
    began = time.monotonic()
    with pytest.raises(BadRequest, match="too long"):
        await extract("a" * 40 + "b", "regex", r"(a+)+$")
    assert time.monotonic() - began < 10
    assert await extract("x1", "regex", r"\d") == "1"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 5000,
        "\\boxed{" * 2000 + "5" + "}" * 2000,
        "{" * 30000,
        '{"answer":' * 3000,
        '{"answer": ' + "[" * 20000,
        "answer is " * 3000,
        "answer" + " " * 30000,
        "The answer is " + " ," * 15000,
        "1," * 15000,
        "9" * 40000,
        "#" * 30000,
        "(A" * 15000,
        "*" * 30000 + "A",
        "\x00\ud800",
        "</think>" * 4000,
    ],
)
async def test_nasty_texts_are_cheap(text: str) -> None:
    for extractor in EXTRACTORS:
        if extractor != "regex":
            assert await least_cpu_s(partial(extract, extractor=extractor), text) < 1.0  # type: ignore[arg-type]


async def test_a_find_as_long_as_prose_is_no_answer() -> None:
    assert await extract("\\boxed{" + "x" * (MAX_ANSWER + 1) + "}") is None
    assert await extract("The answer is 5. " + "x" * MAX_TEXT) is None


@given(st.text(alphabet=r"\boxedfrac{}#answeri :.0123456789,$%()<>/thk" + '"\n', max_size=200))
def test_an_answer_is_a_trimmed_non_empty_text(text: str) -> None:
    answer = asyncio.run(extract(text))
    assert answer is None or (answer and answer == answer.strip() and len(answer) <= MAX_ANSWER)


SAME = [
    ["5", "5.0", "+5", " 5. ", "$5", r"\$5", "$5$", "**5**", "x = 5", r"\(5\)", "5 apples", "5 km", "５"],
    ["7", r"7\text{ cm}", r"7^\circ", "7 degrees"],
    ["-5", "−5", "- 5", "-5.00"],
    ["1234", "1,234", "1 234", "1{,}234", "1,234.0", "1.234e3", "$1,234$"],
    ["0.5", ".5", "1/2", "2/4", r"\frac{1}{2}", r"\dfrac12", "50%", r"50\%", "50 percent", "5e-1"],
    ["1.5", "1 1/2", r"1\frac{1}{2}", "3/2"],
    ["0", "-0", "0.0"],
    ["B", "(B)", "b.", "**B**", "B)", r"\text{B}"],
    ["Paris", "paris.", '"Paris"', "*Paris*"],
    [r"\sqrt{8}", r"2\sqrt{2}", "sqrt(8)"],
    ["1024", "2^{10}", r"2^{10}"],
    ["2x+1", "1 + 2x", r"2\,x + 1"],
    ["(x-1)(x+1)", "x^2-1"],
    ["(1,2)", "( 1 , 2 )", r"\left(1, 2\right)"],
    [r"\{1,2\}", r"\{2, 1\}"],
]  # fmt: skip


@pytest.mark.parametrize("same", SAME, ids=lambda same: same[0])
async def test_equal_answers_have_one_key(same: list[str]) -> None:
    assert len({await canonical(answer) for answer in same}) == 1


async def test_different_answers_have_different_keys() -> None:
    others = [
        "2xy",
        "3 and 4",
        "12",
        "3 4",
        "1/3",
        "0.333333",
        "north",
        "((((",
        "1/0",
        "[1,2]",
        "5!",
        "",
        "e",
    ]
    first = [same[0] for same in SAME]
    keys = [await canonical(answer) for answer in first + others]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "text", ["9" * 10000, "1e9999", "1/" + "0" * 50, "1" + ",000" * 500, "%" * 5000, " " * 9999]
)
async def test_nasty_answers_have_a_key(text: str) -> None:
    assert await canonical(text) == await canonical(text)
    assert await least_cpu_s(canonical, text) < 1.0


@pytest.mark.slow
async def test_algebra_that_runs_away_is_compared_by_its_text_and_only_tried_once() -> None:
    tower = "9^{9^{9^{9}}}"
    assert await canonical(tower) == f"'{tower}"
    began = time.monotonic()
    assert await canonical(tower) == f"'{tower}"
    assert time.monotonic() - began < 1.5
    assert await canonical(r"\sqrt{12}") == await canonical(r"2\sqrt{3}")


@pytest.mark.slow
async def test_algebra_does_not_hold_up_the_event_loop() -> None:
    running = asyncio.create_task(canonical("8^{9^{9^{9}}}"))
    gaps = []
    while not running.done():
        began = time.monotonic()
        await asyncio.sleep(0.01)
        gaps.append(time.monotonic() - began)
    assert max(gaps) < 1.0


async def test_a_caller_in_a_hurry_gets_the_text() -> None:
    assert await canonical(r"\sqrt{1001}", limit_s=0.0) == r"'\sqrt{1001}"


@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_its_own_value(value: Fraction) -> None:
    assert number(clean(f"{value.numerator}/{value.denominator}")) == value
    assert asyncio.run(canonical(f"${value.numerator}/{value.denominator}$.")) == f"={value}"


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_every_way_to_write_a_number_is_the_same(value: int, zeros: int) -> None:
    ways = [
        str(value),
        f"{value:,}",
        f"{value}.{'0' * zeros}",
        f"**{value}**",
        f"{value} apples",
        f"{value}00%",
    ]
    assert {number(clean(way)) for way in ways} == {Fraction(value)}


@given(st.lists(st.text(max_size=12), min_size=3, max_size=3))
def test_equality_is_an_equivalence(answers: list[str]) -> None:
    async def keys() -> list[str]:
        return [await canonical(answer, limit_s=0.0) for answer in answers + answers]

    a, b, c, *again = asyncio.run(keys())
    assert [a, b, c] == again, "reflexive: a key depends on nothing but the text"
    assert (a == b) == (b == a)
    assert not (a == b and b == c) or a == c


@pytest.fixture
def bounded() -> Iterator[BoundedProcess]:
    process = BoundedProcess(limit_s=0.3)
    yield process
    process.close()


async def test_a_lost_child_is_replaced(bounded: BoundedProcess) -> None:
    job = {"op": "search", "pattern": "a", "text": "a"}
    assert await bounded.call(job) == {"found": "a"}
    assert bounded._child is not None
    bounded._child.kill()
    bounded._child.wait()
    assert await bounded.call(job) == {"found": "a"}


async def test_a_child_that_cannot_start_is_a_limit(
    monkeypatch: pytest.MonkeyPatch, bounded: BoundedProcess
) -> None:
    monkeypatch.setattr("router.bounded._CHILD", equivalence.__file__ + ".missing")
    with pytest.raises(LimitExceeded):
        await bounded.call({"op": "search", "pattern": "a", "text": "a"})


async def test_close_ends_the_child(bounded: BoundedProcess) -> None:
    await bounded.call({"op": "search", "pattern": "a", "text": "a"})
    assert bounded._child is not None
    pid = bounded._child.pid
    bounded.close()
    bounded.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
