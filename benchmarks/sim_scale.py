"""A real router and a fleet of simulated workers: placement, fairness and deadlines at 64 workers.

    python -m benchmarks.sim_scale

starts a router process and a process with 8 prefill and 64 decode workers, all simulated, sends 1,000 groups
of mixed widths and lengths, and reports what clients saw, how the work was spread, how deadlines were kept,
and what the router cost; then the single requests among them once more on a fresh fleet, alone. What it
measures of the router is real; every engine time is modelled and every answer made up, and the result says so
(`"simulated": true`). Figures hold only while the simulation keeps pace: `lag_s` and `lost_s` tell.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.kept import keep, show
from benchmarks.machine import describe_machine
from benchmarks.stats import percentile, summary

START_S = 120.0
MAX_LOST_S = 0.05
"""Simulated time that any worker may fall behind before the run says nothing about its model."""
GRACE_S = 15.0
_TICKS = os.sysconf("SC_CLK_TCK")
_WORDS = ("eggs", "boxes", "trays", "crates", "rows", "shelves", "carts", "doors", "coins", "cards")


class Ask(msgspec.Struct, frozen=True):
    """One group: ``n`` samples of about ``tokens`` tokens over a prompt of about ``prompt`` tokens, ``at``
    seconds after the start; ``deadline_s`` 0: none."""

    at: float
    n: int
    tokens: int
    prompt: int
    deadline_s: float


class Outcome(msgspec.Struct):
    """What its client saw. ``late_s``: seconds after the deadline at which the reply came."""

    ask: Ask
    status: int
    seconds: float
    stopped: str = ""
    right: bool = False
    finished: int = 0
    tokens: int = 0
    path: str = ""
    late_s: float = 0.0
    workers: list[str] = []


def plan(groups: int, rate: float, seed: int) -> list[Ask]:
    """Groups at random times (Poisson): mostly narrow, a few of 64; one in five has a deadline."""
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(groups):
        at += rng.expovariate(rate)
        n = rng.choices((1, 4, 8, 16, 64), (40, 25, 20, 12, 3))[0]
        tokens = round(min(400.0, max(8.0, rng.lognormvariate(3.9, 0.6))))
        prompt = rng.choice((64, 256, 512, 1024, 2048))
        deadline = rng.choice((0.5, 1.0, 2.0, 5.0)) if rng.random() < 0.2 else 0.0
        found.append(Ask(at, n, tokens, prompt, deadline))
    return found


def body(ask: Ask, number: int) -> dict[str, Any]:
    """The request of a group: a vote whose right answer is its number."""
    rng = random.Random(number)
    hint = f"[sim answer={number} accuracy=0.7 tokens={ask.tokens}]"
    words = " ".join(rng.choice(_WORDS) for _ in range(ask.prompt * 4 // 6))
    strategy: dict[str, Any] = {"strategy": "self_consistency" if ask.n > 1 else "direct", "n": ask.n}
    if ask.deadline_s:
        strategy["deadline_s"] = ask.deadline_s
    text = f"{number} {hint} {words}"
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": text}],
        "seed": number,
        "reasoning": strategy,
    }


async def send(client: httpx.AsyncClient, ask: Ask, number: int, start: float) -> Outcome:
    """One group at its time."""
    await asyncio.sleep(max(0.0, start + ask.at - time.monotonic()))
    begun = time.monotonic()
    try:
        reply = await client.post("/v1/chat/completions", json=body(ask, number))
    except httpx.HTTPError:
        return Outcome(ask, 0, time.monotonic() - begun)
    seconds = time.monotonic() - begun
    outcome = Outcome(ask, reply.status_code, seconds)
    outcome.late_s = max(0.0, seconds - ask.deadline_s) if ask.deadline_s else 0.0
    if reply.status_code == 200:
        _read(outcome, reply.json(), number)
    return outcome


def _read(outcome: Outcome, told: dict[str, Any], number: int) -> None:
    report = told.get("reasoning") or {}
    samples = report.get("samples") or []
    outcome.stopped = str(report.get("stopped_early") or "")
    text = told["choices"][0]["message"]["content"]
    outcome.right = bool(re.search(rf"The answer is {number}\.", text))
    outcome.finished = sum(sample["state"] == "finished" for sample in samples)
    outcome.tokens = told["usage"]["completion_tokens"]
    proof = told.get("braid") or {}
    outcome.path = str(proof.get("path") or "")
    outcome.workers = list(proof.get("decode") or {})


class Process:
    """A child process, ended with the block; its CPU seconds are read from the kernel."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log.open("wb")
        command = [sys.executable, "-m", "braid", *arguments]
        self._child = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def stop(self) -> None:
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()


