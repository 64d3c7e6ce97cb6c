"""Where a load's blocks go, looked up before their bytes come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from kvtransfer.cache import Cache
from kvtransfer.fence import Fence
from kvtransfer.rows import Rows, as_tensor

Write = Callable[[int, Rows], None]
"""Writes rows into the blocks from a place of the list on. Raises ValueError if they don't fit there."""


@runtime_checkable
class Prepares(Protocol):
    """A cache that writes received rows where they lie, without tensors."""

    def prepare(self, group: int, block_ids: Sequence[int], heads: int, put: int) -> Write | None:
        """What writes ``heads`` heads from ``put`` on of these blocks, or None if that can't be."""


class Target:
    """Blocks of one group that one source fills: ``heads`` heads of each, from ``put`` on.

    The blocks and heads exist; the consumer has seen to it.
    """

    __slots__ = ("_block_ids", "_cache", "_group", "_put", "_write")

    def __init__(self, cache: Cache, group: int, block_ids: Sequence[int], heads: int, put: int) -> None:
        self._cache, self._group, self._block_ids, self._put = cache, group, block_ids, put
        self._write = cache.prepare(group, block_ids, heads, put) if isinstance(cache, Prepares) else None

    def write(self, at: int, count: int, rows: Rows | torch.Tensor) -> Fence | None:
        """Copy the rows of ``count`` blocks into those of the list from ``at`` on.

        What is returned and raised is that of :meth:`kvtransfer.cache.Cache.scatter`.
        """
        if self._write is not None and isinstance(rows, Rows):
            self._write(at, rows)
            return None
        return self._cache.scatter(self._group, self._block_ids[at : at + count], as_tensor(rows), self._put)
