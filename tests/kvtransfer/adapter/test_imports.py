"""Prefixes imported into the pool of vLLM's own KVCacheManager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvtransfer.adapter.imports import Import, Imports
from kvtransfer.plan import Blocking, hit_unit, needed_blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

BLOCK = 4
POOL = 12
"""Blocks of the pool; vLLM keeps block 0 for itself."""


class Cache:
    """A KVCacheManager and how requests are made for it."""

    def __init__(self, *groups: Blocking, pool: int = POOL) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        self.groups = groups or (Blocking(BLOCK),)
        self.unit = hit_unit(self.groups)
        smallest = min(group.block_size for group in self.groups)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(smallest, sha256)
        specs = [KVCacheGroupSpec([f"layer{i}"], _spec(group)) for i, group in enumerate(self.groups)]
        self.manager = KVCacheManager(
            KVCacheConfig(pool, [], specs),
            max_model_len=1000,
            scheduler_block_size=self.unit,
            hash_block_size=smallest,
        )
        self.imports = Imports(self.groups)

    @property
    def free(self) -> int:
        return int(self.manager.block_pool.get_num_free_blocks())

    def request(self, tokens: int, name: str = "r", salt: str | None = None) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=1)
        return Request(name, list(range(tokens)), params, None, cache_salt=salt, block_hasher=self._hasher)

    def hit(self, tokens: int, salt: str | None = None) -> int:
        """Tokens of a prompt that the prefix cache holds."""
        return int(self.manager.get_computed_blocks(self.request(tokens, "probe", salt))[1])

    def begin(self, tokens: int, name: str = "i0", salt: str | None = None) -> dict[str, Any] | None:
        return self.imports.begin(self.manager, self.request(tokens, f"import-{name}", salt), name)

    def blocks(self, name: str = "i0", group: int = 0) -> list[int]:
        return self.imports.held[name].blocks[group]

    def commit(self, name: str = "i0") -> None:
        self.imports.commit(self.manager, name)

    def release(self, name: str = "i0") -> None:
        self.imports.release(self.manager, name)


def _spec(group: Blocking) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    # Pages of equal bytes, as vLLM makes them.
    fields = {"block_size": group.block_size, "num_kv_heads": 64 // group.block_size, "head_size": 8}
    if group.window:
        return SlidingWindowSpec(**fields, dtype=torch.float32, sliding_window=group.window)
    return FullAttentionSpec(**fields, dtype=torch.float32)


@pytest.fixture
def cache() -> Iterator[Cache]:
    yield from emptied(Cache())


def emptied(cache: Cache) -> Iterator[Cache]:
    """Yield it; at the end, whatever the test did, every block comes back."""
    free = cache.free
    yield cache
    for name in list(cache.imports.held):
        cache.release(name)
    assert cache.free == free, "every block is back"


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 11])
def test_an_import_takes_the_prompts_blocks_and_gives_them_back(cache: Cache, tokens: int) -> None:
    free, needed = cache.free, -(-tokens // BLOCK)
    begun = cache.begin(tokens)
    assert begun is not None
    assert begun["cached"] == 0
    assert begun["spans"] == [(0, 0, cache.blocks())]
    assert len(set(cache.blocks())) == needed
    assert 0 not in cache.blocks()
    assert cache.free == free - needed
    for _ in range(2):
        cache.release()
    assert cache.free == free


def test_nothing_is_published_before_the_commit(cache: Cache) -> None:
    cache.begin(11)
    assert cache.hit(11) == 0
    cache.commit()
    assert cache.hit(11) == 8


@pytest.mark.parametrize(("tokens", "hit"), [(8, 4), (9, 8), (11, 8), (13, 12)])
def test_after_the_commit_all_full_blocks_but_the_last_tokens_are_hit(
    cache: Cache, tokens: int, hit: int
) -> None:
    cache.begin(tokens)
    cache.commit()
    assert cache.hit(tokens) == hit
    assert cache.hit(tokens + 4) == tokens // BLOCK * BLOCK
    cache.release()
    assert cache.hit(tokens) == hit, "what was published stays until it is evicted"


def test_a_release_before_the_commit_leaves_nothing_cached(cache: Cache) -> None:
    cache.begin(11)
    cache.release()
    assert cache.hit(11) == 0


def test_another_salt_does_not_see_it(cache: Cache) -> None:
    cache.begin(11, salt="a")
    cache.commit()
    assert (cache.hit(11, "a"), cache.hit(11, "b"), cache.hit(11)) == (8, 0, 0)


def test_a_second_import_begins_after_the_blocks_that_are_cached(cache: Cache) -> None:
    first = cache.begin(11, "i0")
    cache.commit("i0")
    second = cache.begin(11, "i1")
    assert first is not None
    assert second is not None
    assert second["cached"] == 8
    assert second["spans"] == [(0, 2, cache.blocks("i1")[2:])]
    assert cache.blocks("i1")[:2] == cache.blocks("i0")[:2]
    assert cache.blocks("i1")[2] != cache.blocks("i0")[2]


def test_two_imports_of_a_prompt_that_is_not_cached_share_no_block(cache: Cache) -> None:
    cache.begin(11, "i0")
    cache.begin(11, "i1")
    assert not set(cache.blocks("i0")) & set(cache.blocks("i1"))
    cache.commit("i0")
    cache.commit("i1")
    cache.release("i0")
    assert cache.hit(11) == 8


def test_a_pool_without_room_is_none_and_takes_nothing(cache: Cache) -> None:
    cache.begin(8 * BLOCK, "i0")
    free = cache.free
    assert cache.begin(5 * BLOCK, "i1") is None
    assert cache.free == free
    assert "i1" not in cache.imports.held
    cache.release("i0")
    assert cache.begin(5 * BLOCK, "i1") is not None


def test_a_held_import_is_not_evicted(cache: Cache) -> None:
    cache.begin(8, "i0")
    cache.commit("i0")
    assert cache.begin(cache.free * BLOCK - 1, "i1", salt="other") is not None
    assert not set(cache.blocks("i1")) & set(cache.blocks("i0"))
    assert cache.hit(9) == 8


def test_a_name_is_used_once(cache: Cache) -> None:
    cache.begin(4)
    with pytest.raises(ValueError, match="exists"):
        cache.begin(4)


@pytest.mark.parametrize(("tokens", "local", "missing"), [(11, 8, 2), (8, 4, 3), (10, 8, 1), (3, 0, 2)])
def test_a_sample_copies_the_block_with_the_prompts_end(
    cache: Cache, tokens: int, local: int, missing: int
) -> None:
    cache.begin(tokens)
    cache.commit()
    end = cache.imports.reach("i0", range(tokens), local)
    assert end - local == missing
    targets = [[100 + i for i in range(len(cache.blocks()))]]
    assert cache.imports.copies("i0", end, targets) == [(0, cache.blocks()[-1], targets[0][-1])]


@pytest.mark.parametrize(
    ("tokens", "asked", "local"),
    [(11, 11, 4), (11, 11, 0), (9, 9, 8), (1, 1, 0), (12, 13, 12)],
    ids=["one block missing", "nothing cached", "one token left", "one token", "longer by whole blocks"],
)
def test_there_is_no_tail_to_copy(cache: Cache, tokens: int, asked: int, local: int) -> None:
    cache.begin(tokens)
    cache.commit()
    assert cache.imports.reach("i0", range(asked), local) == local


def test_a_prompt_that_begins_like_the_import_copies_what_they_share(cache: Cache) -> None:
    cache.begin(11)
    cache.commit()
    assert cache.imports.reach("i0", range(30), 8) == 11
    assert cache.imports.reach("i0", range(10), 8) == 9
    assert cache.imports.reach("i0", [*range(10), 99, 99], 8) == 10
    assert cache.imports.reach("i0", [*range(8), 99, 99], 8) == 8


def test_there_is_no_tail_before_the_commit_nor_after_the_release(cache: Cache) -> None:
    cache.begin(11)
    assert cache.imports.reach("i0", range(11), 8) == 8
    cache.commit()
    cache.release()
    assert cache.imports.reach("i0", range(11), 8) == 8


def ended(cache: Cache, prompt: int, tokens: int) -> Any:
    """A sample of ``tokens`` in all that has computed all but its last one, as vLLM is about to free it."""
    sample = cache.request(prompt, f"sample-{prompt}-{tokens}")
    sample.append_output_token_ids(list(range(prompt, tokens)))
    assert cache.manager.allocate_slots(sample, tokens - 1)
    sample.num_computed_tokens = tokens - 1
    return sample


def keep(cache: Cache, sample: Any, name: str = "k0") -> None:
    """What happens when it ends: it is kept, then freed."""
    blocks = cache.manager.get_block_ids(sample.request_id)
    cache.imports.keep(cache.manager.block_pool, sample, blocks, name)
    cache.manager.free(sample)


@pytest.mark.parametrize("tokens", [9, 12, 13, 14, 16, 17])
@pytest.mark.parametrize("more", [0, 1, 7])
def test_what_goes_on_from_a_kept_sample_computes_its_last_token_and_what_is_new(
    cache: Cache, tokens: int, more: int
) -> None:
    free = cache.free
    keep(cache, ended(cache, 6, tokens))
    assert free - cache.free == -(-(tokens - 1) // BLOCK), "its blocks are pinned"
    prompt = cache.request(tokens + more, "next")
    computed, local, _ = cache.manager.get_computed_blocks(prompt)
    end = cache.imports.reach("k0", prompt.all_token_ids, local)
    assert end == tokens - 1
    assert cache.manager.allocate_slots(
        prompt, 1 + more, local, computed, num_external_computed_tokens=end - local
    )
    copies = cache.imports.copies("k0", end, cache.manager.get_block_ids("next")) if end > local else []
    assert len(copies) == (end % BLOCK > 0)
    for _, source, target in copies:
        assert source in cache.blocks("k0")
        assert target not in cache.blocks("k0")
    cache.manager.free(prompt)
    cache.release("k0")
    cache.release("k0")
    assert cache.free == free


@pytest.mark.parametrize("shared", range(7, 31))
def test_what_goes_on_early_from_a_kept_sample_copies_no_block_that_its_window_has_left(
    grouped: Cache, shared: int
) -> None:
    """vLLM's null block was copied, onto one that then was published."""
    kept = ended(grouped, 6, 31)
    grouped.manager.remove_skipped_blocks(kept.request_id, 30)
    keep(grouped, kept)
    prompt = grouped.request(50, "next")
    told = [*range(shared), *(99 for _ in range(20))]
    for local in range(0, shared, grouped.unit):
        end = grouped.imports.reach("k0", told, local)
        if end == local:
            continue
        assert grouped.manager.allocate_slots(prompt, 1, num_external_computed_tokens=end)
        targets = grouped.manager.get_block_ids("next")
        copies = grouped.imports.copies("k0", end, targets)
        assert copies
        assert all(source and target for _, source, target in copies)
        grouped.manager.free(prompt)


