"""The fingerprint of a worker: equal on two workers only if one may read the other's KV blocks."""

from __future__ import annotations

import hashlib
from pathlib import Path

_EDGE = 1024 * 1024
"""Bytes hashed at each end of a weight file; the whole of a large model takes minutes to read."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def model_digest(model: str, revision: str | None) -> str:
    """Digest of a model's configuration and weights.

    For a folder: ``config.json`` and of each weight file its name, size, and first and last MiB. For a
    hub name: the name and revision (two workers that name the same revision hold the same weights).
    """
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(model)
    if not folder.is_dir():
        digest.update(f"{model}@{revision}".encode())
        return digest.hexdigest()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def fingerprint(
    *,
    model: str,
    vllm_version: str,
    dtype: str,
    kv_dtype: str,
    quantization: str,
    block_size: int,
    layouts: list[str],
) -> str:
    """One short string of all that must be equal: ``layouts`` has one entry a tensor-parallel rank."""
    parts = [model, vllm_version, dtype, kv_dtype, quantization, str(block_size), *layouts]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
