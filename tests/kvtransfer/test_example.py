"""The library without the rest of Braid, as its example shows."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "kvtransfer.example", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "zmq", "collective"])
def test_blocks_reach_another_process(transport: str) -> None:
    ran = run(transport)
    assert ran.returncode == 0, ran.stderr
    assert f"transport='{transport}'" in ran.stdout
    assert "reason='done'" in ran.stdout


def test_what_is_wrong_is_said() -> None:
    ran = run("pigeon")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "usage: python -m kvtransfer.example [shm" in ran.stderr
