"""The paged memory of `benchmarks.kvtransfer`: the same for every contender.

Standard library and numpy only: workers in another environment import it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

EVICT_BYTES = 96 * 1024 * 1024
"""Swept between preparing a transfer and timing it; several times the last-level cache of most machines."""


@dataclass(frozen=True)
class Layout:
    """A paged KV cache: `layers` arrays `[blocks, heads, row_bytes]`; `piece_bytes` as in the settings."""

    layers: int
    heads: int
    row_bytes: int
    blocks: int
    piece_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.layers * self.heads * self.row_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in one layer, which lie in a row."""
        return self.heads * self.row_bytes

    def public(self) -> dict[str, int]:
        """As a result file shows it, and as a worker is told it."""
        return asdict(self)


class Pool:
    """The layers of one cache, each an allocation of its own, and what evicts them from the CPU's caches.

    `filled`: random bytes, else zeros; every page is touched either way.
    """

    def __init__(self, layout: Layout, filled: bool, seed: int = 0) -> None:
        shape = (layout.blocks, layout.heads, layout.row_bytes)
        random = np.random.default_rng(seed)
        self.layers: list[Bytes] = [
            random.integers(0, 256, shape, dtype=np.uint8) if filled else np.full(shape, 255, np.uint8)
            for _ in range(layout.layers)
        ]

    def checksum(self, block_ids: Sequence[int]) -> int:
        """CRC-32 of the named blocks, layer by layer."""
        value = 0
        for layer in self.layers:
            value = zlib.crc32(layer[list(block_ids)].tobytes(), value)
        return value


class Evictor:
    """Puts other bytes into the CPU's caches than those a transfer is about to touch."""

    def __init__(self) -> None:
        self._sweep = np.zeros(EVICT_BYTES, dtype=np.uint8)

    def evict(self) -> None:
        np.add(self._sweep, 1, out=self._sweep)


def now() -> float:
    """Seconds on a clock that all processes of the machine share (CLOCK_MONOTONIC)."""
    return time.monotonic_ns() / 1e9


def layout_of(values: dict[str, Any]) -> Layout:
    """The inverse of `Layout.public`."""
    return Layout(**values)
