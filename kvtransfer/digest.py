"""Checksums of blocks on their way: xxh3-64 over the rows as they are sent."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import xxhash

Check = Literal["off", "sampled", "full"]
SAMPLE = 16
"""With ``sampled``, one staged piece of this many carries a digest, in every parcel of it."""


class Digests:
    """Computes digests as often as the setting says. ``check``: off, sampled (one in 16) or full."""

    def __init__(self, check: Check) -> None:
        self._every = {"off": 0, "sampled": SAMPLE, "full": 1}[check]
        self._turn = itertools.count()

    def of(self, rows: Any) -> int:
        """Digest of ``[layers, count, heads, row_bytes]``, 0 if it is not its turn."""
        if not self._every or next(self._turn) % self._every:
            return 0
        return digest(rows)


def digest(rows: Any) -> int:
    """xxh3-64 of the rows in C order; never 0, which means "none"."""
    return xxhash.xxh3_64_intdigest(memoryview(rows.contiguous().numpy()).cast("B")) or 1
