"""Gather, scatter and copy in tensors shaped as vLLM's."""

from __future__ import annotations

import pytest
import torch

from kvtransfer.paged import PagedCache

BLOCKS, HEADS, TOKENS, CHANNELS = 6, 2, 4, 16
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_layers(dtype: torch.dtype, device: str = "cpu", layers: int = 3) -> dict[str, torch.Tensor]:
    """``[B, H, N, C]`` views into one storage, each at an offset of its own."""
    size = BLOCKS * HEADS * TOKENS * CHANNELS
    storage = torch.randint(0, 255, (layers * size * dtype.itemsize,), dtype=torch.uint8, device=device)
    flat = storage.view(dtype)
    return {
        f"layer{i}": flat[i * size : (i + 1) * size].view(BLOCKS, HEADS, TOKENS, CHANNELS)
        for i in range(layers)
    }


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def moves_blocks(dtype: torch.dtype, device: str) -> None:
    source, target = make_layers(dtype, device), make_layers(dtype, device)
    before = {name: as_bytes(tensor).clone() for name, tensor in target.items()}
    payload = PagedCache(source).gather([4, 1])
    assert payload.device.type == "cpu"
    PagedCache(target).scatter([0, 3], payload.numpy().tobytes())
    for name, tensor in target.items():
        theirs, ours = as_bytes(source[name]), as_bytes(tensor)
        assert torch.equal(ours[[0, 3]], theirs[[4, 1]])
        assert torch.equal(ours[[1, 2, 4, 5]], before[name][[1, 2, 4, 5]])


@every_dtype
def test_blocks_move_and_the_others_stay(dtype: torch.dtype) -> None:
    moves_blocks(dtype, "cpu")


@pytest.mark.gpu
@every_dtype
def test_blocks_move_on_a_gpu_and_the_others_stay(dtype: torch.dtype) -> None:
    moves_blocks(dtype, "cuda")


@every_dtype
def test_a_copy_changes_one_block_in_every_layer(dtype: torch.dtype) -> None:
    layers = make_layers(dtype)
    before = {name: as_bytes(tensor).clone() for name, tensor in layers.items()}
    PagedCache(layers).copy(5, 2)
    for name, tensor in layers.items():
        expected = before[name]
        expected[2] = expected[5]
        assert torch.equal(as_bytes(tensor), expected)


def test_sizes_count_bytes_over_all_layers() -> None:
    cache = PagedCache(make_layers(torch.bfloat16))
    assert cache.blocks == BLOCKS
    assert cache.layer_bytes == HEADS * TOKENS * CHANNELS * 2
    assert cache.block_bytes == 3 * cache.layer_bytes


def test_a_gathered_piece_is_memory_of_its_own() -> None:
    layers = make_layers(torch.float32)
    piece = PagedCache(layers).gather([1])
    before = piece.clone()
    layers["layer0"].zero_()
    assert torch.equal(piece, before)


@pytest.mark.parametrize("change", [-1, 1, 8, -8])
def test_a_payload_of_another_length_is_refused_and_writes_nothing(change: int) -> None:
    layers = make_layers(torch.float32)
    cache = PagedCache(layers)
    before = as_bytes(layers["layer0"]).clone()
    with pytest.raises(ValueError, match="expected"):
        cache.scatter([1, 2], bytes(2 * cache.block_bytes + change))
    assert torch.equal(as_bytes(layers["layer0"]), before)


def test_a_payload_may_start_at_any_address() -> None:
    cache = PagedCache(make_layers(torch.float32))
    payload = cache.gather([1]).numpy().tobytes()
    cache.scatter([2], memoryview(b"x" + payload)[1:])
    assert torch.equal(cache.gather([1]), cache.gather([2]))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(BLOCKS, TOKENS, HEADS, CHANNELS).permute(0, 2, 1, 3),
        torch.zeros(HEADS, BLOCKS, TOKENS, CHANNELS).permute(1, 0, 2, 3),
        torch.zeros(BLOCKS, 2 * TOKENS, CHANNELS)[:, :TOKENS],
        torch.zeros(BLOCKS, 3, dtype=torch.uint8),
        torch.zeros(1 + BLOCKS * 4)[1:].view(BLOCKS, 4),
    ],
    ids=["heads inside", "blocks inside", "padded", "odd size", "odd offset"],
)
def test_a_layout_whose_blocks_are_not_whole_words_in_a_row_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not supported"):
        PagedCache({"layer": tensor})


def test_layers_of_different_block_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="different block shapes"):
        PagedCache({"a": torch.zeros(BLOCKS, 8), "b": torch.zeros(BLOCKS, 16)})
