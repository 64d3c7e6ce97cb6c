"""Gather and scatter of blocks in a paged KV cache, all layers of a group at once.

A cache has groups (layers that share block tables: all of them, or full and sliding-window layers apart).
A group is a list of layer tensors whose outermost dimension is the block and whose next is the head; what a
head keeps for a block (kernels pack it as they like) is a row of opaque bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kvtransfer import rowcopy
from kvtransfer.fence import Fence
from kvtransfer.rows import Rows
from kvtransfer.wire import Shape

STREAM_BYTES = 64 * 1024
"""Tensors of rows that together are at least as large are written past the CPU's caches
(:mod:`kvtransfer.rowcopy`)."""


class Cache(Protocol):
    """The blocks of one engine rank.

    Any thread may call, as long as the caller owns the blocks it names. A returned fence has passed when the
    copy is complete; None says it is complete already. Rows are ``[layers, count, heads, row_bytes]``, uint8.

    Attributes:
        shapes: one a group.
        blocks: number of blocks of the pool that all groups share.
    """

    shapes: tuple[Shape, ...]
    blocks: int

    def gather(self, group: int, block_ids: Sequence[int], out: torch.Tensor) -> Fence | None:
        """Copy blocks into host memory ``out``, all heads.

        Raises:
            IndexError: the cache has no such block.
        """

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> Fence | None:
        """Copy host ``rows`` into the blocks' heads from ``put`` on. ``rows`` may be strided and read-only.

        Raises:
            ValueError: the rows do not have the group's shape.
            IndexError: the cache has no such block.
        """

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy one block onto another, in the order of the model's own work."""


@dataclass(slots=True)
class Group:
    """Layers that share block tables, each ``[blocks, heads, ...]`` on one device; ``heads`` 1 if what is
    inside a block can't be told apart by head."""

    layers: Sequence[torch.Tensor]
    heads: int = 1


class HostCache:
    """A :class:`Cache` in host memory. Owns nothing: it views the engine's tensors."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = [[as_rows(layer, group.heads).numpy() for layer in group.layers] for group in groups]
        self._whole = [_one_array(layers) for layers in self._groups]
        self._pages = [_Pages(layers) for layers in self._groups]
        self.shapes = tuple(shape_of(layers) for layers in self._groups)
        self.blocks = self._groups[0][0].shape[0]
        if any(layers[0].shape[0] != self.blocks for layers in self._groups):
            raise ValueError("groups share one pool: each needs as many blocks as the others")

    def gather(self, group: int, block_ids: Sequence[int], out: torch.Tensor) -> None:
        self._check(block_ids)
        target, ids = out.numpy(), np.asarray(block_ids, dtype=np.intp)
        whole = self._whole[group]
        if whole is not None:
            np.take(whole, ids, axis=1, out=target, mode="clip")
            return
        for layer, rows in zip(self._groups[group], target, strict=True):
            np.take(layer, ids, axis=0, out=rows, mode="clip")

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> None:
        check_rows(self.shapes[group], len(block_ids), rows, put)
        if not block_ids:
            return
        self._check(block_ids)
        self._pages[group].write(np.asarray(block_ids, dtype=np.int64), rows.numpy(), put)

    def prepare(self, group: int, block_ids: Sequence[int], heads: int, put: int) -> _Prepared | None:
        """See :class:`kvtransfer.target.Prepares`."""
        return self._pages[group].prepare(np.asarray(block_ids, dtype=np.int64), heads, put)

    def copy(self, group: int, source: int, target: int) -> None:
        self._check((source, target))
        for layer in self._groups[group]:
            layer[target] = layer[source]

    def _check(self, block_ids: Sequence[int]) -> None:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.blocks:
            raise IndexError(f"{min(block_ids)}..{max(block_ids)} are not in a cache of {self.blocks} blocks")


class _Pages:
    """The blocks of a group's layers as one array, however far apart the layers lie.

    Writing a few blocks layer by layer costs more in calls than in copies; this is one call for all layers.
    The array spans all memory from the first layer to the last and is only ever used at places inside a
    layer.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        starts = [int(layer.__array_interface__["data"][0]) for layer in layers]
        self._layers = layers
        _, heads, self._row_bytes = layers[0].shape
        self._block_bytes = heads * self._row_bytes
        self._first, self._end = min(starts), max(starts) + layers[0].nbytes
        self._step = math.gcd(*(start - self._first for start in starts), self._row_bytes)
        self._at = np.asarray([start - self._first for start in starts], dtype=np.intp)[:, None]
        self._starts = np.asarray(starts, dtype=np.int64)
        aligned = not any(place % rowcopy.ALIGN for place in (*starts, self._row_bytes))
        self._write_blocks = rowcopy.compiled() if aligned else None
        memory = (ctypes.c_char * (self._end - self._first)).from_address(self._first)
        self._memory = np.frombuffer(memory, dtype=np.uint8)

    def write(self, ids: Any, rows: Any, put: int) -> None:
        """Copy ``[layers, count, heads, row_bytes]`` into the heads from ``put`` on of blocks that exist."""
        inside = self._first <= rows.__array_interface__["data"][0] < self._end
        if inside or rows.strides[2:] != (self._row_bytes, 1):  # NumPy would copy what it can't tell apart
            for layer, layer_rows in zip(self._layers, rows, strict=True):
                layer[ids, put : put + rows.shape[2]] = layer_rows
            return
        nbytes = rows.shape[2] * self._row_bytes
        if self._write_blocks is not None and nbytes % rowcopy.STEP == 0 and rows.size >= STREAM_BYTES:
            self._stream(ids, rows, put, nbytes)
            return
        chunk = np.dtype((np.void, nbytes))
        count = (len(self._memory) - chunk.itemsize) // self._step + 1
        pages = np.ndarray((count,), chunk, self._memory, 0, (self._step,))
        at = (self._at + put * self._row_bytes + ids * self._block_bytes) // self._step
        if rows.flags.c_contiguous:
            pages[at.reshape(-1)] = rows.reshape(-1).view(chunk)
        else:
            first = rows[:1, :1].reshape(-1).view(chunk)
            pages[at] = np.lib.stride_tricks.as_strided(first, rows.shape[:2], rows.strides[:2])

    def prepare(self, ids: Any, heads: int, put: int) -> _Prepared | None:
        """What writes heads of blocks that exist with streaming stores, or None if they can't be used."""
        if self._write_blocks is None or heads * self._row_bytes % rowcopy.STEP:
            return None
        starts = self._starts + put * self._row_bytes
        return _Prepared(self._write_blocks, starts, ids, heads, self._row_bytes, self._block_bytes)

    def _stream(self, ids: Any, rows: Any, put: int, nbytes: int) -> None:
        assert self._write_blocks is not None
        starts = self._starts + put * self._row_bytes if put else self._starts
        self._write_blocks(
            rows.shape[0],
            rows.shape[1],
            starts.ctypes.data,
            ids.ctypes.data,
            self._block_bytes,
            rows.ctypes.data,
            rows.strides[0],
            rows.strides[1],
            nbytes,
        )


