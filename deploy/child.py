"""Run a command that ends when its launcher does: ``python deploy/child.py LAUNCHER_PID COMMAND...``

The command gets SIGTERM when the launcher dies, however it dies (``PR_SET_PDEATHSIG`` survives the
exec); one that doesn't end by it is :mod:`deploy.guard`'s. Standard library only and run as a file, so
that it starts in milliseconds. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(launcher: int, command: list[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The launcher may have died before the line above took effect.
    if os.getppid() != launcher:
        sys.exit(f"the launcher {launcher} is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
