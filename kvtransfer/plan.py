"""Which blocks of a prompt exist, and the hash chain that identifies them. Pure functions."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

DIGEST_BYTES = 16
"""Bytes of one link of a chain."""


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


def tail_start(prompt: int, block_size: int) -> int:
    """First token of the block that holds the prompt's last token but one to compute.

    A sample always computes the prompt's last token itself (it needs its logits), so a prefix cache
    can serve it tokens ``[0, tail_start)`` in whole blocks; the block at ``tail_start`` is the one that
    siblings copy.
    """
    return (prompt - 1) // block_size * block_size


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