class Stand:
    """A router and its simulated workers."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.port_file = folder / "port"
        link = f"ipc://{folder}/link"
        keep = ["--drain-s", "1", "--log-level", "warning", "--heartbeat-misses", "20"]
        router = [
            "--port",
            "0",
            "--port-file",
            str(self.port_file),
            "--link",
            link,
            "--spread",
            options.spread,
        ]
        router += ["--max-inflight", "100000", "--queue-limit", "100000", "--queue-timeout-s", "300"]
        if options.trust_pairs:
            router.append("--no-verify-pairs")
        workers = ["--router", link, "--prefill", str(options.prefill), "--decode", str(options.decode)]
        workers += ["--sim-time-scale", str(options.time_scale), "--worker", "sim"]
        if options.model_file:
            workers += ["--sim-model-file", str(options.model_file)]
        self.workers = options.prefill + options.decode
        self.verified = not options.trust_pairs
        self.router = Process(["router", *router, *keep], folder / "router.log")
        self.sim = Process(["sim", *workers, *keep], folder / "sim.log")

    def url(self) -> str:
        """The router's, once it listens."""
        until = time.monotonic() + START_S
        while not self.port_file.exists():
            self._check(until)
            time.sleep(0.05)
        return f"http://127.0.0.1:{self.port_file.read_text().strip()}"

    async def ready(self, client: httpx.AsyncClient) -> dict[str, Any]:
        """Wait until every worker has registered and every pair is usable; returns the cluster's state."""
        until = time.monotonic() + START_S
        while True:
            state: dict[str, Any] = (await client.get("/cluster")).json()
            unproven = any(not pair["verified"] for pair in state["pairs"])
            if len(state["workers"]) == self.workers and not (unproven and self.verified):
                return state
            self._check(until)
            await asyncio.sleep(0.2)

    def _check(self, until: float) -> None:
        if not (self.router.alive and self.sim.alive) or time.monotonic() > until:
            logs = [(self.folder / name).read_text()[-500:] for name in ("router.log", "sim.log")]
            raise RuntimeError("the stand did not start:\n" + "\n".join(logs))

    def stop(self) -> None:
        self.router.stop()
        self.sim.stop()


@contextlib.contextmanager
def stand(options: argparse.Namespace) -> Iterator[Stand]:
    with tempfile.TemporaryDirectory(prefix="braid-sim-") as folder:
        running = Stand(options, Path(folder))
        try:
            yield running
        finally:
            running.stop()


def singles(asks: Sequence[Ask]) -> list[Ask]:
    """The single requests, at the times that they have among the others."""
    return [ask for ask in asks if ask.n == 1]


def fairness(together: Sequence[Outcome], alone: Sequence[Outcome]) -> dict[str, Any]:
    """What single requests without a deadline wait longer for the groups beside them."""
    found: dict[str, Any] = {}
    for name, outcomes in (("alone", alone), ("together", together)):
        taken = sorted(
            o.seconds for o in outcomes if o.ask.n == 1 and not o.ask.deadline_s and o.status == 200
        )
        found[name] = {**summary(taken), "p99": percentile(taken, 0.99)}
    ratios = {f"{q}_ratio": found["together"][q] / found["alone"][q] for q in ("p50", "p99")}
    return found | ratios


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns its result."""
    asks = plan(options.groups, options.rate, options.seed)
    outcomes, measured = await pass_of(options, asks)
    alone, _ = await pass_of(options, singles(asks))
    found = result(options, outcomes, *measured)
    return found | {"fairness": fairness(outcomes, alone)}


async def pass_of(options: argparse.Namespace, asks: Sequence[Ask]) -> tuple[list[Outcome], Any]:
    """All of ``asks`` on a fresh fleet: what their clients saw, and what else :func:`result` takes."""
    with stand(options) as running:
        url = running.url()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:
            state = await running.ready(client)
            before = running.router.cpu_s(), running.sim.cpu_s(), await counters(client)
            start = time.monotonic()
            outcomes = await asyncio.gather(*(send(client, a, i, start) for i, a in enumerate(asks, 1000)))
            wall = time.monotonic() - start
            cpu = running.router.cpu_s() - before[0], running.sim.cpu_s() - before[1]
            after = await counters(client)
        pace = await _pace(state["workers"][0]["http"])
    counted = {name: value - before[2].get(name, 0.0) for name, value in after.items()}
    return outcomes, (wall, cpu, counted, pace)


async def counters(client: httpx.AsyncClient) -> dict[str, float]:
    """The router's own counters, summed over their labels."""
    found: dict[str, float] = {}
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("braid_") and "_total" in line:
            name, value = line.rsplit(" ", 1)
            found[name] = found.get(name, 0.0) + float(value)
    return found


