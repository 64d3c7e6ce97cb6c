"""Gather, scatter and copy of blocks in tensors shaped as an engine's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import rowcopy
from kvtransfer.cache import Group, HostCache
from kvtransfer.wire import Shape

BLOCKS, HEADS, TOKENS, CHANNELS = 6, 4, 4, 16
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_place = pytest.mark.parametrize("apart", [False, True], ids=["one storage", "a storage a layer"])


@pytest.fixture(params=["streaming stores", "ordinary stores"], autouse=True)
def stores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of writing, whatever the size."""
    if request.param == "streaming stores":
        assert rowcopy.compiled() is not None, "llvmlite is installed with the engine"
        monkeypatch.setattr("kvtransfer.cache.STREAM_BYTES", 0)
    else:
        monkeypatch.setattr(rowcopy, "compiled", lambda: None)


def make_layers(dtype: torch.dtype, apart: bool = False, layers: int = 3) -> list[torch.Tensor]:
    """``[B, H, N, C]`` layers of random bytes, one after the other in memory or apart."""
    shape = (layers, BLOCKS, HEADS, TOKENS, CHANNELS * dtype.itemsize)
    stacked = torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)
    return [layer.clone() if apart else layer for layer in stacked]


def as_rows(layers: list[torch.Tensor]) -> torch.Tensor:
    """Rows ``[layers, blocks, heads, row_bytes]`` of all blocks, a copy."""
    return torch.stack(layers).view(torch.uint8).reshape(len(layers), BLOCKS, HEADS, -1).clone()


def gathered(cache: HostCache, ids: list[int], group: int = 0) -> torch.Tensor:
    shape = cache.shapes[group]
    out = torch.empty(shape.layers, len(ids), shape.heads, shape.row_bytes, dtype=torch.uint8)
    cache.gather(group, ids, out)
    return out


@every_place
@every_dtype
def test_blocks_move_and_the_others_stay(dtype: torch.dtype, apart: bool) -> None:
    source, target = make_layers(dtype, apart), make_layers(dtype, apart)
    expected = as_rows(target)
    expected[:, [0, 3]] = as_rows(source)[:, [4, 1]]
    rows = gathered(HostCache([Group(source, HEADS)]), [4, 1])
    HostCache([Group(target, HEADS)]).scatter(0, [0, 3], rows)
    assert torch.equal(as_rows(target), expected)


@every_place
@pytest.mark.parametrize(("put", "heads"), [(0, 1), (1, 2), (3, 1), (0, 4)])
def test_a_range_of_heads_is_written_and_the_others_stay(put: int, heads: int, apart: bool) -> None:
    layers = make_layers(torch.bfloat16, apart)
    rows = torch.randint(0, 256, (3, 2, heads, TOKENS * CHANNELS * 2), dtype=torch.uint8)
    expected = as_rows(layers)
    expected[:, [5, 2], put : put + heads] = rows
    HostCache([Group(layers, HEADS)]).scatter(0, [5, 2], rows, put)
    assert torch.equal(as_rows(layers), expected)


@every_place
@every_dtype
def test_a_copy_changes_one_block_in_every_layer(dtype: torch.dtype, apart: bool) -> None:
    layers = make_layers(dtype, apart)
    expected = as_rows(layers)
    expected[:, 2] = expected[:, 5]
    HostCache([Group(layers, HEADS)]).copy(0, 5, 2)
    assert torch.equal(as_rows(layers), expected)


def test_groups_have_blocks_and_shapes_of_their_own() -> None:
    full, window = make_layers(torch.bfloat16, layers=2), make_layers(torch.float32, layers=3)
    cache = HostCache([Group(full, HEADS), Group(window)])
    row = TOKENS * CHANNELS
    assert cache.shapes == (Shape(2, HEADS, row * 2), Shape(3, 1, HEADS * row * 4))
    assert cache.blocks == BLOCKS
    untouched = as_rows(full)
    cache.scatter(1, [1], torch.zeros(3, 1, 1, HEADS * row * 4, dtype=torch.uint8))
    assert torch.equal(as_rows(full), untouched)
    assert not as_rows(window)[:, 1].any()
    cache.copy(1, 1, 4)
    assert not as_rows(window)[:, 4].any()
    assert torch.equal(as_rows(full), untouched)


def test_gathered_rows_are_memory_of_their_own() -> None:
    layers = make_layers(torch.float32)
    rows = gathered(HostCache([Group(layers, HEADS)]), [1])
    before = rows.clone()
    layers[0].zero_()
    assert torch.equal(rows, before)


@every_place
def test_rows_may_be_strided_read_only_and_anywhere_in_memory(apart: bool) -> None:
    layers = make_layers(torch.float32, apart)
    row = TOKENS * CHANNELS * 4
    frame = b"x" + np.random.default_rng(1).bytes(3 * 5 * 6 * row)
    received = torch.frombuffer(memoryview(frame)[1:], dtype=torch.uint8).view(3, 5, 6, row)[:, 3:, 1:3]
    expected = as_rows(layers)
    expected[:, [1, 0], 2:] = received
    HostCache([Group(layers, HEADS)]).scatter(0, [1, 0], received, put=2)
    assert torch.equal(as_rows(layers), expected)


