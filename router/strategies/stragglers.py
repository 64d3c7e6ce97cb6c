"""Samples that take far longer than the others of their draw: cut, or drawn a second time elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Set
from statistics import median

from router.sampler import Group, Sample
from router.strategies.options import Options

Note = Callable[[Sample], None]
"""To be told of each sample that ends."""


@contextlib.asynccontextmanager
async def watching(group: Group, n: int, running: Set[int], options: Options) -> AsyncIterator[Note]:
    """Do what ``options.stragglers`` says, once, to those of ``n`` samples that are still ``running``
    ``straggler_factor`` times as long after the start as the median of those that have finished, when at
    least half of the ``n`` have."""
    if options.stragglers == "wait":
        yield lambda sample: None
        return
    loop = asyncio.get_running_loop()
    since, took, half = loop.time(), list[float](), asyncio.Event()

    def note(sample: Sample) -> None:
        if sample.state == "finished":
            took.append(loop.time() - since)
        if 2 * len(took) >= n:
            half.set()

    async def act() -> None:
        await half.wait()
        while (left := since + options.straggler_factor * median(took) - loop.time()) > 0:
            await asyncio.sleep(left)  # the median may have grown when this is over
        if late := tuple(sorted(running)):
            await (group.cancel(late) if options.stragglers == "cut" else group.redraw(late))

    task = asyncio.create_task(act())
    try:
        yield note
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