def test_blocks_of_a_kept_sample_are_not_evicted(cache: Cache) -> None:
    keep(cache, ended(cache, 6, 14))
    pinned = set(cache.blocks("k0"))
    other = cache.request(BLOCK * cache.free, "other", salt="another prompt")
    assert cache.manager.allocate_slots(other, BLOCK * cache.free)
    assert not pinned & set(cache.manager.get_block_ids("other")[0])
    cache.manager.free(other)
    assert cache.imports.reach("k0", range(14), 12) == 13


def test_a_sample_that_sees_less_than_it_was_told_is_left_alone(cache: Cache) -> None:
    keep(cache, ended(cache, 6, 14))
    assert cache.imports.reach("k0", [*range(13), 99, 99], 12) == 13
    assert cache.imports.reach("k0", [*range(12), 99, 99], 12) == 12
    with pytest.raises(ValueError, match="exists"):
        cache.imports.keep(cache.manager.block_pool, ended(cache, 2, 3), [[]], "k0")
    cache.manager.free(cache.request(2, "sample-2-3"))


def sample_of(cache: Cache, tokens: int) -> tuple[Any, list[tuple[int, int, int]]]:
    """A sample of import ``i0`` as vLLM's scheduler admits it, and the blocks it copies."""
    sample = cache.request(tokens, "sample")
    computed, local, _ = cache.manager.get_computed_blocks(sample)
    assert local == (tokens - 1) // cache.unit * cache.unit, "everything but the tail is hit"
    end = cache.imports.reach("i0", sample.all_token_ids, local)
    assert end == tokens - 1
    tail = end - local
    assert cache.manager.allocate_slots(sample, 1, local, computed, num_external_computed_tokens=tail)
    return sample, cache.imports.copies("i0", end, cache.manager.get_block_ids("sample")) if tail else []


