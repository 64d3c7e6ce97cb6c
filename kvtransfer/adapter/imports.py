"""Prefixes imported into a consumer's block pool.

An **import** is a prompt whose KV comes from elsewhere. It owns blocks of vLLM's pool without being a
request: the scheduler never sees it, so nothing is polled while a transfer runs, nothing has to be
preempted or aborted in the engine, and blocks are published to the prefix cache only when they are
complete. Samples submitted after the commit find every full block in the local prefix cache; the block
with the prompt's end is copied to each of them (:meth:`Imports.tail_of`). While an import is held its
blocks can't be evicted.

Life, each step a utility call on the EngineCore's thread, between two scheduler steps::

    begin --> (blocks are written by the worker) --> commit --> release
       |                                               ^
       +---- release (failed, cancelled) --------------+-- in any state, idempotent

The caller guarantees that nobody writes the blocks any more when it commits or releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtransfer.plan import tail_start


@dataclass(slots=True)
class Import:
    """A held prefix. ``blocks`` are its pool block ids in prompt order; ``committed``: published."""

    request: Any
    tokens: int
    blocks: list[int]
    committed: bool = False


class Imports:
    """All imports of one EngineCore. Runs on its thread only."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.held: dict[str, Import] = {}

    def begin(self, manager: Any, request: Any, name: str) -> dict[str, Any] | None:
        """Take blocks for a prompt.

        Args:
            manager: vLLM's KVCacheManager.
            request: a vLLM Request with the prompt; never scheduled.
            name: the import's name.

        Returns:
            ``{"cached": full blocks already in the prefix cache, "blocks": all block ids}``, or None
            if the pool has no room for it now.
        """
        if name in self.held:
            raise ValueError(f"import {name} exists")
        tokens = int(request.num_prompt_tokens)
        computed, local, _ = manager.get_computed_blocks(request)
        local -= local % self.block_size
        allocated = manager.allocate_slots(
            request,
            0,
            num_new_computed_tokens=local,
            new_computed_blocks=computed,
            num_external_computed_tokens=tokens - local,
            delay_cache_blocks=True,
        )
        if allocated is None:
            return None
        blocks = list(manager.get_block_ids(request.request_id)[0])
        self.held[name] = Import(request, tokens, blocks)
        return {"cached": local // self.block_size, "blocks": blocks}

    def commit(self, manager: Any, name: str) -> None:
        """Publish the full blocks to the prefix cache. Every block has been written."""
        held = self.held[name]
        manager.cache_blocks(held.request, held.tokens)
        held.committed = True

    def release(self, manager: Any, name: str) -> None:
        """Give the blocks back; those published stay in the prefix cache until evicted. Idempotent."""
        held = self.held.pop(name, None)
        if held is not None:
            manager.free(held.request)

    def tail_of(self, name: str, prompt_tokens: int, local: int) -> tuple[int, int] | None:
        """What a sample of this import should load: ``(tokens, block id to copy)``.

        Args:
            prompt_tokens: of the sample.
            local: tokens the local prefix cache gives it.

        Returns:
            None if there is nothing to copy: the import is gone, is of another prompt, or the prefix
            cache does not reach up to its last block.
        """
        held = self.held.get(name)
        if held is None or not held.committed or held.tokens != prompt_tokens:
            return None
        start = tail_start(prompt_tokens, self.block_size)
        missing = prompt_tokens - 1 - local
        if local != start or missing <= 0:
            return None
        return missing, held.blocks[start // self.block_size]
