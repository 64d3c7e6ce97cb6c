"""How a rank's layers become groups of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtransfer.cache import HostCache
from kvtransfer.wire import Shape

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

BLOCKS, HEADS, SIZE, HEAD = 3, 4, 8, 16


def layer(heads: int = HEADS, blocks: int = BLOCKS) -> torch.Tensor:
    return torch.zeros(blocks, heads, SIZE, 2 * HEAD)


def shapes(
    caches: dict[str, torch.Tensor], *groups: tuple[str, ...], ranks: int = 1, heads: int = HEADS
) -> Any:
    from kvtransfer.adapter.layout import GroupInfo, cache_groups

    infos = [GroupInfo("kind", SIZE, 0, names) for names in groups]
    return HostCache(cache_groups(infos, caches, BLOCKS, heads, ranks, 0)).shapes


def test_layers_are_grouped_by_name_and_told_apart_by_head() -> None:
    caches = {"c": layer(), "a": layer(), "b": layer()}
    row = SIZE * 2 * HEAD * 4
    assert shapes(caches, ("a", "b"), ("c",)) == (Shape(2, HEADS, row), Shape(1, HEADS, row))


def test_layers_that_share_memory_count_once() -> None:
    shared = layer()
    assert shapes({"a": shared, "b": shared}, ("a", "b"))[0].layers == 1


def test_a_rank_has_its_share_of_the_heads_or_a_copy_of_one() -> None:
    assert shapes({"a": layer(2)}, ("a",), ranks=2)[0].heads == 2
    assert shapes({"a": layer(1)}, ("a",), ranks=8)[0].heads == 1


@pytest.mark.parametrize(
    "tensor",
    [layer(2 * HEADS), layer(blocks=2 * BLOCKS), torch.zeros(BLOCKS, SIZE, 2 * HEAD)],
    ids=["other heads", "blocks cut by the kernels", "no heads"],
)
def test_other_layouts_are_moved_as_whole_blocks(tensor: torch.Tensor) -> None:
    whole = tensor.numel() * 4 // BLOCKS
    assert shapes({"a": tensor}, ("a",)) == (Shape(1, 1, whole),)


def test_heads_that_do_not_divide_are_not_told_apart() -> None:
    assert shapes({"a": layer()}, ("a",), ranks=3)[0].heads == 1


def test_one_layer_that_differs_makes_all_groups_whole() -> None:
    found = shapes({"a": layer(), "b": layer(1)}, ("a",), ("b",))
    assert [shape.heads for shape in found] == [1, 1]
