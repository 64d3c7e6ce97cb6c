"""Keeps every core from halting, for benchmarks of what takes less than a millisecond.

A virtual machine's core that has nothing to do goes back to the host, and what it costs to get it again is
the host's affair: each hop between threads then times the host. One process a core, of the kernel's class
for what runs when nothing else wants to (SCHED_IDLE), gives its core away in every turn of a loop; whatever
becomes ready runs at once.

    python benchmarks/awake.py
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Start one process for each core that this one may use, and wait to be stopped."""
    for core in os.sched_getaffinity(0):
        if os.fork() == 0:
            os.sched_setaffinity(0, {core})
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            while True:
                os.sched_yield()
    signal.pause()


if __name__ == "__main__":
    main()
