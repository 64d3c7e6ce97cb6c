"""The memory of a process that serves: its garbage collector, and what its allocator keeps."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import mmap
import threading
import time
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("braid.heap")

TRIM_S = 10.0
"""Time between two looks at how much a process has grown."""
TELL_S = 60.0
"""Least time between two log lines about the heap."""
GROWN_BYTES = 1024 * 1024
"""Growth since the last trim that is worth another."""


def freeze_heap() -> None:
    """Exempt what has been made so far from collection; called once, when a process begins to serve.

    A full collection looks at every object. After importing vLLM that is half a million, and takes half a
    second and more in which nothing else of the process runs: no token, no heartbeat.
    """
    gc.collect()
    gc.freeze()
    log.info("heap_frozen", extra={"objects": gc.get_freeze_count()})


@functools.cache
def keep_heap_trimmed(every_s: float = TRIM_S) -> None:
    """From now on give memory that was freed back to the kernel, while the process lives; once is enough.

    glibc gives back only what is free at the end of its heap. An engine step takes and frees tensors of all
    sizes between objects that stay, so a vLLM Worker's heap grows for hours though what it has in use does
    not: with random prompts a quarter of 320 MiB was free after eight minutes. A trim takes 1 to 3 ms of CPU,
    in which other threads wait if they allocate; a process that has not grown since the last is left alone.
    What a trim finds is logged as ``heap``, at most once in :data:`TELL_S`.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # not glibc
        return
    log.info("heap_trimmed", extra={"every_s": every_s})

    def run() -> None:
        kept = 0
        told_at = -TELL_S
        while True:
            time.sleep(every_s)
            before = anonymous_bytes()
            if before <= kept + GROWN_BYTES:
                continue
            cpu_s = time.thread_time()
            trim(0)
            cpu_s = time.thread_time() - cpu_s
            kept = anonymous_bytes()
            if time.monotonic() >= told_at + TELL_S:
                told_at = time.monotonic()
                _tell(kept, before - kept, cpu_s)

    threading.Thread(target=run, name="braid-heap", daemon=True).start()


def _tell(kept: int, trimmed: int, cpu_s: float) -> None:
    sizes = {"anonymous": kept, "trimmed": trimmed}
    if found := allocated():
        sizes |= found._asdict()
    mib = {f"{name}_mib": round(size / 2**20, 2) for name, size in sizes.items()}
    log.info("heap", extra={**mib, "trim_ms": round(cpu_s * 1000, 2)})


class Allocated(NamedTuple):
    """What glibc's allocator has taken from the kernel, in bytes.

    Attributes:
        in_use: handed out and not freed, of all threads; what they keep to hand out again faster counts.
        free: holes between what is in use, resident or not.
    """

    in_use: int
    free: int


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2``, see mallinfo(3)."""

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def allocated() -> Allocated | None:
    """See :class:`Allocated`; None where glibc is older than 2.33 or the C library another."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallInfo
    told = mallinfo2()
    return Allocated(in_use=told.uordblks + told.hblkhd, free=told.fordblks)


def anonymous_bytes() -> int:
    """Resident memory of this process that is neither of files nor shared."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