async def _pace(url: str) -> dict[str, Any]:
    """How well the simulation kept up, and what each worker did."""
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        workers = (await client.get(f"{url}/stats")).json()["workers"]
    decode = {name: stats for name, stats in workers.items() if stats["role"] == "decode"}
    return {
        "lag_s": max(stats["lag_s"] for stats in workers.values()),
        "lost_s": max(stats["lost_s"] for stats in workers.values()),
        "steps": sum(stats["steps"] for stats in workers.values()),
        "preempted": sum(stats["preempted"] for stats in decode.values()),
        "busy_s": {name: stats["busy_s"] for name, stats in decode.items()},
    }


def result(
    options: argparse.Namespace,
    outcomes: Sequence[Outcome],
    wall: float,
    cpu: tuple[float, float],
    counted: dict[str, float],
    pace: dict[str, Any],
) -> dict[str, Any]:
    """Figures of a run."""
    answered = [o for o in outcomes if o.status == 200]
    busy = sorted(pace["busy_s"].values())
    mean = sum(busy) / len(busy)
    groups = len(outcomes)
    return {
        "benchmark": "sim_scale",
        "simulated": True,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "machine": describe_machine(),
        "wall_s": wall,
        "statuses": dict(Counter(str(o.status) for o in outcomes)),
        "paths": dict(Counter(o.path for o in answered)),
        "latency_s": _latencies(answered),
        "samples": sum(o.ask.n for o in answered),
        "tokens": sum(o.tokens for o in answered),
        "right": sum(o.right for o in answered) / max(1, len(answered)),
        "deadlines": _deadlines(outcomes),
        "placement": {
            "groups_per_worker": summary(_counts(answered, options.decode)),
            "busy_share": summary([b * options.time_scale / wall for b in busy]),
            "imbalance": busy[-1] / mean if mean else 0.0,
        },
        "router": {
            "cpu_s": cpu[0],
            "cpu_ms_per_group": 1000 * cpu[0] / groups,
            "cores": cpu[0] / wall,
            "groups_per_s": groups / wall,
        },
        "simulation": {
            "kept_pace": pace["lost_s"] <= MAX_LOST_S,
            "cpu_s": cpu[1],
            "lag_s": pace["lag_s"],
            "lost_s": pace["lost_s"],
            "steps": pace["steps"],
        },
        "preempted": pace["preempted"],
        "counters": counted,
        "outcomes": msgspec.to_builtins(list(outcomes)),
    }


def _counts(answered: Sequence[Outcome], workers: int) -> list[float]:
    used = Counter(name for outcome in answered for name in outcome.workers)
    return [float(v) for v in used.values()] + [0.0] * (workers - len(used))


def _latencies(answered: Sequence[Outcome]) -> dict[str, Any]:
    found = {}
    for n in sorted({o.ask.n for o in answered}):
        taken = sorted(o.seconds for o in answered if o.ask.n == n and not o.ask.deadline_s)
        if taken:
            found[f"n={n}"] = {**summary(taken), "p99": percentile(taken, 0.99)}
    return found


def _deadlines(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    bound = [o for o in outcomes if o.ask.deadline_s]
    late = sorted(o.late_s for o in bound)
    return {
        "groups": len(bound),
        "within_100_ms": sum(value <= 0.1 for value in late),
        "latest_s": late[-1] if late else 0.0,
        "answered": sum(o.status == 200 for o in bound),
        "ended_by_deadline": sum(o.stopped == "deadline" for o in bound),
        "statuses": dict(Counter(str(o.status) for o in bound)),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.sim_scale", description=__doc__.splitlines()[0])
    made.add_argument("--groups", type=int, default=1000)
    made.add_argument("--rate", type=float, default=40.0, help="groups a second (Poisson)")
    made.add_argument("--prefill", type=int, default=8)
    made.add_argument("--decode", type=int, default=64)
    made.add_argument(
        "--spread", choices=("pack", "spread", "auto"), default="pack", help="the router's placement"
    )
    made.add_argument("--time-scale", type=float, default=1.0, help="seconds that a simulated second takes")
    made.add_argument("--model-file", type=Path, help="step times, as benchmarks.fit_sim writes them")
    made.add_argument(
        "--trust-pairs", action="store_true", help="start without a transfer between every pair"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="where the result goes (default benchmarks/results)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    found = asyncio.run(run(options))
    out = keep(found, "sim-scale", options.out)
    show(found, ("outcomes", "counters", "machine", "settings"))
    print(f"written to {out}")
    if not found["simulation"]["kept_pace"]:
        print("the machine was too slow for this run: lower --rate or raise --time-scale", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
