"""Loads of a consumer, and what each of their sources owes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from kvtransfer import wire
from kvtransfer.target import Target


@dataclass(slots=True)
class Part:
    """What a load gets from one source.

    Attributes:
        sub: number of its subscription, 0 while it has none.
        missing: by group, the blocks not yet written.
        targets: by group, its first block and where its blocks go.
        due: by group, of those the subscription covers, the blocks not yet announced.
        early: messages that came before the manifest (on another lane); ``early_bytes`` of payload.
        retries: times its connection was lost.
    """

    load: Load
    source: wire.Source
    missing: dict[int, set[int]]
    targets: dict[int, tuple[int, Target]]
    sub: int = 0
    due: dict[int, set[int]] = field(default_factory=dict)
    manifest: wire.Manifest | None = None
    early: list[tuple[wire.Blocks, list[zmq.Frame]]] = field(default_factory=list)
    early_bytes: int = 0
    retries: int = 0

    @property
    def heads(self) -> tuple[int, int]:
        return self.source.first, self.source.last

    @property
    def complete(self) -> bool:
        return self.manifest is not None and not any(self.missing.values())

    def wants(self) -> tuple[wire.Want, ...]:
        """The smallest runs that cover what is missing."""
        runs = ((g, min(m), max(m) + 1) for g, m in self.missing.items() if m)
        return tuple(wire.Want(group, first, last - first) for group, first, last in runs)


@dataclass(slots=True)
class Load:
    """A load in flight. ``writing``: copies into the cache that have not passed their fence."""

    spec: wire.Load
    started: float
    deadline: float
    parts: list[Part] = field(default_factory=list)
    first_at: float = 0.0
    scatter_s: float = 0.0
    nbytes: int = 0
    transport: str = ""
    writing: int = 0
    failed: str = ""

    @property
    def retries(self) -> int:
        """Times it was resumed: of several connections the one that was lost most often."""
        return max(part.retries for part in self.parts)
