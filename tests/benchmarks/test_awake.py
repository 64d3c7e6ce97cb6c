"""Cores that are kept from halting."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import awake, guard
from benchmarks.process import GuardedProcess, Launch

START_S = 20.0


@pytest.fixture
def process(tmp_path: Path) -> Iterator[GuardedProcess]:
    process = GuardedProcess(Launch("awake", [sys.executable, "-S", awake.__file__]), tmp_path)
    yield process
    process.stop()


def keepers(process: GuardedProcess) -> list[int]:
    """Its processes, once there is one for each core."""
    deadline, found = time.monotonic() + START_S, list[int]()
    while len(found) < len(os.sched_getaffinity(0)):
        assert time.monotonic() < deadline, process.tail()
        found = [pid for pid in guard.descendants(process._guard.pid) if idle(pid)]
    return found


def idle(pid: int) -> bool:
    """Whether a process runs only when nothing else wants to."""
    try:
        return os.sched_getscheduler(pid) == os.SCHED_IDLE
    except ProcessLookupError:
        return False


def test_each_core_has_a_process_that_runs_when_nothing_else_wants_to(process: GuardedProcess) -> None:
    cores = [os.sched_getaffinity(pid) for pid in keepers(process)]
    assert sorted(core for of_one in cores for core in of_one) == sorted(os.sched_getaffinity(0))


def test_nothing_is_left_of_them(process: GuardedProcess) -> None:
    found = keepers(process)
    process.stop()
    assert not any(map(idle, found))
