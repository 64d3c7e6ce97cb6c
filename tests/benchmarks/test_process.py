"""Processes of a benchmark: nothing outlives the script, a frozen tree uses no CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.process import GuardedProcess, Launch, LaunchError, free_ports, replace_all

pytestmark = pytest.mark.slow

# Starts a child in a session of its own, as servers do that detach their workers, and tells both pids.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
{end}
"""
STAYS = PARENT.format(end="import time; time.sleep(1000)")
LEAVES = PARENT.format(end="sys.exit(7)")


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[GuardedProcess]:
    process = GuardedProcess(Launch("busy", [sys.executable, "-c", STAYS]), tmp_path)
    pids_of(process)
    yield process
    process.stop()


def pids_of(process: GuardedProcess) -> list[int]:
    return [int(pid) for pid in wait_for_line(process.log).split()]


def wait_for_line(path: Path) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (text := path.read_text()).endswith("\n"):
            return text
        time.sleep(0.02)
    raise AssertionError(f"no line in {path}")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_stop_ends_a_detached_child_too(busy: GuardedProcess) -> None:
    pids = pids_of(busy)
    busy.stop()
    assert all(gone(pid) for pid in pids)
    busy.stop()


def test_stop_ends_a_frozen_tree(busy: GuardedProcess) -> None:
    pids = pids_of(busy)
    busy.freeze()
    busy.stop()
    assert all(gone(pid) for pid in pids)


def test_a_killed_script_takes_its_processes_along(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {guard.__file__!r}, sys.executable, '-c', {STAYS!r}],"
        " stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(1000)"
    )
    with log.open("w") as output, subprocess.Popen([sys.executable, "-c", script], stdout=output) as process:
        pids = [int(pid) for pid in wait_for_line(log).split()]
        process.kill()
    assert all(gone(pid) for pid in pids)


def test_a_command_that_ends_leaves_nothing_and_is_noticed(tmp_path: Path) -> None:
    process = GuardedProcess(Launch("leaves", [sys.executable, "-c", LEAVES]), tmp_path)
    assert all(gone(pid) for pid in pids_of(process))
    process._guard.wait(20)
    with pytest.raises(LaunchError, match="leaves ended with status 7"):
        process.check_alive()
    process.stop()


def test_a_frozen_tree_uses_no_cpu_until_thawed(busy: GuardedProcess) -> None:
    busy.freeze()
    before = busy.cpu_seconds()
    time.sleep(0.3)
    assert busy.cpu_seconds() == before
    busy.thaw()
    deadline = time.monotonic() + 20
    while busy.cpu_seconds() == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_cores_and_nice_value_reach_every_thread_of_a_program(busy: GuardedProcess) -> None:
    core = min(os.sched_getaffinity(0))
    assert busy.allow_cores("python", {core}) >= 2
    assert all(os.sched_getaffinity(pid) == {core} for pid in pids_of(busy))
    os.setpriority(os.PRIO_PROCESS, pids_of(busy)[1], 5)
    assert busy.niceness() == 5


def test_freezing_reaches_the_child(busy: GuardedProcess) -> None:
    _, child = pids_of(busy)
    busy.freeze()
    assert Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    os.kill(child, signal.SIGCONT)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_a_public_launch_shows_no_path() -> None:
    launch = Launch("x", ["/a/b/bin/python", "--model", "/a/b"], {"DIR": "/a/b/c"})
    public = launch.public({"/a/b/bin/": "", "/a/b": "MODEL"})
    assert public == {"name": "x", "argv": ["python", "--model", "MODEL"], "env": {"DIR": "MODEL/c"}}


def test_longer_names_are_replaced_first() -> None:
    assert replace_all("/a/b/c", {"/a": "X", "/a/b": "Y"}) == "Y/c"
