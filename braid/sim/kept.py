"""Ended samples whose blocks stay, because something will go on from them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from braid.sim.engine import Engine

KEEP_S = 60.0
"""Seconds that a kept sample is held without being used."""


@dataclass(slots=True)
class _Kept:
    tokens: Sequence[int]
    blocks: list[int]
    timer: asyncio.TimerHandle


class Kept:
    """Kept samples of a worker by name; over ``capacity`` blocks the longest unused go first."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._engine = engine
        self._capacity = capacity
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def blocks(self) -> list[list[int]]:
        """Blocks of each."""
        return [kept.blocks for kept in self._kept.values()]

    def add(self, name: str, tokens: Sequence[int], blocks: list[int]) -> None:
        """Hold a sample's blocks, which are the caller's until now."""
        self.forget(name)
        timer = asyncio.get_running_loop().call_later(KEEP_S, self.forget, name)
        self._kept[name] = _Kept(tokens, blocks, timer)
        while sum(map(len, self.blocks)) > self._capacity:
            self.forget(next(iter(self._kept)))

    def common(self, name: str, tokens: Sequence[int]) -> int:
        """Leading tokens that a kept sample has too; 0 if it is not there. It counts as used."""
        kept = self._kept.get(name)
        if kept is None:
            return 0
        kept.timer.cancel()
        kept.timer = asyncio.get_running_loop().call_later(KEEP_S, self.forget, name)
        self._kept.move_to_end(name)
        pairs = enumerate(zip(kept.tokens, tokens, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(kept.tokens), len(tokens)))

    def forget(self, name: str) -> None:
        """Let go of a sample. Idempotent."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            kept.timer.cancel()
            self._engine.scheduler.pool.free(kept.blocks)
            self._engine.poke()

    def clear(self) -> None:
        """Let go of all."""
        for name in list(self._kept):
            self.forget(name)
