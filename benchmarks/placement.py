"""Placement: how long a group takes under `pack`, `spread` and `auto`, by width and length of its prompt.

    python -m benchmarks.placement --repeats 7

A router and simulated workers of its own (1 prefill, 8 decode) for each policy and link; groups of k samples
over fresh prompts, one at a time, the policies in turn. Every engine time is modelled (`"simulated": true`):
the figures are of the policy, not of an engine. The links are fast (1 GB/s) and slow (50 MB/s).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.kept import keep
from benchmarks.machine import describe_machine
from benchmarks.sim_scale import Process

POLICIES = ("pack", "spread", "auto")
LINKS = {"fast": 1e9, "slow": 5e7}
NEAR = 1.15
"""What `auto` may take of the better one's time and still count as near it: timers here are coarse."""
START_S = 60.0


class Cell(msgspec.Struct):
    """Seconds of the groups of one width, prompt length and link, and decode workers used, by policy."""

    link: str
    k: int
    prompt_tokens: int
    seconds: dict[str, list[float]]
    workers: dict[str, list[int]]

    def median(self, policy: str) -> float:
        return statistics.median(self.seconds[policy])

    @property
    def ratio(self) -> float:
        """`auto` against the better of the others, medians."""
        return self.median("auto") / min(self.median("pack"), self.median("spread"))


def request(k: int, prompt_tokens: int, tokens: int, number: int) -> dict[str, Any]:
    """A group of ``k`` samples of ``tokens`` tokens, none to be spared, over a prompt of its own."""
    rng = random.Random(number)
    hint = f"{number:08d} [sim answer=7 accuracy=1 tokens={tokens}] "
    text = hint + "".join(rng.choice("abcdefgh ") for _ in range(max(0, 4 * prompt_tokens - len(hint))))
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": text}],
        "seed": number,
        "reasoning": {"strategy": "self_consistency", "n": k, "cot": False, "early_stop": False},
    }


class Stand:
    """A router with one policy, and its workers."""

    def __init__(self, policy: str, bandwidth: float, options: argparse.Namespace, folder: Path) -> None:
        link, keep = (
            f"ipc://{folder}/link",
            ["--log-level", "warning", "--heartbeat-misses", "40", "--drain-s", "1"],
        )
        self._port = folder / "port"
        router = ["--port", "0", "--port-file", str(self._port), "--link", link, "--spread", policy]
        sim = ["--router", link, "--worker", "sim", "--prefill", "1", "--decode", str(options.decode)]
        sim += [
            "--sim-bandwidth",
            str(bandwidth),
            "--sim-sigma",
            "0",
            "--sim-time-scale",
            str(options.time_scale),
        ]
        sim += ["--sim-max-model-len", "8192"]
        speed = ["--kv-bandwidth", str(bandwidth / options.time_scale)]
        self._processes = [
            Process(["router", *router, *speed, *keep], folder / "router.log"),
            Process(["sim", *sim, *keep], folder / "sim.log"),
        ]

    async def client(self, pairs: int) -> httpx.AsyncClient:
        """One whose router has verified all pairs."""
        until = time.monotonic() + START_S
        while not self._port.exists():
            await self._wait(until)
        url = f"http://127.0.0.1:{self._port.read_text().strip()}"
        client = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)
        while sum(p["verified"] for p in (await client.get("/cluster")).json()["pairs"]) < pairs:
            await self._wait(until)
        return client

    async def _wait(self, until: float) -> None:
        if time.monotonic() > until or not all(process.alive for process in self._processes):
            raise RuntimeError("the stand did not start")
        await asyncio.sleep(0.1)

    def stop(self) -> None:
        for process in self._processes:
            process.stop()


async def measure(
    clients: dict[str, httpx.AsyncClient], link: str, options: argparse.Namespace
) -> list[Cell]:
    """All cells of a link, the policies in turn; what they learn and measure comes from warm-up groups."""
    number = random.SystemRandom().randrange(10**7)
    cells = []
    for client in clients.values():
        for k in (1, 16, 4, 32):
            number += 1
            (
                await client.post("/v1/chat/completions", json=request(k, 256, options.tokens, number))
            ).raise_for_status()
        await asyncio.sleep(1.2)  # two heartbeats carry the step times
    for k in options.k:
        for prompt in options.prompt:
            cell = Cell(link, k, prompt, {p: [] for p in clients}, {p: [] for p in clients})
            for _ in range(options.repeats):
                for policy, client in clients.items():
                    number += 1
                    began = time.perf_counter()
                    reply = await client.post(
                        "/v1/chat/completions", json=request(k, prompt, options.tokens, number)
                    )
                    cell.seconds[policy].append(time.perf_counter() - began)
                    cell.workers[policy].append(len(reply.raise_for_status().json()["braid"]["decode"]))
            cells.append(cell)
            show(cell)
    return cells


def show(cell: Cell) -> None:
    told = ", ".join(
        f"{p} {1000 * cell.median(p):.0f} ms on {statistics.median(cell.workers[p]):g}" for p in cell.seconds
    )
    print(
        f"{cell.link} k={cell.k} prompt={cell.prompt_tokens}: {told}; auto/best {cell.ratio:.2f}", flush=True
    )


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns its result."""
    cells: list[Cell] = []
    for link, bandwidth in LINKS.items():
        async with contextlib.AsyncExitStack() as stack:
            clients = {}
            for policy in POLICIES:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="braid-place-")))
                stand = Stand(policy, bandwidth, options, folder)
                stack.callback(stand.stop)
                clients[policy] = await stand.client(options.decode)
                stack.push_async_callback(clients[policy].aclose)
            cells += await measure(clients, link, options)
    return {
        "benchmark": "placement",
        "simulated": True,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "links_bytes_per_s": LINKS,
        "machine": describe_machine(),
        "worst_ratio": max(cell.ratio for cell in cells),
        "near": sum(cell.ratio <= NEAR for cell in cells),
        "cells": [
            msgspec.to_builtins(cell)
            | {"median_s": {p: cell.median(p) for p in POLICIES}, "auto_to_best": cell.ratio}
            for cell in cells
        ],
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__.splitlines()[0])
    made.add_argument("--decode", type=int, default=8, help="decode workers")
    made.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="samples of a group")
    made.add_argument(
        "--prompt", type=int, nargs="+", default=[64, 512, 2048, 6000], help="tokens of prompts"
    )
    made.add_argument("--tokens", type=int, default=48, help="tokens of a sample")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--time-scale", type=float, default=1.0, help="seconds that a simulated second takes")
    made.add_argument("--out", type=Path, help="where the result goes (default benchmarks/results)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    found = asyncio.run(run(options))
    out = keep(found, "placement", options.out)
    print(f"auto is within {NEAR:g} of the better one in {found['near']} of {len(found['cells'])} cells")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
