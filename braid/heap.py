"""The garbage collector of a process that serves."""

from __future__ import annotations

import gc
import logging

log = logging.getLogger("braid.heap")


def freeze_heap() -> None:
    """Exempt what has been made so far from collection; called once, when a process begins to serve.

    A full collection looks at every object. After importing vLLM that is half a million, and takes half a
    second and more in which nothing else of the process runs: no token, no heartbeat.
    """
    gc.collect()
    gc.freeze()
    log.info("heap_frozen", extra={"objects": gc.get_freeze_count()})
