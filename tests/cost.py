"""Tests of what a hostile input may cost."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

TRIES = 3


async def least_cpu_s(read: Callable[[str], Any], text: str) -> float:
    """CPU seconds of this thread that ``read(text)`` takes, awaited if it can be: the least of a few tries.

    A stall of the machine or a collection of this process's heap is charged to one try; a reading
    that runs away takes as long each time, unless ``read`` remembers its texts.
    """
    spent = []
    for _ in range(TRIES):
        begun = time.thread_time()
        found = read(text)
        if inspect.isawaitable(found):
            await found
        spent.append(time.thread_time() - begun)
    return min(spent)
