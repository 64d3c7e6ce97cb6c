"""How a serving process is asked to end."""

from __future__ import annotations

import asyncio
import os
import signal


def stop_on_signal(at_once: int) -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. A second one ends the process with status ``at_once``."""
    stop = asyncio.Event()

    def handle() -> None:
        if stop.is_set():
            os._exit(at_once)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    return stop
