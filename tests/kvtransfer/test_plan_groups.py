"""Properties of windows, heads over ranks, and what each end needs of the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.ranks import head_runs, heads_of, readers
from kvtransfer.plan import Blocking, hit_unit, needed_blocks, num_blocks, tail_start

blockings = st.builds(
    Blocking, st.sampled_from([4, 8, 32, 48]), st.sampled_from([0, 1, 2, 5, 31, 32, 33, 100])
)
prompts = st.integers(1, 500)
DEGREES = [1, 2, 4, 8]


@given(st.lists(blockings, min_size=1, max_size=4), prompts)
def test_a_sample_finds_everything_it_sees(groups: list[Blocking], prompt: int) -> None:
    unit = hit_unit(groups)
    for group in groups:
        needed = needed_blocks(prompt, group, unit)
        assert needed.stop == num_blocks(prompt, group.block_size)
        for at in {tail_start(prompt, unit), prompt - 1}:  # it resumes at one of these
            oldest = max(0, at - group.window + 1) if group.window else 0
            assert oldest // group.block_size in needed


@given(st.lists(blockings, min_size=1, max_size=4), prompts)
def test_what_the_prefix_cache_asks_of_a_window_is_there(groups: list[Blocking], prompt: int) -> None:
    unit = hit_unit(groups)
    for group in groups:
        if group.window:
            boundary = tail_start(prompt, unit) // group.block_size
            run = num_blocks(group.window - 1, group.block_size)
            assert needed_blocks(prompt, group, unit).start <= max(0, boundary - run)


@given(blockings, prompts)
def test_nothing_is_moved_that_is_out_of_sight(group: Blocking, prompt: int) -> None:
    needed = needed_blocks(prompt, group, group.block_size)
    if needed.start:
        last_seen = tail_start(prompt, group.block_size) - group.window + 1
        assert needed.start * group.block_size <= last_seen < (needed.start + 1) * group.block_size


def test_a_group_without_window_needs_every_block() -> None:
    assert needed_blocks(100, Blocking(32), 32) == range(4)


@pytest.mark.parametrize(
    ("prompt", "first"), [(96, 0), (97, 0), (128, 0), (129, 1), (160, 1), (161, 2), (192, 2), (1, 0)]
)
def test_a_window_of_96_in_blocks_of_32(prompt: int, first: int) -> None:
    assert needed_blocks(prompt, Blocking(32, 96), 32).start == first


@pytest.mark.parametrize("heads", DEGREES)
@pytest.mark.parametrize("ranks", DEGREES)
def test_ranks_share_all_heads_evenly_or_hold_copies(heads: int, ranks: int) -> None:
    held = [head for rank in range(ranks) for head in heads_of(heads, ranks, rank)]
    assert held == sorted(held)
    assert sorted(set(held)) == list(range(heads))
    assert {held.count(head) for head in held} == {max(1, ranks // heads)}


@pytest.mark.parametrize(("heads", "ranks"), [(3, 2), (4, 3), (6, 4)])
def test_heads_that_do_not_divide_are_refused(heads: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="KV heads over"):
        heads_of(heads, ranks, 0)


@pytest.mark.parametrize("heads", DEGREES)
@pytest.mark.parametrize("producers", DEGREES)
@pytest.mark.parametrize("consumers", DEGREES)
def test_each_rank_reads_each_of_its_heads_once_from_a_rank_that_holds_it(
    heads: int, producers: int, consumers: int
) -> None:
    for rank in range(consumers):
        got: dict[int, int] = {}
        for run in head_runs(heads, producers, consumers, rank):
            theirs = heads_of(heads, producers, run.rank)
            for i, head in enumerate(theirs[run.first : run.last]):
                assert run.put + i not in got
                got[run.put + i] = head
            assert 0 <= run.first < run.last <= len(theirs)
        assert [got[i] for i in sorted(got)] == list(heads_of(heads, consumers, rank))


@pytest.mark.parametrize("heads", DEGREES)
@pytest.mark.parametrize("producers", DEGREES)
@pytest.mark.parametrize("consumers", DEGREES)
def test_readers_are_counted_as_they_come(heads: int, producers: int, consumers: int) -> None:
    counts = [0] * producers
    for rank in range(consumers):
        for run in head_runs(heads, producers, consumers, rank):
            counts[run.rank] += 1
    if 0 in counts:
        assert producers > heads, "only a copy can be left unread"
        with pytest.raises(ValueError, match="hold copies"):
            readers(heads, producers, consumers)
    else:
        assert readers(heads, producers, consumers) == counts


@pytest.mark.parametrize("ranks", DEGREES)
def test_equal_degrees_pair_rank_with_rank(ranks: int) -> None:
    for heads in (*DEGREES, 0):
        for rank in range(ranks):
            assert [run.rank for run in head_runs(heads, ranks, ranks, rank)] == [rank]
        assert readers(heads, ranks, ranks) == [1] * ranks


def test_blocks_that_cannot_be_split_by_head_need_equal_degrees() -> None:
    with pytest.raises(ValueError, match="can't be split by head"):
        head_runs(0, 1, 2, 0)


def test_halves_and_wholes() -> None:
    one, two = head_runs(4, 2, 1, 0)
    assert (one.rank, one.first, one.last, one.put) == (0, 0, 2, 0)
    assert (two.rank, two.first, two.last, two.put) == (1, 0, 2, 2)
    assert [(r.rank, r.first, r.last, r.put) for r in head_runs(4, 1, 2, 1)] == [(0, 2, 4, 0)]
