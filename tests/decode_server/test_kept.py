"""What the server knows of kept samples, and how their tokens go into a prompt that goes on from them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_server.kept import KEEP_S, KeptSamples, splice
from kvtransfer.plan import num_blocks

BLOCK = 4


def blocks_of(tokens: int) -> int:
    return num_blocks(tokens, BLOCK)


class Words:
    """A tokenizer that cuts greedily: the same text can be written with other tokens too."""

    pieces = ("", "a", "b", "c", "ab", "bc", "abc", "<end>", " ")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        ids = []
        while text:
            piece = max((p for p in self.pieces if p and text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(self.pieces[i] for i in ids)


WORDS = Words()


def ids(*pieces: str) -> list[int]:
    return [Words.pieces.index(piece) for piece in pieces]


def test_a_prompt_that_begins_with_the_samples_tokens_stays_as_it_is() -> None:
    rendered = ids("a", "b", "c")
    assert splice(ids("a", "b"), rendered, WORDS) == rendered
    assert splice(ids("a", "b", "c", "c"), rendered, WORDS) == rendered


def test_the_samples_own_cut_of_the_text_is_put_back() -> None:
    kept = ids(" ", "a", "b", "c", "<end>")
    rendered = ids(" ", "abc", "<end>", "ab")
    assert splice(kept, rendered, WORDS) == ids(" ", "a", "b", "c", "<end>", "ab")


def test_tokens_after_the_text_that_is_repeated_are_left_out() -> None:
    kept = ids("a", "b", "c", "c")  # it ran on behind a stop string
    assert splice(kept, ids("abc", " ", "ab"), WORDS) == ids("a", "b", "c", " ", "ab")


def test_another_text_is_left_alone() -> None:
    rendered = ids("abc", " ")
    assert splice(ids("b", "c"), rendered, WORDS) == rendered
    assert splice([], rendered, WORDS) == rendered


def test_a_text_that_ends_inside_one_of_the_samples_tokens_is_encoded_from_there() -> None:
    assert splice(ids("a", "bc"), ids("ab", " "), WORDS) == ids("a", "b", " ")


@given(kept=st.lists(st.integers(1, 8), max_size=12), rest=st.lists(st.integers(1, 8), max_size=8))
def test_a_spliced_prompt_spells_what_was_rendered_and_begins_with_the_sample(
    kept: list[int], rest: list[int]
) -> None:
    text = WORDS.decode([*kept, *rest], skip_special_tokens=False)
    rendered = WORDS.encode(text, add_special_tokens=False)
    spliced = splice(kept, rendered, WORDS)
    assert WORDS.decode(spliced, skip_special_tokens=False) == text
    assert spliced[: len(kept)] == kept or spliced == rendered
    if kept != rendered[: len(kept)] and len(kept) < len(rendered):
        assert spliced[: len(kept)] == kept


async def test_the_longest_unused_go_first_when_there_is_no_room() -> None:
    released: list[str] = []
    kept = KeptSamples(6, blocks_of, released.append)
    kept.add("a", [0] * 8)
    kept.add("b", [1] * 9)
    assert kept.tokens("a") == [0] * 8
    kept.add("c", [2] * 4)
    assert kept.blocks == 6
    kept.add("d", [3])
    assert released == ["b"]
    assert kept.tokens("b") is None
    kept.add("e", [4] * 100)
    assert released == ["b", "a", "c", "d", "e"]
    assert (len(kept), kept.blocks) == (0, 0)


async def test_letting_go_twice_releases_once() -> None:
    released: list[str] = []
    kept = KeptSamples(6, blocks_of, released.append)
    kept.add("a", [0])
    kept.add("b", [0])
    kept.forget("a")
    kept.forget("a")
    kept.clear()
    assert released == ["a", "b"]


async def test_a_sample_is_let_go_when_it_has_not_been_used_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, passed = asyncio.get_running_loop(), 0.0
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + passed)
    gone = asyncio.Event()
    kept = KeptSamples(6, blocks_of, lambda name: gone.set())
    kept.add("a", [0])
    for _ in range(3):
        passed += 0.6 * KEEP_S
        for _ in range(3):
            await asyncio.sleep(0)  # due timers run
        assert kept.tokens("a") is not None, "it was used"
    assert not gone.is_set()
    passed += 1.1 * KEEP_S
    await gone.wait()
    assert kept.tokens("a") is None
