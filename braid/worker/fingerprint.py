"""The fingerprint of a worker: equal on two workers only if one may read the other's KV blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

Traits = tuple[tuple[str, str], ...]
"""(name, value) of each thing that must be equal on both."""
_EDGE = 1024 * 1024
"""Bytes hashed at each end of a weight file; the whole of a large model takes minutes to read."""
_STRIP = 64 * 1024
"""Bytes hashed amid each tensor of a safetensors file, and at ``_STRIPS`` places of another."""
_STRIPS = 64
_ELSEWHERE = ("_name_or_path", "transformers_version")
"""What two copies of a configuration may differ in."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def model_digest(model: str, revision: str | None) -> str:
    """Digest of a model's configuration and weights.

    For a folder: ``config.json`` and of each weight file its name, size, first and last MiB, and a strip from
    the middle of each tensor (of strips at equal distances, if the file is no safetensors). For a hub name:
    the name and revision (two workers that name the same revision hold the same weights).
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
            for place in _places(file, size):
                file.seek(place)
                digest.update(file.read(_STRIP))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


def _places(file: BinaryIO, size: int) -> list[int]:
    """Where strips of a weight file begin: amid its tensors, if it tells of them."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if length < size else {}
        begins = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
        middles = [8 + length + (begin + max(begin, end - _STRIP)) // 2 for begin, end in begins]
    except (ValueError, TypeError, KeyError, AttributeError):
        middles = []
    return sorted(middles) or [size * strip // (_STRIPS + 1) for strip in range(1, _STRIPS + 1)]


def config_digest(config: Any) -> str:
    """Digest of the configuration that an engine runs a model by, flags that change it included.

    Args:
        config: a ``PretrainedConfig`` of transformers.
    """
    fields = json.loads(config.to_json_string(use_diff=False))
    known = {key: value for key, value in fields.items() if key not in _ELSEWHERE}
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()


def fingerprint(traits: Traits) -> str:
    """One short string of traits, which keep their order."""
    parts = [part for trait in traits for part in trait]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def group_trait(kind: str, window: int, layers: Sequence[str], row_bytes: int, block_size: int) -> str:
    """A KV cache group in words: its layers, and what a head of one of them keeps a token."""
    names = hashlib.blake2b("\0".join(layers).encode(), digest_size=4).hexdigest()
    seen = f" of {window} tokens" if window else ""
    return f"{kind}{seen}, {len(layers)} layers {names}, {row_bytes / block_size:g} bytes"
