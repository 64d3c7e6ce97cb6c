"""What a worker tells of its engine's KV cache."""

from __future__ import annotations

import pytest

from braid.worker.engine import _kv_heads
from kvtransfer.wire import Ready, Shape


def ranks(*heads: tuple[int, ...]) -> list[Ready]:
    """One rank an entry, with a group for each of its numbers of heads."""
    return [
        Ready(i, "cpu/AVX2", tuple(Shape(2, h, 64) for h in of_rank), "") for i, of_rank in enumerate(heads)
    ]


@pytest.mark.parametrize(
    ("heads", "ready", "told"),
    [
        (4, ranks((4,)), 4),
        (4, ranks((2, 2), (2, 2)), 4),
        (1, ranks((1,), (1,)), 1),
        (4, ranks((1,)), 0),
        (4, ranks((2, 1), (2, 1)), 0),
        (3, ranks((1,), (1,)), 0),
    ],
    ids=["one rank", "two ranks, two groups", "copies", "whole blocks", "groups differ", "uneven"],
)
def test_heads_count_only_if_every_rank_and_group_tells_its_share_apart(
    heads: int, ready: list[Ready], told: int
) -> None:
    assert _kv_heads(heads, ready) == told
