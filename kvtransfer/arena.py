"""Host memory that a producer stages blocks in: one anonymous file, so that a peer on this host can map it.

The memory has no name in the file system (``memfd_create``): the kernel takes it back when the last process
that holds it ends, however it ends. Nothing is allocated until it is touched; regions are handed out from
the lowest free address on, so that a lightly used arena stays small and warm, and what only a burst has
touched can be given back (:meth:`Arena.age`).
"""

from __future__ import annotations

import mmap
import os
import secrets
from bisect import bisect_left, insort
from pathlib import Path

import msgspec

ALIGN = 4096
"""Regions start at multiples of this many bytes."""
_NONCE_BYTES = 16


class ArenaRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where another process of this host finds an arena, and how it knows that it has found the right one."""

    pid: int
    fd: int
    nbytes: int
    nonce: bytes


class Arena:
    """``capacity`` bytes handed out in regions. Not thread-safe; reading and writing regions is.

    Attributes:
        memory: all of it, writable. The first page is the arena's own.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = _aligned(capacity)
        self._nbytes = ALIGN + self.capacity
        self._fd = os.memfd_create("braid-kv", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self._nbytes)
        self._mmap = mmap.mmap(self._fd, self._nbytes)
        self.memory = memoryview(self._mmap)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self.memory[:_NONCE_BYTES] = self._nonce
        self._free: list[tuple[int, int]] = [(ALIGN, self.capacity)]
        self.used = 0
        self._touched = ALIGN  # end of what has pages
        self._lately = ALIGN  # end of what was handed out since the last `age`
        self._kept = self._nbytes  # end of what was handed out before
        self._held = False

    @property
    def ref(self) -> ArenaRef:
        """How a process of this host opens it."""
        return ArenaRef(os.getpid(), self._fd, self._nbytes, self._nonce)

    def allocate(self, nbytes: int) -> int | None:
        """Offset of ``nbytes`` in a row, or None if there is no such room now."""
        size = _aligned(nbytes)
        for index, (at, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[index]
                else:
                    self._free[index] = (at + size, room - size)
                self.used += size
                self._lately = max(self._lately, at + size)
                self._touched = max(self._touched, at + size)
                return at
        return None

    def free(self, at: int, nbytes: int) -> None:
        """Give back what ``allocate(nbytes)`` returned; nobody reads or writes it any more."""
        size = _aligned(nbytes)
        index = bisect_left(self._free, (at, 0))
        if index > 0 and sum(self._free[index - 1]) == at:
            index -= 1
            at, room = self._free.pop(index)
            size += room
        if index < len(self._free) and at + size == self._free[index][0]:
            size += self._free.pop(index)[1]
        insort(self._free, (at, size))
        self.used = self.capacity - sum(room for _, room in self._free)

    def hold_pages(self) -> None:
        """From now on the pages are a device's too (pinned, registered): none is given back."""
        self._held = True

    def age(self) -> None:
        """What was handed out since the last call, or is now, stays; what lies above may be given back."""
        self._kept = self._lately
        self._lately = self._top()

    def give_back(self, most: int) -> int:
        """Give the kernel pages that :meth:`age` has left, from the top down, about ``most`` bytes.

        They read as zeros, here and where a peer has them mapped, until they are written again. The
        interpreter stands still meanwhile. Returns how many bytes it were; raises OSError if the kernel
        does not take them.
        """
        end = _whole_pages(self._touched)
        begin = max(_whole_pages(max(self._kept, self._lately)), end - _whole_pages(most))
        if self._held or begin >= end:
            return 0
        self._mmap.madvise(mmap.MADV_REMOVE, begin, end - begin)
        self._touched = begin
        return end - begin

    def _top(self) -> int:
        """End of the highest region that is handed out."""
        at, room = self._free[-1] if self._free else (self._nbytes, 0)
        return at if at + room == self._nbytes else self._nbytes

    def close(self) -> None:
        """Let go of the memory. Views of it that still exist keep their pages."""
        os.close(self._fd)

    def check_integrity(self) -> None:
        """Raise AssertionError if free space overlaps, is not joined up, or does not add up."""
        assert self.used + sum(room for _, room in self._free) == self.capacity
        for (at, room), (following, _) in zip(self._free, self._free[1:], strict=False):
            assert at + room < following
        assert all(at >= ALIGN and at + room <= self._nbytes for at, room in self._free)


def open_arena(ref: ArenaRef) -> memoryview:
    """Map another process's arena, read-only.

    Raises:
        OSError: it is not on this host, is not ours to read, or is another than ``ref`` says.
    """
    fd = os.open(
        Path("/proc") / str(ref.pid) / "fd" / str(ref.fd), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    )
    try:
        if os.fstat(fd).st_size != ref.nbytes:
            raise OSError("another file than the arena that was announced")
        mapped = memoryview(mmap.mmap(fd, ref.nbytes, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
    if mapped[:_NONCE_BYTES] != ref.nonce:
        raise OSError("another arena than the one that was announced")
    return mapped


def _aligned(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGN)) * ALIGN


def _whole_pages(nbytes: int) -> int:
    """Rounded up: a page may be larger than ``ALIGN``."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
