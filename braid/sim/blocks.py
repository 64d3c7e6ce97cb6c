"""The paged KV cache of a simulated engine: block numbers, reference counts, prefix cache. Pure state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks of a KV cache, shared by reference.

    A block is free or held by one sequence or more. A free block keeps its contents, and with them its link,
    until it is needed: the least recently freed goes first. ``allocate`` and ``share`` add one holder each,
    ``free`` takes one away. Block 0 is no sequence's, as in vLLM.
    """

    def __init__(self, blocks: int) -> None:
        """``blocks``: size of the pool, block 0 included."""
        self.blocks = blocks - 1
        self._holders = [0] * blocks
        self._link: list[bytes | None] = [None] * blocks
        self._by_link: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, blocks))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, whether or not they keep something."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, 0..1."""
        return 1 - len(self._free) / self.blocks

    def cached(self, links: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known beginning of a chain. They are not held by this."""
        found = []
        for link in links:
            block = self._by_link.get(link)
            if block is None:
                break
            found.append(block)
        return found

    def can_take(self, shared: Sequence[int], count: int) -> bool:
        """Whether ``shared`` blocks can be shared and ``count`` more be allocated."""
        return count + sum(not self._holders[b] for b in shared) <= len(self._free)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that :meth:`cached` has named."""
        for block in blocks:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold ``count`` blocks whose contents are of no use any more; there must be as many free."""
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, link: bytes) -> None:
        """A held block is full: its contents may be shared from now on. The first block of a link stays."""
        if link not in self._by_link:
            self._forget(block)
            self._by_link[link] = block
            self._link[block] = link

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, in order: the end of a chain is the first to be used again."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the blocks are held by these holders, no others, and the links agree."""
        holders = [0] * len(self._holders)
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders
        assert set(self._free) == {b for b in range(1, len(holders)) if not holders[b]}
        assert self._by_link == {link: b for b, link in enumerate(self._link) if link is not None}

    def _forget(self, block: int) -> None:
        link = self._link[block]
        if link is not None:
            del self._by_link[link]
            self._link[block] = None
