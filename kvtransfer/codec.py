"""How rows are encoded on the wire, if they are."""

from __future__ import annotations

from typing import Protocol

import torch


class Codec(Protocol):
    """A lossy encoding of rows, applied by the producer when it stages and undone by the consumer.

    Attributes:
        name: as it stands in the manifest.
    """

    name: str

    def encoded_bytes(self, row_bytes: int) -> int:
        """Bytes of an encoded row. Raises ValueError if rows of that length can't be encoded."""

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Encode raw rows ``[layers, count, heads, row_bytes]`` into ``[..., encoded_bytes]``, both uint8."""

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """The raw rows of encoded ones, which may be strided and read-only."""