@every_place
@given(ids=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=12))
def test_blocks_are_gathered_in_the_order_they_are_named(apart: bool, ids: list[int]) -> None:
    layers = make_layers(torch.bfloat16, apart)
    assert torch.equal(gathered(HostCache([Group(layers, HEADS)]), ids), as_rows(layers)[:, ids])


@pytest.mark.parametrize(
    ("shape", "put"),
    [
        ((3, 1, HEADS, 128), 0),
        ((3, 3, HEADS, 128), 0),
        ((2, 2, HEADS, 128), 0),
        ((3, 2, HEADS, 64), 0),
        ((3, 2, HEADS + 1, 128), 0),
        ((3, 2, HEADS, 128), 1),
        ((3, 2, 1, 128), HEADS),
        ((3, 2, 1, 128), -1),
    ],
    ids=[
        "few",
        "many",
        "layers",
        "row",
        "heads",
        "past the last head",
        "no such head",
        "before the first head",
    ],
)
def test_rows_of_another_shape_are_refused_and_write_nothing(shape: tuple[int, ...], put: int) -> None:
    layers = make_layers(torch.bfloat16)
    before = as_rows(layers)
    with pytest.raises(ValueError, match="rows of shape"):
        HostCache([Group(layers, HEADS)]).scatter(0, [1, 2], torch.zeros(shape, dtype=torch.uint8), put)
    assert torch.equal(as_rows(layers), before)


@pytest.mark.parametrize(
    ("tensor", "heads"),
    [
        (torch.zeros(BLOCKS, TOKENS, HEADS, CHANNELS).permute(0, 2, 1, 3), HEADS),
        (torch.zeros(HEADS, BLOCKS, TOKENS, CHANNELS).permute(1, 0, 2, 3), HEADS),
        (torch.zeros(BLOCKS, 2 * TOKENS, CHANNELS)[:, :TOKENS], TOKENS),
        (torch.zeros(2 * BLOCKS, HEADS, CHANNELS)[::2], HEADS),
        (torch.zeros(BLOCKS, 3, dtype=torch.uint8), 2),
    ],
    ids=["heads inside", "blocks inside", "padded", "gaps", "odd heads"],
)
def test_a_layout_whose_blocks_do_not_follow_each_other_is_refused(tensor: torch.Tensor, heads: int) -> None:
    with pytest.raises(ValueError, match="not supported"):
        HostCache([Group([tensor], heads)])


def test_layers_of_different_block_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        HostCache([Group([torch.zeros(BLOCKS, 8), torch.zeros(BLOCKS, 16)])])


@pytest.mark.parametrize("ids", [[-1], [BLOCKS], [0, BLOCKS], [2, -3]])
def test_blocks_that_do_not_exist_are_refused_and_nothing_is_written(ids: list[int]) -> None:
    layers = make_layers(torch.bfloat16)
    before = as_rows(layers)
    rows = torch.zeros(3, len(ids), HEADS, TOKENS * CHANNELS * 2, dtype=torch.uint8)
    with pytest.raises(IndexError, match=f"cache of {BLOCKS}"):
        HostCache([Group(layers, HEADS)]).scatter(0, ids, rows)
    assert torch.equal(as_rows(layers), before)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("ids", [[-1], [BLOCKS], [0, BLOCKS], [2, -3]])
def test_blocks_that_do_not_exist_are_neither_gathered_nor_copied(ids: list[int], apart: bool) -> None:
    """Others were, in their place."""
    layers = make_layers(torch.bfloat16, apart)
    before, cache = as_rows(layers), HostCache([Group(layers, HEADS)])
    with pytest.raises(IndexError, match=f"cache of {BLOCKS}"):
        gathered(cache, ids)
    for source, target in ((ids[-1], 1), (1, ids[-1])):
        with pytest.raises(IndexError, match=f"cache of {BLOCKS}"):
            cache.copy(0, source, target)
    assert torch.equal(as_rows(layers), before)


def test_groups_share_one_pool_of_blocks() -> None:
    """A block of the larger group was written behind the smaller one's layers."""
    groups = [Group([torch.zeros(blocks, 2, 64)]) for blocks in (BLOCKS, BLOCKS - 1)]
    with pytest.raises(ValueError, match="as many blocks"):
        HostCache(groups)


def test_rows_that_no_step_of_the_compiled_copy_divides_are_written_whole() -> None:
    layers = [torch.randint(0, 256, (BLOCKS, 1, 8, 21), dtype=torch.uint8) for _ in range(2)]
    rows = torch.randint(0, 256, (2, 2, 1, 168), dtype=torch.uint8)
    HostCache([Group(layers)]).scatter(0, [4, 1], rows)
    assert torch.equal(torch.stack(layers).reshape(2, BLOCKS, 1, 168)[:, [4, 1]], rows)
