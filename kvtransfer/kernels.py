"""Triton kernels that move rows between a paged cache's layers and a flat buffer, all layers in one launch.

They know addresses only: a table of the layers' base addresses, strides in words, block ids. They run on a
CUDA device or, with ``TRITON_INTERPRET=1`` set before Triton is imported, on CPU tensors. How fast they are
has not been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from kvtransfer.cache import Group
from kvtransfer.wire import Shape

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_TILE = 1024
"""Words one program copies: 8 KiB at 8 bytes a word."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _spread(
    word: tl.tensor, TOKENS: tl.constexpr, RUN: tl.constexpr, PART: tl.constexpr, TOKEN: tl.constexpr
) -> tl.tensor:
    """Where the words of a row lie in the layer: parts of ``TOKENS`` runs of ``RUN`` words each."""
    return (
        word // (TOKENS * RUN) * tl.full((), PART, tl.int64)
        + word // RUN % TOKENS * tl.full((), TOKEN, tl.int64)
        + word % RUN
    )


@triton.jit(do_not_specialize=["layer", "count", "heads", "head"])  # type: ignore[untyped-decorator,unused-ignore]
def _move(
    table: tl.tensor,
    ids: tl.tensor,
    flat: tl.tensor,
    layer: tl.tensor,
    count: tl.tensor,
    heads: tl.tensor,
    head: tl.tensor,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    RUN: tl.constexpr,
    PART: tl.constexpr,
    TOKEN: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """Rows ``[layers, count, heads]`` between ``flat`` and blocks ``ids``, from ``layer`` and ``head`` on.

    A program takes one tile of one row. ``BLOCK`` and ``HEAD`` are strides in bytes, ``ROW`` words a row.
    """
    TILES: tl.constexpr = (ROW + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    row = program // TILES
    block = tl.load(ids + row // heads % count)
    base = tl.load(table + layer + row // heads // count)
    base += block * BLOCK + (head + row % heads) * HEAD
    word = (program % TILES).to(tl.int32) * TILE + tl.arange(0, TILE)
    within = word if RUN == ROW else _spread(word, TOKENS, RUN, PART, TOKEN)
    paged = base.to(flat.dtype) + within
    packed = flat + row * ROW + word
    paged, packed = tl.multiple_of(paged, ALIGN), tl.multiple_of(packed, ALIGN)
    if GATHER:
        tl.store(packed, tl.load(paged, mask=word < ROW), mask=word < ROW)
    else:
        tl.store(paged, tl.load(packed, mask=word < ROW), mask=word < ROW)


@triton.jit(do_not_specialize=["source", "target", "heads"])  # type: ignore[untyped-decorator,unused-ignore]
def _copy(
    table: tl.tensor,
    kind: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    heads: tl.tensor,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    RUN: tl.constexpr,
    PART: tl.constexpr,
    TOKEN: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Rows ``[layers, heads]`` of block ``source`` onto ``target``. ``kind``: any tensor of words."""
    TILES: tl.constexpr = (ROW + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.int64)
    row = program // TILES
    base = tl.load(table + row // heads) + row % heads * HEAD
    word = (program % TILES).to(tl.int32) * TILE + tl.arange(0, TILE)
    within = word if RUN == ROW else _spread(word, TOKENS, RUN, PART, TOKEN)
    read = (base + source.to(tl.int64) * BLOCK).to(kind.dtype) + within
    write = (base + target.to(tl.int64) * BLOCK).to(kind.dtype) + within
    read, write = tl.multiple_of(read, ALIGN), tl.multiple_of(write, ALIGN)
    tl.store(write, tl.load(read, mask=word < ROW), mask=word < ROW)


@dataclass(frozen=True, slots=True)
class Box:
    """Rows ``[layers, blocks, heads]`` of a larger ``[layers, count, heads]``."""

    layers: slice
    blocks: slice
    heads: slice

    @property
    def index(self) -> tuple[slice, slice, slice]:
        return self.layers, self.blocks, self.heads

    @property
    def shape(self) -> tuple[int, int, int]:
        layers, blocks, heads = (part.stop - part.start for part in self.index)
        return layers, blocks, heads

    @property
    def rows(self) -> int:
        return math.prod(self.shape)


class PagedRows:
    """Where the rows of a group lie, and their moves. Launches go to the device's current stream.

    A layer is ``[blocks, heads, ...]``. Strides are free, and the same in every layer, as long as what a head
    keeps for a block is at most two nested repetitions of one contiguous run: ``[parts, tokens, run]``.
    ``[blocks, heads, tokens, width]`` is one run if heads come before tokens in memory and a run a token if
    they come after; see :func:`by_block` for keys and values that lie apart.

    Attributes:
        shape: of a block; a row holds its runs in the order of the layer's dimensions.
        blocks: of a layer.
    """

    def __init__(self, group: Group) -> None:
        self._layers = list(group.layers)  # their memory lives as long as the table of its addresses
        views = [_by_head(layer, group.heads) for layer in self._layers]
        layouts = {(view.shape, view.stride(), view.dtype, view.device) for view in views}
        if len(layouts) != 1:
            raise ValueError(
                f"layers of one group lie in memory in different ways: {sorted(map(str, layouts))}"
            )
        first = views[0]
        (parts, part), (tokens, token), run = _runs(first)
        block, head = (stride * first.element_size() for stride in first.stride()[:2])
        self.blocks, heads = first.shape[:2]
        self.shape = Shape(len(views), heads, parts * tokens * run)
        addresses = [view.data_ptr() for view in views]
        self._table = torch.tensor(addresses, dtype=torch.int64, device=first.device)
        align = math.gcd(16, run, block, head, part, token, *addresses)
        size = min(8, align)
        self.word = _WORDS[size]
        row = self.shape.row_bytes // size
        self._layout = {
            "BLOCK": block,
            "HEAD": head,
            "ROW": row,
            "TOKENS": tokens,
            "RUN": run // size,
            "PART": part // size,
            "TOKEN": token // size,
            "ALIGN": align,
            "TILE": min(_TILE, triton.next_power_of_2(row)),
        }
        self._tiles = triton.cdiv(row, self._layout["TILE"])
        self._kind = torch.empty(0, dtype=self.word, device=first.device)

    def gather(self, box: Box, ids: torch.Tensor, flat: torch.Tensor) -> None:
        """Copy the rows of ``box`` into ``flat``, bytes, one after the other.

        ``ids`` are those of the box's blocks; both tensors are on the layers' device.
        """
        self._launch(box, ids, flat, 0, True)

    def scatter(self, box: Box, ids: torch.Tensor, flat: torch.Tensor, put: int = 0) -> None:
        """The reverse; the box's head 0 is the layers' head ``put``."""
        self._launch(box, ids, flat, put, False)

    def copy(self, source: int, target: int) -> None:
        """Copy one block onto another, all layers and heads."""
        grid = (self.shape.layers * self.shape.heads * self._tiles,)
        _copy[grid](self._table, self._kind, source, target, self.shape.heads, **self._layout)

    def _launch(self, box: Box, ids: torch.Tensor, flat: torch.Tensor, put: int, gather: bool) -> None:
        _, count, heads = box.shape
        words = flat[: box.rows * self.shape.row_bytes].view(self.word)
        first, head = box.layers.start, put + box.heads.start
        grid = (box.rows * self._tiles,)
        _move[grid](self._table, ids, words, first, count, heads, head, **self._layout, GATHER=gather)


def by_block(layer: torch.Tensor, axes: str) -> torch.Tensor:
    """A layer seen as ``[blocks, heads, ...]``, whatever the order of its axes.

    Args:
        axes: a letter an axis: K (keys and values apart), B (block), H (head), N (token), C (what a head
            keeps for a token), such as ``KBHNC``, ``KBNHC``, ``BKNHC``, ``BHNC``.

    Raises:
        ValueError: ``axes`` does not fit the layer.
    """
    if len(axes) != layer.dim() or len(set(axes)) != len(axes) or not {"B", "H"} <= set(axes) <= set("BHKNC"):
        raise ValueError(f"{axes!r} does not name the axes of a layer of shape {tuple(layer.shape)}")
    return layer.permute([axes.index(axis) for axis in "BHKNC" if axis in axes])


def boxes(layers: int, count: int, heads: int, most: int) -> list[Box]:
    """Cut rows ``[layers, count, heads]`` into boxes of at most ``most`` rows, consecutive in C order."""
    if count * heads <= most:
        step = most // max(1, count * heads)
        return [Box(part, slice(0, count), slice(0, heads)) for part in _cuts(layers, step)]
    whole = heads <= most
    blocks = _cuts(count, most // heads if whole else 1)
    parts = [slice(0, heads)] if whole else _cuts(heads, most)
    return [Box(layer, block, head) for layer in _cuts(layers, 1) for block in blocks for head in parts]


def _cuts(length: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


def _by_head(layer: torch.Tensor, heads: int) -> torch.Tensor:
    if layer.dim() < 2 or layer.shape[1] % heads:
        raise ValueError(f"a layer of shape {tuple(layer.shape)} is not [blocks, {heads} heads, ...]")
    return layer.unflatten(1, (heads, -1))


def _runs(layer: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(parts, stride), (tokens, stride), run of a row of ``[blocks, heads, ...]``, in bytes."""
    size = layer.element_size()
    merged = [(size, 1)]
    for length, stride in reversed(list(zip(layer.shape[2:], layer.stride()[2:], strict=True))):
        inner, inner_stride = merged[0]
        if stride * size == inner * inner_stride or length == 1:
            merged[0] = (inner * length, inner_stride)
        else:
            merged.insert(0, (length, stride * size))
    repeats = [(1, 0)] * (3 - len(merged)) + merged[:-1]
    if len(repeats) != 2:
        raise ValueError(
            f"what a head keeps for a block of shape {tuple(layer.shape)} with strides {layer.stride()} is "
            "more than two nested repetitions of a contiguous run; this KV cache layout is not supported"
        )
    return repeats[0], repeats[1], merged[-1][0]
