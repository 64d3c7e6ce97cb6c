"""Gather and scatter of blocks in a paged KV cache, all layers at once (torch).

A cache is a list of layer tensors whose outermost dimension is the block; what is inside a block
(kernels pack it as they like) is moved as opaque bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

# A received frame is read-only memory and is only ever read from.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

_WORD = torch.int64


class PagedCache:
    """The blocks of one engine rank.

    Owns nothing: it views the engine's tensors. ``gather`` and ``scatter`` may run on another thread
    than the model's as long as the caller owns the blocks it names.

    Attributes:
        layers: one ``[blocks, words]`` view a layer, words of 8 bytes.
        blocks: number of blocks.
        layer_bytes: bytes of one block in one layer.
        block_bytes: bytes of one block over all layers.
    """

    def __init__(self, caches: Mapping[str, torch.Tensor]) -> None:
        self.layers = [_as_blocks(name, tensor) for name, tensor in caches.items()]
        shapes = {layer.shape for layer in self.layers}
        if len(shapes) != 1:
            raise ValueError(f"layers with different block shapes are not supported: {sorted(shapes)}")
        self.blocks, words = self.layers[0].shape
        self.layer_bytes = words * _WORD.itemsize
        self.block_bytes = self.layer_bytes * len(self.layers)

    def gather(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Copy blocks into new host memory, ``[layers, len(block_ids), words]``."""
        index = torch.tensor(block_ids, device=self.layers[0].device)
        out = torch.empty((len(self.layers), len(block_ids), self.layers[0].shape[1]), dtype=_WORD)
        for layer, row in zip(self.layers, out, strict=True):
            if layer.device.type == "cpu":
                torch.index_select(layer, 0, index, out=row)
            else:
                row.copy_(layer.index_select(0, index))
        return out

    def scatter(self, block_ids: Sequence[int], payload: memoryview | bytes) -> None:
        """Copy a payload as :meth:`gather` laid it out into these blocks.

        Raises:
            ValueError: the payload's length does not match.
        """
        expected = len(block_ids) * self.block_bytes
        if len(payload) != expected:
            raise ValueError(f"payload of {len(payload)} bytes, expected {expected}")
        source = torch.frombuffer(payload, dtype=_WORD).view(len(self.layers), len(block_ids), -1)
        index = torch.tensor(block_ids, device=self.layers[0].device)
        for layer, row in zip(self.layers, source, strict=True):
            layer.index_copy_(0, index, row.to(layer.device))
        if self.layers[0].device.type == "cuda":
            torch.cuda.current_stream(self.layers[0].device).synchronize()

    def copy(self, source: int, target: int) -> None:
        """Copy one block onto another, in every layer."""
        for layer in self.layers:
            layer[target].copy_(layer[source])


def _as_blocks(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """View ``[blocks, ...]`` as ``[blocks, words]``."""
    stride = tensor.stride(0) * tensor.element_size()
    inner = tensor[0].numel() * tensor.element_size()
    start = tensor.storage_offset() * tensor.element_size()
    words = stride % _WORD.itemsize == 0 and start % _WORD.itemsize == 0
    if stride != inner or not words or not tensor[0].is_contiguous():
        raise ValueError(
            f"{name}: blocks are not whole words in a row (stride {stride} bytes, {inner} of data, "
            f"shape {tuple(tensor.shape)}); this KV cache layout is not supported"
        )
    return tensor.view(tensor.shape[0], -1).view(_WORD)
