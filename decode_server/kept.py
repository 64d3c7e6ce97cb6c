"""Samples whose KV stays in the cache, because something will go on from them.

The engine pins a kept sample's blocks when it ends (:mod:`kvtransfer.adapter.imports`); here is what the
server knows of them: their tokens, how many blocks they hold, and when to let go. What goes on from a sample
repeats its text, and a tokenizer may cut the same text elsewhere than the model did when it wrote it, so
:func:`splice` puts the sample's own tokens back.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

KEEP_S = 60.0
"""Seconds that a kept sample is held without being used."""

Release = Callable[[str], None]
"""Unpins a kept sample's blocks, sometime soon. Idempotent."""


class Tokenizer(Protocol):
    """The part of a tokenizer that splicing needs."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(slots=True)
class _Kept:
    tokens: list[int]
    blocks: int
    timer: asyncio.TimerHandle


class KeptSamples:
    """The kept samples of a decode worker.

    Args:
        capacity: most blocks that they may hold together; the longest unused go first.
        blocks_of: how many a sequence of so many tokens holds, of all cache groups.
        release: see :data:`Release`; also for names that were never added.
    """

    def __init__(self, capacity: int, blocks_of: Callable[[int], int], release: Release) -> None:
        self._capacity = capacity
        self._blocks_of = blocks_of
        self.release = release
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, name: str, tokens: list[int]) -> None:
        """A sample has ended that the engine was told to keep. ``tokens``: its prompt and its own.

        One that alone is over the capacity is released at once.
        """
        self.forget(name)
        timer = asyncio.get_running_loop().call_later(KEEP_S, self.forget, name)
        self._kept[name] = _Kept(tokens, self._blocks_of(len(tokens)), timer)
        self.blocks += self._kept[name].blocks
        while self.blocks > self._capacity:
            self.forget(next(iter(self._kept)))

    def tokens(self, name: str) -> list[int] | None:
        """A kept sample's tokens; None if it is not there any more. It counts as used."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        kept.timer.cancel()
        kept.timer = asyncio.get_running_loop().call_later(KEEP_S, self.forget, name)
        self._kept.move_to_end(name)
        return kept.tokens

    def forget(self, name: str) -> None:
        """Let go of a sample. Idempotent."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            kept.timer.cancel()
            self.blocks -= kept.blocks
            self.release(name)

    def clear(self) -> None:
        """Let go of all."""
        for name in list(self._kept):
            self.forget(name)


def splice(kept: Sequence[int], rendered: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """A prompt's tokens with as many of a sample's own at its start as spell the same text.

    Returns ``rendered`` unless the result spells exactly what it does.
    """
    start = common(kept, rendered)
    if start == min(len(kept), len(rendered)):
        return list(rendered)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    text = decode(rendered[start:])
    fits = range(start, len(kept) + 1)
    # How many of its tokens spell a beginning of the text: the first ones do, if any.
    count = bisect_right(fits, 0, key=lambda end: 0 if text.startswith(decode(kept[start:end])) else 1)
    own = list(kept[start : start + count - 1])
    rest = tokenizer.encode(text[len(decode(own)) :], add_special_tokens=False)
    return [*kept[:start], *own, *rest] if decode([*own, *rest]) == text else list(rendered)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
