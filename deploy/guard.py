"""Ends what a killed launcher leaves behind: ``python deploy/guard.py GRACE_S``, process ids on stdin.

When the launcher dies its children get SIGTERM from the kernel (:mod:`deploy.child`), so that they end
cleanly: requests drain, sockets and shared memory go. One that is stopped, or that ignores the signal, would
stay. So the guard, whose standard input closes with the launcher, has every process go on, and kills with
its group what has not ended after the grace. Where the launcher has ended them itself it finds nothing.

Standard library only and run as a file, so that it is small. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

POLL_S = 0.1


class Guard:
    """The launcher's end: owns the guard's process from its making to :meth:`close`."""

    def __init__(self, grace_s: float) -> None:
        """``grace_s``: time that processes have to end once the launcher is dead."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, pid: int) -> None:
        """Take a process that leads a group under guard."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # without a guard the kernel's SIGTERM is left
            self._process.stdin.write(b"%d\n" % pid)
            self._process.stdin.flush()

    def close(self) -> None:
        """End the guard; every process has to have ended before."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def main(lines: Iterable[str], grace_s: float) -> None:
    """Read process ids until the end of ``lines``, then see their processes off."""
    begun = {pid: _begun(pid) for pid in map(int, lines)}

    def left() -> list[int]:
        return [pid for pid, when in begun.items() if when and _begun(pid) == when]

    _signal(left(), signal.SIGCONT)
    until = time.monotonic() + grace_s
    while left() and time.monotonic() < until:
        time.sleep(POLL_S)
    _signal(left(), signal.SIGKILL)


def _signal(groups: Iterable[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _begun(pid: int) -> str:
    """When a process began, which tells it from a later one of its number; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


if __name__ == "__main__":
    main(sys.stdin, float(sys.argv[1]))
