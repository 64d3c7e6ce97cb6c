"""Seeds of a group's samples."""

from __future__ import annotations

import hashlib

_BITS = 63


def sample_seed(seed: int | None, index: int) -> int | None:
    """Seed of sample ``index`` of a group, the same wherever the sample runs.

    Sample 0 keeps the client's seed, so a single request samples as on a plain engine. The others are
    hashed: with ``seed + index``, groups of neighbouring seeds would share samples.
    """
    if seed is None or index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _BITS)
