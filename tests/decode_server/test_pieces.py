"""The text of tokens, of the tokenizers' awkward kinds."""

from __future__ import annotations

from collections.abc import Sequence

from decode_server.pieces import Pieces

BYTES = {1: b"a", 2: b" b", 3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"", 6: "日".encode()[:2]}


def decode(tokens: Sequence[int]) -> str:
    return b"".join(BYTES[token] for token in tokens).decode(errors="replace")


def pieces(asked: list[int] | None = None) -> Pieces:
    def text_of(token: int) -> str:
        if asked is not None:
            asked.append(token)
        return decode([token])

    return Pieces(text_of, decode)


def test_each_token_is_looked_up_once() -> None:
    asked: list[int] = []
    known = pieces(asked)
    assert known.spell([1, 2, 1, 1]) == ["a", " b", "a", "a"]
    assert known[2] == " b"
    assert asked == [1, 2]


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    assert pieces().spell([1, 3, 4, 2]) == ["a", "", "é", " b"]


def test_bytes_that_never_become_a_character_are_nothing() -> None:
    assert pieces().spell([3, 1, 3, 5, 4, 6]) == ["", "a", "", "", "é", ""]
