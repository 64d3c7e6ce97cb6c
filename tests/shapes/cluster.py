"""A cluster of one prefill and one decode worker whose engines may be set up differently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from deploy.local import Cluster, Plan, UpSettings

MAX_TOKENS = 24
CHUNK = 128
"""Tokens of a prefill chunk: long prompts take several, so blocks leave their window meanwhile."""
HELD = (
    *("running", "waiting", "requests", "imports", "jobs", "dispatches", "loads"),
    *("staging_bytes", "leases", "pending", "import_blocks"),
)
"""Counters of a worker that are zero when it holds nothing."""


def rank_env(ranks: int) -> dict[str, str]:
    """Variables that an engine of so many tensor-parallel ranks needs: a core for each."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:ranks]))} if ranks > 1 else {}


@dataclass(frozen=True)
class Shape:
    """What an engine of each role looks like. ``plain``: arguments of the engine to compare with."""

    model: Callable[[], Any]
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    prefill_ranks: int = 1
    decode_ranks: int = 1
    plain: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cores(self) -> int:
        """Fewest cores that its engines start on."""
        return max(self.prefill_ranks, self.decode_ranks)

    def lacks(self) -> str:
        """What this machine is short of to run it; empty if nothing."""
        if len(os.sched_getaffinity(0)) < self.cores:
            return f"its engines need {self.cores} cores"
        if "fp8" in (*self.prefill, *self.decode) and "avx512f" not in Path("/proc/cpuinfo").read_text():
            return "vLLM's fp8 KV cache on a CPU needs AVX-512"
        return ""


class ShapeCluster(Cluster):
    """``braid up`` with flags and variables of their own for each role."""

    def __init__(self, shape: Shape, model: Path, run_dir: Path) -> None:
        settings = UpSettings(
            prefill=1,
            decode=1,
            port=0,
            model=str(model),
            served_model_name="tiny",
            chunk=CHUNK,
            max_model_len=1024,
            run_dir=run_dir,
            start_timeout_s=240,
            drain_s=2,
        )
        super().__init__(settings)
        self._shape = shape

    def plans(self, link: str) -> list[Plan]:
        shape = self._shape
        flags = {"prefill": shape.prefill, "decode": shape.decode}
        ranks = {"prefill": shape.prefill_ranks, "decode": shape.decode_ranks}
        found = []
        for plan in super().plans(link):
            if plan.role != "router":
                degree = ranks[plan.role]
                argv = (*plan.argv, *flags[plan.role], *("--tensor-parallel-size", str(degree)))
                plan = replace(plan, argv=argv, env={**plan.env, **rank_env(degree)})
            found.append(plan)
        return found

    def log(self, name: str) -> str:
        """All that a process has said."""
        return Path(self.children[name].log).read_text(errors="replace")


def plain_answers(model: Path, args: Mapping[str, Any], prompts: list[list[int]], folder: Path) -> list[Any]:
    """Greedy tokens of a plain engine for each prompt, and the gaps to the second best."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    spec = {"model": str(model), "args": dict(args), "prompts": prompts, "max_tokens": MAX_TOKENS}
    asked.write_text(json.dumps(spec))
    script = Path(__file__).with_name("plain_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(asked), str(answered)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[Any] = json.loads(answered.read_text())
    return answers


def workers(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """What the router knows of its workers, by name."""
    return {worker["worker"]: worker for worker in client.get("/cluster").json()["workers"]}


def idle(client: httpx.Client) -> bool:
    """Whether no worker holds anything: requests, imports, leases, blocks. False while one is being lost."""
    for worker in workers(client).values():
        try:
            stats = client.get(worker["http"] + "/stats").json()
        except httpx.TransportError:
            return False
        if any(stats.get(name, 0) for name in HELD) or stats["free"] != stats["blocks"] - 1:
            return False
    return True
