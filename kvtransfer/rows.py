"""Blocks as they were received: where they lie in memory, and a tensor only for who asks for one.

To wrap received bytes in tensors and arrays takes longer than to copy a megabyte of them when the
interpreter's own data are not in the CPU's caches, as after a step of the model.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from typing import Any

import torch

# A peer's arena is read-only memory, and is only ever read from.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


@dataclass(slots=True)
class Rows:
    """Rows ``[layers, count, heads, row_bytes]`` in memory of somebody else; the heads of a block in a row.

    Attributes:
        memory: a buffer that holds them; kept by this.
        address: of its first byte.
        offset: of the first row in it, bytes; ``layer_stride`` and ``block_stride`` likewise.
    """

    memory: Any
    address: int
    offset: int
    shape: tuple[int, int, int, int]
    layer_stride: int
    block_stride: int

    def tensor(self) -> torch.Tensor:
        """The rows as uint8, a view; for reading only."""
        strides = (self.layer_stride, self.block_stride, self.shape[3], 1)
        return torch.frombuffer(self.memory, dtype=torch.uint8).as_strided(self.shape, strides, self.offset)


def packed(memory: Any, address: int, shape: tuple[int, int, int, int]) -> Rows:
    """Rows that fill ``memory`` one after the other."""
    block = shape[2] * shape[3]
    return Rows(memory, address, 0, shape, shape[1] * block, block)


def address_of(memory: Any) -> int:
    """Where a writable buffer begins; the caller keeps it alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def as_tensor(rows: Rows | torch.Tensor) -> torch.Tensor:
    """Rows as a tensor, if they are none."""
    return rows.tensor() if isinstance(rows, Rows) else rows