def test_a_sample_of_an_import_takes_only_its_tail_block(cache: Cache) -> None:
    cache.begin(11)
    cache.commit()
    free = cache.free
    sample, copies = sample_of(cache, 11)
    assert free - cache.free == 1
    assert len(copies) == 1
    cache.manager.free(sample)


SHAPES = {
    "full and windowed": (Blocking(4), Blocking(4, 9)),
    "window of whole blocks": (Blocking(4), Blocking(4, 8)),
    "two windows": (Blocking(4, 5), Blocking(4, 13), Blocking(4)),
    "windowed only": (Blocking(4, 9),),
    "window inside a block": (Blocking(4), Blocking(4, 2)),
    "larger blocks in the windowed group": (Blocking(4), Blocking(8, 9)),
    "larger blocks in the full group": (Blocking(8), Blocking(4, 9)),
}


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def grouped(request: pytest.FixtureRequest) -> Iterator[Cache]:
    yield from emptied(Cache(*request.param, pool=100))


@pytest.mark.parametrize("tokens", range(1, 42))
def test_an_import_of_several_groups_holds_what_its_samples_see_and_no_more(
    grouped: Cache, tokens: int
) -> None:
    free = grouped.free
    begun = grouped.begin(tokens)
    assert begun is not None
    held = 0
    for group, blocking in enumerate(grouped.groups):
        needed = needed_blocks(tokens, blocking, grouped.unit)
        ids = grouped.blocks(group=group)
        assert begun["spans"][group] == (group, needed.start, ids[needed.start :])
        assert [i for i, block in enumerate(ids) if block] == list(needed)
        held += len(needed)
    assert free - grouped.free == held
    grouped.commit()
    sample, copies = sample_of(grouped, tokens)
    sources = {
        (group, block) for group in range(len(grouped.groups)) for block in grouped.blocks(group=group)
    }
    own = grouped.manager.get_block_ids("sample")
    for group, source, target in copies:
        assert source
        assert (group, source) in sources
        assert target in own[group]
        assert (group, target) not in sources
    grouped.manager.free(sample)


