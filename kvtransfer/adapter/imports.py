"""Prefixes imported into a consumer's block pool.

An **import** is a prompt whose KV comes from elsewhere. It owns blocks of vLLM's pool without being a
request: the scheduler never sees it, so nothing is polled while a transfer runs, nothing has to be
preempted or aborted in the engine, and blocks are published to the prefix cache only when they are
complete. Samples submitted after the commit find every full block that they need in the local prefix
cache; the blocks with the prompt's end are copied to each of them (:meth:`Imports.copies`). While an import
is held its blocks can't be evicted.

A sample that ended can be **kept** (:meth:`Imports.keep`): it becomes an import of the tokens it has
computed, by a further reference to each of its blocks. What goes on from it finds its full blocks in the
prefix cache and copies the block in which it ended, so it computes its own new tokens only.

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
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.plan import Blocking, hit_unit, needed_blocks, num_blocks, tail_start

Copy = tuple[int, int, int]
"""A block to copy: group, source and target block id."""


@dataclass(slots=True)
class Import:
    """A held prefix.

    Attributes:
        request: the sequence in the pool that owns the blocks, None for a kept sample.
        tokens: of the prefix.
        computed: how many of them have KV.
        blocks: by group, its pool block ids in prompt order.
        pinned: vLLM's blocks of a kept sample.
        committed: published to the prefix cache.
    """

    request: Any
    tokens: Sequence[int]
    computed: int
    blocks: tuple[list[int], ...]
    pinned: list[Any] = field(default_factory=list)
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
        self.held[name] = Import(request, request.prompt_token_ids, tokens, blocks)
        return {"cached": local, "spans": [self._span(g, ids, tokens, local) for g, ids in enumerate(blocks)]}

    def _span(self, group: int, ids: list[int], tokens: int, local: int) -> tuple[int, int, list[int]]:
        blocking = self.groups[group]
        first = max(needed_blocks(tokens, blocking, self.unit).start, local // blocking.block_size)
        return group, first, ids[first:]

    def commit(self, manager: Any, name: str) -> None:
        """Publish the full blocks to the prefix cache. Every block has been written."""
        held = self.held[name]
        manager.cache_blocks(held.request, held.computed)
        held.committed = True

    def keep(self, pool: Any, request: Any, blocks: Sequence[Sequence[int]], name: str) -> None:
        """Hold the blocks of a sample that has ended, before vLLM frees them.

        Args:
            pool: vLLM's BlockPool.
            request: the vLLM Request that has ended.
            blocks: by group, the ids of its blocks in order; 0 where its window has moved on.
        """
        if name in self.held:
            raise ValueError(f"import {name} exists")
        tokens = list(request.all_token_ids)
        computed = min(request.num_computed_tokens, len(tokens) - 1)  # the last one has no KV yet
        pinned = [pool.blocks[block] for group in blocks for block in group if block]
        pool.touch(pinned)
        ids = tuple(list(group) for group in blocks)
        self.held[name] = Import(None, tokens, computed, ids, pinned, committed=True)

    def release(self, manager: Any, name: str) -> None:
        """Give the blocks back; those published stay in the prefix cache until evicted. Idempotent."""
        held = self.held.pop(name, None)
        if held is None:
            return
        if held.request is not None:
            manager.free(held.request)
        manager.block_pool.free_blocks(reversed(held.pinned))

    def reach(self, name: str, prompt: Sequence[int], local: int) -> int:
        """How far into a sample's prompt this import and the local prefix cache reach together.

        Args:
            prompt: its tokens.
            local: how many of them the local prefix cache gives it.

        Returns:
            ``local`` if there is nothing to copy: the import is gone, the prompt does not begin with it, the
            prefix cache does not reach up to its tail, or a window has left what the prompt would see of it.
            Else the end of what is to be copied, before the prompt's last token at most.
        """
        held = self.held.get(name)
        if held is None or not held.committed:
            return local
        last = min(held.computed, len(prompt) - 1)
        end = next((i for i in range(local, last) if prompt[i] != held.tokens[i]), last)
        if end > local and list(prompt[:local]) != list(held.tokens[:local]):
            return local  # what the prefix cache has of it is another's
        return end if local == end // self.unit * self.unit and self._sees(held, end) else local

    def _sees(self, held: Import, end: int) -> bool:
        """Whether an import has all blocks that a sample which goes on at ``end`` copies of it."""
        tail = end // self.unit * self.unit
        for blocking, ids in zip(self.groups, held.blocks, strict=True):
            seen = max(tail, end - blocking.window + 1) if blocking.window else tail
            if 0 in ids[seen // blocking.block_size : num_blocks(end, blocking.block_size)]:
                return False
        return True

    def copies(self, name: str, end: int, targets: Sequence[Sequence[int]]) -> list[Copy]:
        """The blocks that hold the tokens from the last whole unit up to ``end``, each onto the sample's own.

        Args:
            end: what :meth:`reach` said.
            targets: by group, the sample's block ids in prompt order; 0 where its window has moved on.
        """
        held, found = self.held[name], list[Copy]()
        tail = end // self.unit * self.unit
        for group, (blocking, ids) in enumerate(zip(self.groups, targets, strict=True)):
            for i in range(tail // blocking.block_size, num_blocks(end, blocking.block_size)):
                if ids[i]:
                    found.append((group, held.blocks[group][i], ids[i]))
        return found
