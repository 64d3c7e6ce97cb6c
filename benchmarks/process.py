"""One guarded server process: started, frozen, thawed and stopped with everything below it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import guard

STOP_S = 10.0
STOPPED = "TtZX"


class LaunchError(RuntimeError):
    """A server ended early or was not ready in time."""


@dataclass(frozen=True)
class Launch:
    """What to run: a name for its log file, the command, and the environment variables added to ours."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)

    def public(self, names: Mapping[str, str]) -> dict[str, object]:
        """The launch as a result file may show it: every path in `names` replaced by its public name."""
        return {
            "name": self.name,
            "argv": [replace_all(arg, names) for arg in self.argv],
            "env": {key: replace_all(value, names) for key, value in self.env.items()},
        }


class GuardedProcess:
    """Owns one process tree from construction until `stop()`; dies with this interpreter in any case."""

    def __init__(self, launch: Launch, run_dir: Path) -> None:
        self.launch = launch
        self.log = run_dir / f"{launch.name}.log"
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, guard.__file__, *launch.argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.env},
                cwd=run_dir,
                start_new_session=True,
            )

    def check_alive(self) -> None:
        """Raise LaunchError, with the end of the log, when the process has ended."""
        code = self._guard.poll()
        if code is not None:
            raise LaunchError(f"{self.launch.name} ended with status {code}; {self.tail()}")

    def tail(self) -> str:
        """The end of the process's log, for an error message."""
        return f"the log of {self.launch.name} ends with:\n" + self.log.read_text(errors="replace")[-2000:]

    def freeze(self) -> None:
        """SIGSTOP the whole tree and wait until it has: it uses no CPU until `thaw()`. Idempotent."""
        guard.signal_tree(self._guard.pid, signal.SIGSTOP)
        deadline = time.monotonic() + STOP_S
        while not all(_stat(pid)[0] in STOPPED for pid in guard.descendants(self._guard.pid)):
            if time.monotonic() > deadline:
                raise LaunchError(f"{self.launch.name} did not stop within {STOP_S:.0f} s of SIGSTOP")
            time.sleep(0.001)

    def thaw(self) -> None:
        """SIGCONT the whole tree. Idempotent."""
        guard.signal_tree(self._guard.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """User and system CPU time used so far by the live processes of the tree."""
        return sum(_cpu_seconds(pid) for pid in guard.descendants(self._guard.pid))

    def allow_cores(self, program: str, cores: Collection[int]) -> int:
        """Let every thread of the programs named `program` run on `cores`; returns how many threads."""
        threads = [
            int(thread.name)
            for pid in guard.descendants(self._guard.pid)
            if _program(pid).startswith(program)
            for thread in Path(f"/proc/{pid}/task").iterdir()
        ]
        for thread in threads:
            os.sched_setaffinity(thread, cores)
        return len(threads)

    def niceness(self) -> int:
        """The highest nice value of a live process of the tree."""
        values = [_niceness(pid) for pid in guard.descendants(self._guard.pid)]
        return max(values, default=0)

    def stop(self) -> None:
        """End the tree and wait until it is gone. Idempotent."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._guard.wait()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; those of a process that is gone say so."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", *["0"] * 50]


def _cpu_seconds(pid: int) -> float:
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _niceness(pid: int) -> int:
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError:
        return 0


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that were free on loopback a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def replace_all(text: str, names: Mapping[str, str]) -> str:
    """`text` with every key of `names` replaced by its value, longest keys first."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text
