"""Which blocks exist and whose they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.plan import DIGEST_BYTES, chain, finished_blocks, num_blocks, pieces, tail_start

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)
block_sizes = st.integers(1, 9)
extras = st.text(max_size=4)


@given(token_lists, token_lists, block_sizes, extras, extras)
def test_chains_are_equal_only_for_equal_prompts(
    a: list[int], b: list[int], block_size: int, x: str, y: str
) -> None:
    equal = a == b and (x == y or not a)  # an empty prompt has an empty chain
    assert (chain(a, block_size, x) == chain(b, block_size, y)) == equal


@given(token_lists.filter(bool), block_sizes, st.data())
def test_one_other_token_changes_its_link_and_all_later_ones(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    links, changed = (_links(chain(t, block_size)) for t in (tokens, other))
    assert [a == b for a, b in zip(links, changed, strict=True)] == [
        i < at // block_size for i in range(len(links))
    ]


@given(token_lists, block_sizes)
def test_a_chain_fixes_the_prompts_length(tokens: list[int], block_size: int) -> None:
    links = chain(tokens, block_size)
    assert len(links) == num_blocks(len(tokens), block_size) * DIGEST_BYTES
    shorter = chain(tokens[:-1], block_size)
    assert shorter != links or not tokens


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100), st.integers(1, 1000))
def test_pieces_cover_every_block_once_within_the_bound(
    first: int, more: int, block_bytes: int, piece_bytes: int
) -> None:
    runs = pieces(first, first + more, block_bytes, piece_bytes)
    assert [block for run in runs for block in run] == list(range(first, first + more))
    assert all(len(run) == 1 or len(run) * block_bytes <= piece_bytes for run in runs)


@given(st.integers(1, 60), block_sizes)
def test_finished_blocks_grow_up_to_the_whole_prompt(prompt: int, block_size: int) -> None:
    done = [finished_blocks(computed, prompt, block_size) for computed in range(prompt + 10)]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == done[prompt] == num_blocks(prompt, block_size)


@given(st.integers(1, 60), st.integers(0, 60), block_sizes)
def test_a_finished_block_is_not_written_again(prompt: int, computed: int, block_size: int) -> None:
    done = finished_blocks(min(computed, prompt), prompt, block_size)
    assert computed >= prompt or done * block_size <= computed


@given(st.integers(1, 60), block_sizes)
def test_the_tail_starts_at_the_block_of_the_last_token(prompt: int, block_size: int) -> None:
    start = tail_start(prompt, block_size)
    assert start % block_size == 0
    assert start <= prompt - 1 < start + block_size


def _links(links: bytes) -> list[bytes]:
    return [links[at : at + DIGEST_BYTES] for at in range(0, len(links), DIGEST_BYTES)]
