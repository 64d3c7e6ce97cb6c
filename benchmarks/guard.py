"""Run one command so that nothing it starts outlives the script that asked for it.

Usage: `python guard.py COMMAND...` with a pipe as stdin that the asking script holds open. The guard adopts
every orphan below it (`PR_SET_CHILD_SUBREAPER`), so the tree is complete even where a server detaches its
workers. When stdin ends (the script closed it, or died, however) the command gets SIGTERM, and after
`GRACE_S`, or `ORPHAN_S` after the command has ended, whatever is left of the tree gets SIGKILL. When the
command ends by itself the rest of its tree is killed at once.
Linux only; standard library only, because it runs before any environment is known.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 15.0
ORPHAN_S = 1.0
POLL_S = 0.2
PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> list[int]:
    """Every live process below `root`, parents before children; `root` itself is not in the list."""
    children: dict[int, list[int]] = {}
    for pid, ppid in _parents():
        children.setdefault(ppid, []).append(pid)
    found = [*children.get(root, [])]
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, []))
    return found


def signal_tree(root: int, sig: int) -> None:
    """Send `sig` to everything below `root`, again until no process is new (one may fork meanwhile)."""
    sent: set[int] = set()
    while fresh := [pid for pid in descendants(root) if pid not in sent]:
        for pid in fresh:
            sent.add(pid)
            try:
                os.kill(pid, sig)
            except ProcessLookupError:
                continue


def _parents() -> Iterator[tuple[int, int]]:
    """(pid, parent pid) of every process that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            yield int(entry.name), int(ppid)


def _reap(main_pid: int) -> int | None:
    """Collect finished children; the exit status of `main_pid` once it is among them."""
    status = None
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == main_pid:
            status = os.waitstatus_to_exitcode(code)


def _end_tree(main_pid: int, grace_s: float) -> None:
    signal_tree(os.getpid(), signal.SIGCONT)
    try:
        os.kill(main_pid, signal.SIGTERM)
    except ProcessLookupError:
        grace_s = 0.0
    deadline = time.monotonic() + grace_s
    while descendants(os.getpid()):
        if time.monotonic() >= deadline:
            signal_tree(os.getpid(), signal.SIGKILL)
        time.sleep(POLL_S / 4)
        if _reap(main_pid) is not None:
            deadline = min(deadline, time.monotonic() + ORPHAN_S)


def main(argv: list[str]) -> int:
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)  # the pipe is the one way to end a guard
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals
    )
    while True:
        status = _reap(child.pid)
        if status is not None:
            _end_tree(child.pid, 0.0)
            return status if status >= 0 else 128 - status
        if select.select([sys.stdin.buffer], [], [], POLL_S)[0] and not os.read(0, 1):
            _end_tree(child.pid, GRACE_S)
            return 0


def _default_signals() -> None:
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
