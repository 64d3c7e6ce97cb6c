"""What of a prompt's KV moves from where to where, and the hash chain that identifies it. Pure functions.

A KV cache group is a set of layers that share block tables (:class:`Blocking`). Its blocks are numbered from
the prompt's first token on; the block that follows the last full one is partial.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

DIGEST_BYTES = 16
"""Bytes of one link of a chain."""
CHAIN_TOKENS = 32
"""Tokens of a link: the same on both ends of a transfer, whatever their block sizes are."""


@dataclass(frozen=True, slots=True)
class Blocking:
    """How a KV cache group keeps a sequence: ``block_size`` tokens a block, and the ``window`` of tokens
    that a token attends to, itself included (0: all that precede it)."""

    block_size: int
    window: int = 0


def num_blocks(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` tokens, the partial tail block included."""
    return -(-tokens // block_size)


def finished_blocks(computed: int, prompt: int, block_size: int) -> int:
    """Leading blocks of a prompt that no later token of it will write.

    Args:
        computed: tokens computed so far, 0..prompt or more (generated ones are not the prompt's).
        prompt: tokens of the prompt.
    """
    return num_blocks(prompt, block_size) if computed >= prompt else computed // block_size


def hit_unit(groups: Sequence[Blocking]) -> int:
    """Tokens that prefix-cache hits come in multiples of: whole blocks of every group."""
    return math.lcm(*(group.block_size for group in groups))


def tail_start(prompt: int, unit: int) -> int:
    """First token of the unit that holds the prompt's last token.

    A sample always computes the prompt's last token itself (it needs its logits), so a prefix cache
    can serve it tokens ``[0, tail_start)`` in whole units; what follows is what siblings copy.
    """
    return (prompt - 1) // unit * unit


def needed_blocks(prompt: int, group: Blocking, unit: int) -> range:
    """The blocks of a group that a sample of the prompt needs, all others excluded.

    A windowed group needs, besides the tail, the whole blocks that a token at ``tail_start`` attends to.
    That is also what a prefix cache has to hold for a hit of that length.
    """
    seen = tail_start(prompt, unit) - group.window + 1 if group.window else 0
    return range(max(0, seen) // group.block_size, num_blocks(prompt, group.block_size))


def chain(tokens: Sequence[int], block_size: int, extra: str = "") -> bytes:
    """Concatenated links, one a block: link i = H(link i-1, tokens of block i).

    Two prompts have equal chains only if their tokens and ``extra`` (adapter, salt) are equal. The
    tail block's link covers its tokens alone, so a chain also fixes the prompt's length.
    """
    link = hashlib.blake2b(extra.encode(), digest_size=DIGEST_BYTES).digest()
    links = []
    for first in range(0, len(tokens), block_size):
        block = tokens[first : first + block_size]
        packed = struct.pack(f"<{len(block)}I", *block)
        link = hashlib.blake2b(link + packed, digest_size=DIGEST_BYTES).digest()
        links.append(link)
    return b"".join(links)


def pieces(first: int, last: int, block_bytes: int, piece_bytes: int) -> list[range]:
    """Split blocks ``[first, last)`` into runs of at most ``piece_bytes`` (at least one block each)."""
    step = max(1, piece_bytes // block_bytes)
    return [range(at, min(at + step, last)) for at in range(first, last, step)]
