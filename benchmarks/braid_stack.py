"""Braid as a stack under test: `braid up` with one prefill and one decode worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.plain import ready_or_stopped
from benchmarks.process import GuardedProcess, Launch, free_ports
from benchmarks.stack import EngineSettings, Stack

ROOT = Path(__file__).resolve().parents[1]


def launch_braid(
    settings: EngineSettings, python: str, run_dir: Path, extra: Sequence[str] = (), **env: str
) -> Stack:
    """Start a cluster of one prefill and one decode worker and return when GET /ready answers 200.

    `extra` is appended to the command and `env` added to the environment, for settings of a Braid that differ
    from the ones given here.
    """
    (port,) = free_ports(1)
    cluster_dir = run_dir / "braid"
    cluster_dir.mkdir(exist_ok=True)
    argv = [
        *(python, "-m", "braid", "up", "--prefill", "1", "--decode", "1", "--port", str(port)),
        *("--model", str(settings.model), "--served-model-name", "demo", "--run-dir", str(cluster_dir)),
        *("--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)),
        *("--chunk", str(settings.chunk_tokens), "--kv-cache-gib", str(settings.kv_cache_gib)),
        *("--engine-nice", "0"),  # as every other stack's
        *extra,
    ]
    launch = Launch("braid", argv, {**braid_env(settings), **env})
    url = f"http://127.0.0.1:{port}"
    stack = ready_or_stopped(Stack("braid", url, "/ready", [GuardedProcess(launch, run_dir)]))
    stack.metrics = pages(url)
    return stack


def pages(url: str) -> dict[str, str]:
    """Metrics pages of the router at `url` and of its workers, by role."""
    workers = httpx.get(f"{url}/cluster", trust_env=False, timeout=10.0).raise_for_status().json()["workers"]
    return {"router": f"{url}/metrics"} | {w["role"]: f"{w['http']}/metrics" for w in workers}


def braid_env(settings: EngineSettings) -> dict[str, str]:
    """What `braid up` has no flag for; it gives its first worker the first core, and so on."""
    return {"PYTHONPATH": str(ROOT), "BRAID_BLOCK_SIZE": str(settings.block_size)}