@pytest.mark.parametrize("more", [1, 3, 4, 9, 20])
def test_a_prompt_that_goes_on_loads_only_what_is_new(grouped: Cache, more: int) -> None:
    grouped.begin(32, "i0")
    grouped.commit("i0")
    grouped.release("i0")
    begun = grouped.begin(32 + more, "i1")
    assert begun is not None
    assert begun["cached"] == 32
    for group, blocking in enumerate(grouped.groups):
        first = begun["spans"][group][1]
        needed = needed_blocks(32 + more, blocking, grouped.unit)
        assert first == max(32 // blocking.block_size, needed.start)
        assert all(grouped.blocks("i1", group)[needed.start :])


def test_a_failed_import_of_several_groups_leaves_nothing(grouped: Cache) -> None:
    free = grouped.free
    grouped.begin(30)
    grouped.release()
    assert grouped.free == free
    assert grouped.hit(30) == 0


def test_a_prompt_that_left_a_kept_sample_early_copies_nothing_of_it() -> None:
    """Its cached beginning was another sample's, and one token after it the same by chance: the block with
    it had been computed after other tokens."""
    imports = Imports((Blocking(BLOCK),))
    kept = [0, 1, 2, 3, 4, 5, 20, 21, 22, 23, 24, 25, 30, 31, 32, 33, 34]
    imports.held["k0"] = Import(None, kept, len(kept) - 1, ([1, 2, 3, 4, 5],), [], committed=True)
    assert imports.reach("k0", [*kept[:13], 51, 52], 12) == 13
    assert imports.reach("k0", [*kept[:6], 40, 41, 42, 43, 44, 45, 30, 51, 52], 12) == 12
