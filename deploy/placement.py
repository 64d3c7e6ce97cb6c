"""Which cores or GPU each engine of a local cluster gets."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

GPU_MEMORY_SHARE = 0.9
"""Share of a GPU's memory that the engines on it take together."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this process may use: CPU cores by number, and the number of GPUs."""

    cores: tuple[int, ...]
    gpus: int = 0

    @classmethod
    def here(cls) -> Hardware:
        return cls(tuple(sorted(os.sched_getaffinity(0))), count_gpus())


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one engine runs: environment variables and vLLM flags that put it there."""

    env: dict[str, str]
    flags: tuple[str, ...] = ()


def seats(hardware: Hardware, prefill: int, decode: int) -> list[Seat]:
    """A seat for each engine, the prefill workers' first."""
    if hardware.gpus:
        return _gpu_seats(hardware.gpus, prefill + decode)
    return [
        Seat({"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))})
        for cores in split_cores(hardware.cores, prefill, decode)
    ]


def decode_workers(hardware: Hardware, others: int) -> int:
    """How many decode workers to start beside ``others`` engines if nobody says: two, to spread groups over,
    where each engine has a GPU or a core of its own. Two that share a core generate a twentieth more than one
    (``benchmarks/results/fairness-20261122-*-clone.json``), and each makes the other's streams slower.
    """
    return 2 if others + 2 <= (hardware.gpus or len(hardware.cores)) else 1


def split_cores(cores: Sequence[int], prefill: int, decode: int) -> list[tuple[int, ...]]:
    """Cores for each engine, the prefill workers' first.

    With enough cores every engine has its own, in equal shares. With fewer, prefill keeps cores apart
    from decode as far as there are any: a long prompt then delays no stream of tokens.
    """
    engines = prefill + decode
    share = len(cores) // engines
    if share:
        return [tuple(cores[i * share : (i + 1) * share]) for i in range(engines)]
    if len(cores) == 1 or not decode or not prefill:
        return _round_robin(cores, engines)
    for_prefill = min(prefill, len(cores) - 1)
    return _round_robin(cores[:for_prefill], prefill) + _round_robin(cores[for_prefill:], decode)


def _round_robin(cores: Sequence[int], engines: int) -> list[tuple[int, ...]]:
    """One core for each engine, in turn."""
    return [(cores[i % len(cores)],) for i in range(engines)]


def count_gpus() -> int:
    """NVIDIA GPUs that ``nvidia-smi`` lists; 0 without it or with ``BRAID_FLAVOR=cpu``."""
    smi = shutil.which("nvidia-smi")
    if smi is None or os.environ.get("BRAID_FLAVOR") == "cpu":
        return 0
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _gpu_seats(gpus: int, engines: int) -> list[Seat]:
    """Engines over the GPUs in turn; those on one GPU share its memory."""
    found = []
    for i in range(engines):
        together = len(range(i % gpus, engines, gpus))
        share = GPU_MEMORY_SHARE / together
        found.append(
            Seat({"CUDA_VISIBLE_DEVICES": str(i % gpus)}, ("--gpu-memory-utilization", f"{share:.2f}"))
        )
    return found
