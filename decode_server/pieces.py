"""The text of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_UNFINISHED = "\ufffd"
"""What a tokenizer puts for bytes that are no whole character."""


class Pieces:
    """What tokens spell, each looked up once.

    Args:
        text_of: the text of one token within others, with the space before it.
        decode: the text of a sequence of tokens.
    """

    def __init__(self, text_of: Callable[[int], str], decode: Callable[[Sequence[int]], str]) -> None:
        self._text_of = text_of
        self._decode = decode
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._known.get(token)
        if text is None:
            text = self._known[token] = self._text_of(token)
        return text

    def spell(self, tokens: Iterable[int]) -> list[str]:
        """What each token of a sequence adds to its text. A character of several tokens is the last one's."""
        texts, begun = list[str](), list[int]()
        for token in tokens:
            text = self[token]
            if text.endswith(_UNFINISHED):
                begun.append(token)
                text = self._decode(begun)
                text = "" if text.endswith(_UNFINISHED) else text
            if text:
                begun.clear()
            texts.append(text)
        return texts
