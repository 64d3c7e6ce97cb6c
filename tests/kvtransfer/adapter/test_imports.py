"""Prefixes imported into the pool of vLLM's own KVCacheManager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvtransfer.adapter.imports import Imports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

BLOCK = 4
POOL = 12
"""Blocks of the pool; vLLM keeps block 0 for itself."""


class Cache:
    """A KVCacheManager and how requests are made for it."""

    def __init__(self) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(POOL, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(
            config, max_model_len=1000, scheduler_block_size=BLOCK, hash_block_size=BLOCK
        )
        self.imports = Imports(BLOCK)

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

    def commit(self, name: str = "i0") -> None:
        self.imports.commit(self.manager, name)

    def release(self, name: str = "i0") -> None:
        self.imports.release(self.manager, name)


@pytest.fixture
def cache() -> Iterator[Cache]:
    cache = Cache()
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
    assert len(set(begun["blocks"])) == needed
    assert 0 not in begun["blocks"]
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
    assert second["cached"] == 2
    assert second["blocks"][:2] == first["blocks"][:2]
    assert second["blocks"][2] != first["blocks"][2]


def test_two_imports_of_a_prompt_that_is_not_cached_share_no_block(cache: Cache) -> None:
    first, second = cache.begin(11, "i0"), cache.begin(11, "i1")
    assert first is not None
    assert second is not None
    assert not set(first["blocks"]) & set(second["blocks"])
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
    begun = cache.begin(8, "i0")
    cache.commit("i0")
    filler = cache.begin(cache.free * BLOCK - 1, "i1", salt="other")
    assert begun is not None
    assert filler is not None
    assert not set(filler["blocks"]) & set(begun["blocks"])
    assert cache.hit(9) == 8


def test_a_name_is_used_once(cache: Cache) -> None:
    cache.begin(4)
    with pytest.raises(ValueError, match="exists"):
        cache.begin(4)


@pytest.mark.parametrize(("tokens", "local", "missing"), [(11, 8, 2), (8, 4, 3), (10, 8, 1), (3, 0, 2)])
def test_a_sample_copies_the_block_with_the_prompts_end(
    cache: Cache, tokens: int, local: int, missing: int
) -> None:
    begun = cache.begin(tokens)
    cache.commit()
    assert begun is not None
    assert cache.imports.tail_of("i0", tokens, local) == (missing, begun["blocks"][-1])


@pytest.mark.parametrize(
    ("tokens", "asked", "local"),
    [(11, 10, 8), (11, 12, 8), (11, 11, 4), (11, 11, 0), (9, 9, 8), (1, 1, 0)],
    ids=["shorter", "longer", "one block missing", "nothing cached", "one token left", "one token"],
)
def test_there_is_no_tail_to_copy(cache: Cache, tokens: int, asked: int, local: int) -> None:
    cache.begin(tokens)
    cache.commit()
    assert cache.imports.tail_of("i0", asked, local) is None


def test_there_is_no_tail_before_the_commit_nor_after_the_release(cache: Cache) -> None:
    cache.begin(11)
    assert cache.imports.tail_of("i0", 11, 8) is None
    cache.commit()
    cache.release()
    assert cache.imports.tail_of("i0", 11, 8) is None


def test_a_sample_of_an_import_takes_only_its_tail_block(cache: Cache) -> None:
    cache.begin(11)
    cache.commit()
    free, sample = cache.free, cache.request(11, "sample")
    computed, local, _ = cache.manager.get_computed_blocks(sample)
    tail = cache.imports.tail_of("i0", 11, local)
    assert tail is not None
    assert cache.manager.allocate_slots(sample, 1, local, computed, num_external_computed_tokens=tail[0])
    assert free - cache.free == 1
    cache.manager.free(sample)
