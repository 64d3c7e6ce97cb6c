"""Prefixes imported into a consumer's block pool.

An **import** is a prompt whose KV comes from elsewhere. It owns blocks of vLLM's pool without being a
request: the scheduler never sees it, so nothing is polled while a transfer runs, nothing has to be
preempted or aborted in the engine, and blocks are published to the prefix cache only when they are
complete. Samples submitted after the commit find every full block that they need in the local prefix
cache; the blocks with the prompt's end are copied to each of them (:meth:`Imports.tail_of`). While an
import is held its blocks can't be evicted.

A model may have several KV cache groups. Of a windowed one the import holds the blocks that a sample can
still see (:func:`kvtransfer.plan.needed_blocks`); the others are vLLM's null block, id 0.

Life, each step a utility call on the EngineCore's thread, between two scheduler steps::

    begin --> (blocks are written by the worker) --> commit --> release
       |                                               ^
       +---- release (failed, cancelled) --------------+-- in any state, idempotent

The caller guarantees that nobody writes the blocks any more when it commits or releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtransfer.plan import Blocking, hit_unit, needed_blocks, num_blocks, tail_start

Copy = tuple[int, int, int]
"""A block to copy: group, source and target block id."""


@dataclass(slots=True)
class Import:
    """A held prefix. ``blocks``: by group, its pool block ids in prompt order; ``committed``: published."""

    request: Any
    tokens: int
    blocks: tuple[list[int], ...]
    committed: bool = False


class Imports:
    """All imports of one EngineCore. Runs on its thread only."""

    def __init__(self, groups: Sequence[Blocking]) -> None:
        self.groups = tuple(groups)
        self.unit = hit_unit(groups)
        self.held: dict[str, Import] = {}

    def begin(self, manager: Any, request: Any, name: str) -> dict[str, Any] | None:
        """Take blocks for a prompt.

        To vLLM it is a sequence computed up to its tail that needs slots for the tail: so it keeps of a
        windowed group what a sample that resumes there sees.

        Args:
            manager: vLLM's KVCacheManager.
            request: a vLLM Request with the prompt; never scheduled.
            name: the import's name.

        Returns:
            ``{"cached": tokens already in the prefix cache, "spans": a (group, first block, block ids)
            for each group, which are to be written}``, or None if the pool has no room for it now.
        """
        if name in self.held:
            raise ValueError(f"import {name} exists")
        tokens = int(request.num_prompt_tokens)
        tail = tail_start(tokens, self.unit)
        computed, local, _ = manager.get_computed_blocks(request)
        allocated = manager.allocate_slots(
            request,
            tokens - tail,
            num_new_computed_tokens=local,
            new_computed_blocks=computed,
            num_external_computed_tokens=tail - local,
            delay_cache_blocks=True,
        )
        if allocated is None:
            return None
        blocks = tuple(list(ids) for ids in manager.get_block_ids(request.request_id))
        self.held[name] = Import(request, tokens, blocks)
        return {"cached": local, "spans": [self._span(g, ids, tokens, local) for g, ids in enumerate(blocks)]}

    def _span(self, group: int, ids: list[int], tokens: int, local: int) -> tuple[int, int, list[int]]:
        blocking = self.groups[group]
        first = max(needed_blocks(tokens, blocking, self.unit).start, local // blocking.block_size)
        return group, first, ids[first:]

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

    def tail_of(self, name: str, prompt_tokens: int, local: int) -> int:
        """How many tokens a sample of this import should load.

        Args:
            prompt_tokens: of the sample.
            local: tokens the local prefix cache gives it.

        Returns:
            0 if there is nothing to copy: the import is gone, is of another prompt, or the prefix
            cache does not reach up to its tail.
        """
        held = self.held.get(name)
        if held is None or not held.committed or held.tokens != prompt_tokens:
            return 0
        return prompt_tokens - 1 - local if local == tail_start(prompt_tokens, self.unit) else 0

    def copies(self, name: str, targets: Sequence[Sequence[int]]) -> list[Copy]:
        """The blocks that hold the tokens of :meth:`tail_of`, each onto the sample's own.

        Args:
            targets: by group, the sample's block ids in prompt order; 0 where its window has moved on.
        """
        held = self.held[name]
        tail, found = tail_start(held.tokens, self.unit), list[Copy]()
        for group, (blocking, ids) in enumerate(zip(self.groups, targets, strict=True)):
            last = num_blocks(held.tokens - 1, blocking.block_size)
            for i in range(tail // blocking.block_size, last):
                if ids[i]:
                    found.append((group, held.blocks[group][i], ids[i]))
        return found
