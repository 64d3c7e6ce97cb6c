"""One memory copy, the ceiling of what moves bytes through a host's memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.kv_layout import Evictor, layout_of, now


class Copier:
    """Copies a stretch of one buffer into another, both as large as the contenders' pools and touched."""

    def __init__(self, layout: dict[str, int]) -> None:
        shape = layout_of(layout)
        self._source = np.full((shape.blocks, shape.block_bytes), 1, np.uint8)
        self._target = np.full((shape.blocks, shape.block_bytes), 2, np.uint8)
        self._evictor = Evictor()

    def copy(self, source: int, target: int, count: int) -> dict[str, Any]:
        """Copy `count` blocks' bytes in one call, from block `source` on to block `target` on."""
        self._evictor.evict()
        start = now()
        np.copyto(self._target[target : target + count], self._source[source : source + count])
        return {"seconds": now() - start}

    def close(self) -> None:
        """Nothing is held."""
