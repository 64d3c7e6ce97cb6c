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

log = logging.getLogger("braid.heap")

TRIM_S = 30.0
"""Time between two looks at how much a process has grown."""
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
    not: with random prompts a quarter of 320 MiB was free after eight minutes. A trim takes 1 to 5 ms, in
    which other threads wait if they allocate; a process that has not grown since the last is left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # not glibc
        return
    log.info("heap_trimmed", extra={"every_s": every_s})

    def run() -> None:
        last = 0
        while True:
            time.sleep(every_s)
            if anonymous_bytes() > last + GROWN_BYTES:
                trim(0)
                last = anonymous_bytes()

    threading.Thread(target=run, name="braid-heap", daemon=True).start()


def anonymous_bytes() -> int:
    """Resident memory of this process that is neither of files nor shared."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
