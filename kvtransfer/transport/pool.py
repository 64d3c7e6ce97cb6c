"""Bounded host memory that payloads arrive in, used again and again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvtransfer import wire
from kvtransfer.arena import Arena
from kvtransfer.loop import Loop


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory lent by a pool. ``at``: its offset there; ``data``: uint8, one dimension, writable."""

    at: int
    data: Any


class Pool:
    """``capacity`` bytes on a loop. A buffer comes back when nothing refers to its tensor, or to a view of
    it, any more; on whichever thread that is.

    Attributes:
        memory: all of it.
    """

    def __init__(self, loop: Loop, capacity: int = wire.MAX_PAYLOAD) -> None:
        self._loop = loop
        self._arena = Arena(capacity)
        self.memory = self._arena.memory
        self._returned: deque[tuple[int, int]] = deque()
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def lent(self) -> int:
        """Bytes in use."""
        return self._arena.used

    def take(self, nbytes: int, retry: Callable[[], None]) -> Buffer | None:
        """A buffer; or None, and ``retry`` is called once there may be room."""
        self._collect()
        at = self._arena.allocate(nbytes)
        if at is None:
            self._waiting.append(retry)
            return None
        view = self.memory[at : at + nbytes]
        weakref.finalize(view, self._give_back, at, nbytes).atexit = False
        return Buffer(at, torch.frombuffer(view, dtype=torch.uint8))

    def close(self) -> None:
        """Let go of the memory; buffers that are lent keep their pages."""
        self._arena.close()

    def _give_back(self, at: int, nbytes: int) -> None:
        self._returned.append((at, nbytes))
        self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._collect()
        waiting, self._waiting = self._waiting, deque()
        for retry in waiting:
            retry()

    def _collect(self) -> None:
        while self._returned:
            self._arena.free(*self._returned.popleft())