class _Prepared:
    """One compiled call that copies received rows, with all its arguments but where they lie.

    Args:
        starts: addresses of the layers' first head to write, int64; ``ids``: of the blocks, int64.
    """

    __slots__ = (
        "_arrays",
        "_block_bytes",
        "_count",
        "_ids",
        "_layers",
        "_nbytes",
        "_row",
        "_starts",
        "_write",
    )

    def __init__(
        self, write: rowcopy.WriteBlocks, starts: Any, ids: Any, heads: int, row_bytes: int, block_bytes: int
    ) -> None:
        self._write, self._arrays = write, (starts, ids)
        self._starts, self._ids = int(starts.ctypes.data), int(ids.ctypes.data)
        self._layers, self._count = len(starts), len(ids)
        self._row, self._nbytes, self._block_bytes = (heads, row_bytes), heads * row_bytes, block_bytes

    def __call__(self, at: int, rows: Rows) -> None:
        """Raises ValueError for rows that are not of as many blocks as there are from ``at`` on."""
        layers, count, *row = rows.shape
        if (
            layers != self._layers
            or tuple(row) != self._row
            or count < 1
            or not 0 <= at <= self._count - count
        ):
            raise ValueError(f"rows of shape {rows.shape} for {self._count} blocks from {at} on")
        self._write(
            layers,
            count,
            self._starts,
            self._ids + at * 8,
            self._block_bytes,
            rows.address + rows.offset,
            rows.layer_stride,
            rows.block_stride,
            self._nbytes,
        )


def as_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """View ``[blocks, heads, ...]`` as ``[blocks, heads, row_bytes]``, uint8.

    Raises:
        ValueError: a block is not contiguous, or not divisible by heads.
    """
    inner = tensor[0].numel() * tensor.element_size()
    if tensor.stride(0) * tensor.element_size() != inner or not tensor.is_contiguous() or inner % heads:
        raise ValueError(
            f"blocks of shape {tuple(tensor.shape)} with strides {tensor.stride()} do not lie one after the "
            f"other with {heads} heads each; this KV cache layout is not supported"
        )
    return tensor.view(tensor.shape[0], -1).view(torch.uint8).view(tensor.shape[0], heads, inner // heads)


def shape_of(layers: Sequence[Any]) -> Shape:
    """The shape that all layers ``[blocks, heads, row_bytes]`` of a group have. Raises ValueError if not."""
    if len({layer.shape for layer in layers}) != 1:
        raise ValueError(f"layers of one group have different shapes: {sorted({x.shape for x in layers})}")
    return Shape(len(layers), int(layers[0].shape[1]), int(layers[0].shape[2]))


def check_rows(shape: Shape, count: int, rows: torch.Tensor, put: int) -> None:
    """Raise ValueError unless ``rows`` are ``count`` blocks of ``shape`` whose heads fit from ``put`` on."""
    layers, blocks, heads, row_bytes = rows.shape
    fits = 0 <= put <= shape.heads - heads
    if (layers, blocks, row_bytes) != (shape.layers, count, shape.row_bytes) or not fits:
        raise ValueError(f"rows of shape {tuple(rows.shape)} at head {put} for {count} blocks of {shape}")


def _one_array(layers: list[Any]) -> Any:
    """All layers as one array ``[layers, ...]`` if they lie one after the other in memory, else None."""
    first = layers[0]
    starts = [layer.__array_interface__["data"][0] for layer in layers]
    if any(start != starts[0] + i * first.nbytes for i, start in enumerate(starts)):
        return None
    return np.lib.stride_tricks.as_strided(first, (len(layers), *first.shape), (first.nbytes, *first.strides))
