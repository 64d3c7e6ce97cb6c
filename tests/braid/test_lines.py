"""Lines of a streamed body, however its bytes come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from braid.lines import alines, lines

# What str.splitlines takes for ends of lines, and a model may generate.
TEXT = 'data: {"text": "a\u0085b\u2028c\x0bd\x1ee"}'


def test_a_token_that_is_a_line_break_to_unicode_does_not_cut_its_event() -> None:
    assert len(TEXT.splitlines()) > 1
    assert list(lines([f"{TEXT}\n\n".encode()])) == [TEXT, ""]


@given(st.lists(st.integers(0, 60)))
def test_pieces_may_be_cut_anywhere(cuts: list[int]) -> None:
    body = f"{TEXT}\r\n\r\n{TEXT}\ndata: [DONE]".encode()
    places = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
    pieces = [body[a:b] for a, b in pairwise(places)]
    assert list(lines(pieces)) == [TEXT, "", TEXT, "data: [DONE]"]


async def test_awaited_pieces_are_split_alike() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in f"{TEXT}\nb\n".encode():
            yield bytes([byte])

    assert [line async for line in alines(pieces())] == [TEXT, "b"]
