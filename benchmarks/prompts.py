"""Prompts that no cache has seen: token ids drawn at random, reproducible by seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec


class Prompts:
    """Draws prompts from the tokens of a model that decode to printable ASCII.

    Other tokens may be parts of a character; a detokenizer that waits for the rest of one delays the first
    text, which would be timed as if it were the engine.
    """

    def __init__(self, model: Path, seed: int) -> None:
        self._tokens = ascii_tokens(model / "tokenizer.json")
        self._seed = seed

    def draw(self, *key: object, length: int) -> list[int]:
        """`length` token ids; the same for the same key, unrelated for any other."""
        generator = random.Random(":".join(map(str, (self._seed, *key, length))))
        return generator.choices(self._tokens, k=length)


def ascii_tokens(tokenizer: Path) -> list[int]:
    """Ids of the ordinary tokens of a byte-level BPE `tokenizer.json` that are printable ASCII."""
    content: dict[str, Any] = msgspec.json.decode(tokenizer.read_bytes())
    special = {token["id"] for token in content["added_tokens"]}
    vocabulary: dict[str, int] = content["model"]["vocab"]
    texts = ((token.replace("\u0120", " "), number) for token, number in vocabulary.items())
    return sorted(number for text, number in texts if _is_plain(text) and number not in special)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
