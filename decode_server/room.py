"""How much of a decode worker's KV cache may be held by what is no running sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvtransfer.plan import Blocking, num_blocks

_NULL_BLOCKS = 1
"""Blocks of vLLM's pool that hold nobody's tokens."""


class Room(NamedTuple):
    """Most blocks that imports and kept samples may hold."""

    imports: int
    kept: int


def longest_sequence(groups: Sequence[Blocking], tokens: int, chunk: int) -> int:
    """Pool blocks that a sequence of ``tokens`` tokens may hold while it runs, ``chunk`` of them a step. Of a
    windowed group that is its window and the chunk."""
    held = [min(tokens, group.window + chunk) if group.window else tokens for group in groups]
    return sum(num_blocks(count, group.block_size) + 1 for count, group in zip(held, groups, strict=True))


def divide(blocks: int, longest: int, max_load_share: float, max_kept_share: float) -> Room:
    """Shares of a pool of ``blocks``, with room for one sequence of ``longest`` blocks beside both.

    Imports are released when the samples behind them have ended, which wait in the engine's order behind a
    sequence that is to be let in. If that one did not fit beside what imports and kept samples hold,
    neither would ever go on. Where the pool is too small for the shares, imports get two thirds of what is
    beside that sequence."""
    free = max(0, blocks - _NULL_BLOCKS - longest)
    kept = min(int(blocks * max_kept_share), free // 3)
    return Room(min(int(blocks * max_load_share), free - kept), kept)
