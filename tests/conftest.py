"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """The test run ends every process it started."""
    before = _children()
    yield
    left = {pid: name for pid, name in _children().items() if pid not in before}
    assert not left, f"processes left behind: {left}"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own ``BRAID_*`` and ``OTEL_*`` variables change no test."""
    for name in list(os.environ):
        if name.startswith(("BRAID_", "OTEL_")):
            monkeypatch.delenv(name)


def _children() -> dict[int, str]:
    """Live children of this process; Python's own helpers for shared memory are not counted."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, name, state, parent = _parse(stat.read_text())
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and state != "Z" and "multiprocessing.resource_tracker" not in command:
            found[pid] = name
    return found


def _parse(stat: str) -> tuple[int, str, str, int]:
    """Process id, name, state and parent of a ``/proc/PID/stat`` line."""
    pid, rest = stat.split(" (", 1)
    name, rest = rest.rsplit(") ", 1)
    state, parent = rest.split()[:2]
    return int(pid), name, state, int(parent)
