"""Blocks of one size written into blocks of another, in the layout of the CPU's ``vec`` kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import wire
from kvtransfer.adapter.reblock import ReblockedCache, Translation, moves
from kvtransfer.cache import Group
from kvtransfer.plan import num_blocks

HEAD = 4
KEY = wire.Key(b"k" * 16, 1)


def blocks_of(keys: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """Tokens ``[tokens, heads, HEAD]`` as a kernel keeps them, ``[blocks, heads, size, 2 * HEAD]``."""
    tokens, heads, _ = keys.shape
    count = num_blocks(tokens, size)
    cache = torch.zeros(count, heads, 2, HEAD * size)
    for token in range(tokens):
        block, at = divmod(token, size)
        cache[block, :, 0].view(heads, HEAD, size)[:, :, at] = keys[token]
        cache[block, :, 1].view(heads, size, HEAD)[:, at] = values[token]
    return cache.view(count, heads, size, 2 * HEAD)


sizes = st.sampled_from([(32, 64), (64, 32), (32, 96), (128, 32), (48, 32), (32, 32)])


@given(sizes, st.integers(1, 200), st.data())
def test_tokens_end_where_our_kernels_look_for_them(
    pair: tuple[int, int], tokens: int, data: st.DataObject
) -> None:
    theirs, ours = pair
    cached = data.draw(st.integers(0, (tokens - 1) // ours))
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(tokens, 2, HEAD, generator=generator) for _ in range(2))
    sent, wanted = blocks_of(keys, values, theirs), blocks_of(keys, values, ours)
    count = num_blocks(tokens, ours)
    engine = torch.zeros(count + 1, 2, ours, 2 * HEAD)
    cache = ReblockedCache(Group([engine], 2), ours, theirs)
    ids = tuple(range(count, cached, -1))  # ours lie in any order
    spec = wire.Load(KEY, (), "fp", tokens, b"", (wire.Span(0, cached, ids),), 1.0)
    translation = Translation(cache, ours, theirs)
    (span,) = translation.load(spec).spans
    rows = sent[span.first :].reshape(1, len(span.block_ids), 2, -1).view(torch.uint8)
    for head in range(2):  # each from another source
        cache.scatter(0, span.block_ids, rows[:, :, head : head + 1], head)
    for number in range(count):
        if number >= cached:
            assert torch.equal(engine[ids[number - cached]], wanted[number])
    assert not engine[0].any(), "block 0 is nobody's"
    translation.ended(wire.Failed(KEY, "late"))
    assert (cache.table, KEY in translation) == ({}, False)


@pytest.mark.parametrize(
    ("index", "theirs", "ours", "expected"),
    [
        (0, 32, 64, [(7, 0, 0, 32)]),
        (1, 32, 64, [(7, 0, 32, 32)]),
        (2, 32, 64, [(8, 0, 0, 6)]),
        (0, 64, 32, [(7, 0, 0, 32), (8, 32, 0, 32)]),
        (1, 64, 32, [(9, 0, 0, 6)]),
    ],
)
def test_where_the_tokens_of_a_block_go(
    index: int, theirs: int, ours: int, expected: list[tuple[int, ...]]
) -> None:
    assert list(moves(index, theirs, ours, wire.Span(0, 0, (7, 8, 9)), 70)) == expected


def test_blocks_that_are_cached_are_not_written() -> None:
    assert moves(0, 64, 32, wire.Span(0, 1, (9,)), 64) == ((9, 32, 0, 32),)


def test_a_key_in_flight_and_several_groups_are_refused() -> None:
    cache = ReblockedCache(Group([torch.zeros(4, 1, 4, 2 * HEAD)]), 4, 8)
    translation = Translation(cache, 4, 8)
    spec = wire.Load(KEY, (), "fp", 4, b"", (wire.Span(0, 0, (1,)),), 1.0)
    translation.load(spec)
    assert KEY in translation
    with pytest.raises(ValueError, match="duplicate"):
        translation.load(spec)
    other = wire.Load(wire.Key(b"o" * 16, 1), (), "fp", 4, b"", spec.spans * 2, 1.0)
    with pytest.raises(ValueError, match="bad_blocks"):
        translation.load(other)


def test_rows_that_are_not_whole_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="not keys and values"):
        ReblockedCache(Group([torch.zeros(2, 1, 3, dtype=torch.float32)]), 2, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_keep_keys_and_values_as_we_read_them(size: int, dtype: torch.dtype) -> None:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a layout of the CPU's kernels")
    current_platform.import_kernels()
    tokens, heads, head = 70, 2, 32
    keys, values = (torch.randn(tokens, heads, head).to(dtype) for _ in range(2))
    count = num_blocks(tokens, size)
    cache = torch.zeros(count, heads, size * 2, head, dtype=dtype)
    ours, theirs = cache.chunk(2, dim=2)
    isa = "vec" if size % 32 == 0 else "vec16"
    ops.cpu_attn_reshape_and_cache(
        keys, values, ours, theirs, torch.arange(tokens), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    rows = cache.reshape(count, heads, 2, head * size)
    for token in range(tokens):
        block, at = divmod(token, size)
        assert torch.equal(rows[block, :, 0].view(heads, head, size)[:, :, at], keys[token])
        assert torch.equal(rows[block, :, 1].view(heads, size, head)[:, at], values[token])
