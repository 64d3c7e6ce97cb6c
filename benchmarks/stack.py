"""A serving stack under test: its processes, where it listens, and how it is put aside meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.process import GuardedProcess, LaunchError
from benchmarks.prometheus import totals

READY_TIMEOUT_S = 300.0
METRIC_PREFIXES = (
    "vllm:nixl_",
    "vllm:prefix_cache_",
    "vllm:external_prefix_cache_",
    "vllm:prompt_tokens",
    "braid_",
)


@dataclass(frozen=True)
class EngineSettings:
    """What every engine of every stack is given alike; cores are indexes, `kv_cache_gib` is per engine."""

    model: Path
    dtype: str = "float32"
    block_size: int = 32
    chunk_tokens: int = 512
    max_model_len: int = 8192
    kv_cache_gib: int = 1
    prefill_core: int = 0
    decode_core: int = 1

    def argv(self) -> list[str]:
        """The vLLM flags shared by every engine."""
        return [
            *("--model", str(self.model), "--served-model-name", "demo"),
            *("--dtype", self.dtype, "--block-size", str(self.block_size), "--enforce-eager"),
            *("--max-num-batched-tokens", str(self.chunk_tokens), "--max-model-len", str(self.max_model_len)),
        ]

    def env(self, core: int) -> dict[str, str]:
        """The environment of an engine whose model threads are bound to `core`."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }


@dataclass
class Stack:
    """Running processes that together answer OpenAI requests at `base_url`.

    `metrics` names each Prometheus page; `model` is known once the stack has been ready. The stack owns its
    processes: `stop()` ends them. It is frozen or running, and only a running one may be asked anything.
    """

    name: str
    base_url: str
    ready_path: str
    processes: list[GuardedProcess] = field(default_factory=list)
    metrics: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    def freeze(self) -> None:
        """Let the stack use no CPU until `thaw()`."""
        for process in self.processes:
            process.freeze()

    def thaw(self) -> None:
        """Undo `freeze()`; the stack may need a moment and a request or two until it is itself again."""
        for process in self.processes:
            process.thaw()

    def stop(self) -> None:
        """End every process, the front first. Idempotent."""
        for process in reversed(self.processes):
            process.stop()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when the stack answers, its model's name learnt; LaunchError as in `wait_until_ready`."""
        wait_until_ready(f"{self.base_url}{self.ready_path}", self.processes, timeout_s)
        if not self.model:
            models = (
                httpx.get(f"{self.base_url}/v1/models", trust_env=False, timeout=10.0)
                .raise_for_status()
                .json()
            )
            self.model = models["data"][0]["id"]

    def cpu_seconds(self) -> float:
        """CPU seconds used so far by all live processes of the stack."""
        return sum(process.cpu_seconds() for process in self.processes)

    def niceness(self) -> int:
        """The highest nice value of any process of the stack."""
        return max(process.niceness() for process in self.processes)

    def counters(self, prefixes: tuple[str, ...] = METRIC_PREFIXES) -> dict[str, float]:
        """Every counter of interest as `page/series`."""
        found: dict[str, float] = {}
        for page, url in self.metrics.items():
            text = httpx.get(url, trust_env=False, timeout=10.0).raise_for_status().text
            found |= {f"{page}/{name}": value for name, value in totals(text, prefixes).items()}
        return found

    def settled_counters(self, quiet_s: float = 0.6, timeout_s: float = 10.0) -> dict[str, float]:
        """`counters()` once they have stood still for `quiet_s`: engines publish some a step late."""
        deadline = time.monotonic() + timeout_s
        last = self.counters()
        while time.monotonic() < deadline:
            time.sleep(quiet_s)
            now = self.counters()
            if now == last:
                break
            last = now
        return last


Launcher = Callable[[], Stack]


def wait_until_ready(url: str, processes: list[GuardedProcess], timeout_s: float = READY_TIMEOUT_S) -> None:
    """Return when GET `url` answers 200; raise LaunchError when a process ends first or time is up."""
    deadline = time.monotonic() + timeout_s
    while not _answers(url):
        for process in processes:
            process.check_alive()
        if time.monotonic() > deadline:
            logs = "\n".join(process.tail() for process in processes)
            raise LaunchError(f"{url} was not ready within {timeout_s:.0f} s; {logs}")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
