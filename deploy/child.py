"""Run a command that ends when its launcher does: ``python deploy/child.py LAUNCHER_PID NICE COMMAND...``

Its niceness is raised by NICE, with the whole session's where the kernel shares cores out by sessions
(autogroups). The command gets SIGTERM when the launcher dies, however it dies (``PR_SET_PDEATHSIG``
survives the exec); one that doesn't end by it is :mod:`deploy.guard`'s. Standard library only and run as
a file, so that it starts in milliseconds. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main(launcher: int, nice: int, command: list[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The launcher may have died before the line above took effect.
    if os.getppid() != launcher:
        sys.exit(f"the launcher {launcher} is gone")
    give_way(nice)
    os.execvp(command[0], command)


def give_way(nice: int) -> None:
    """Leave cores to others first. Where that is refused, all have the same right to them."""
    if nice:
        os.nice(nice)
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
