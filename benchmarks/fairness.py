"""Single requests beside groups of 64 on a running server: what each costs the other.

    python -m benchmarks.fairness --url http://127.0.0.1:8000

takes turns, several times over: single short requests alone at a fixed rate, four groups of 64 kept running
alone, and both together. It reports the singles' p50 and p99 latency alone and beside the groups, and the
tokens a second of the groups' ended samples with and without the singles.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.kept import keep, show
from benchmarks.load import open_client, served_model
from benchmarks.machine import describe_machine
from benchmarks.stats import percentile, summary
from braid.lines import alines
from demo.tasks import make_problem

PHASES = ("alone", "groups", "together")


class Phase(msgspec.Struct):
    """One turn. ``latencies``: of the single requests; ``tokens``: of samples of groups that ended in it."""

    name: str
    seconds: float
    latencies: list[float] = []
    tokens: int = 0
    errors: int = 0


class Bench:
    """Sends both kinds of requests to one server."""

    def __init__(self, client: httpx.AsyncClient, model: str, options: argparse.Namespace) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._numbers = itertools.count()

    async def turn(self, name: str) -> Phase:
        """One phase. Groups run for a while before it counts; what runs at its end is cancelled."""
        phase = Phase(name, self._options.seconds)
        async with contextlib.AsyncExitStack() as stack:
            if name != "alone":
                await stack.enter_async_context(self._groups(phase))
                await self._singles(None, self._options.warm_s, name == "together")
                phase.tokens = 0
            begun = time.monotonic()
            await self._singles(phase, self._options.seconds, name != "groups")
            phase.seconds = time.monotonic() - begun
        await asyncio.sleep(self._options.rest_s)
        return phase

    async def _singles(self, phase: Phase | None, seconds: float, send: bool) -> None:
        """Single requests at the rate, until the time is over and each has its reply."""
        start = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(round(seconds * self._options.rate)):
                await asyncio.sleep(max(0.0, start + number / self._options.rate - time.monotonic()))
                if send:
                    tasks.create_task(self._single(phase))
            await asyncio.sleep(max(0.0, start + seconds - time.monotonic()))

    async def _single(self, phase: Phase | None) -> None:
        body = self._body(self._options.single_tokens)
        begun = time.monotonic()
        reply = await self._client.post("/v1/chat/completions", json=body)
        if phase is not None:
            phase.latencies.append(time.monotonic() - begun)
            phase.errors += reply.status_code != httpx.codes.OK

    @contextlib.asynccontextmanager
    async def _groups(self, phase: Phase) -> Any:
        """Keep groups running inside the block."""
        tasks = [asyncio.create_task(self._keep(phase)) for _ in range(self._options.groups)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, phase: Phase) -> None:
        while True:
            body = self._body(self._options.group_tokens) | {
                "stream": True,
                "reasoning": {"strategy": "self_consistency", "n": self._options.n, "early_stop": False},
            }
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
                phase.errors += reply.status_code != httpx.codes.OK
                async for line in alines(reply.aiter_bytes()):
                    phase.tokens += tokens_in(line)

    def _body(self, tokens: int) -> dict[str, Any]:
        question = make_problem("test", self._options.seed, next(self._numbers)).question
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 1.0,
        }


def tokens_in(line: str) -> int:
    """Tokens of the ended sample that an event of a group's stream tells of; 0 if it is no such event."""
    if not line.startswith("data: {"):
        return 0
    told = msgspec.json.decode(line.removeprefix("data: ")).get("reasoning") or {}
    return int(told.get("tokens", 0)) if told.get("event") == "sample" else 0


def figures(phases: Sequence[Phase]) -> dict[str, Any]:
    """What a run shows: the singles' latency, pooled over the repeats, and the groups' throughput."""
    pooled = {
        name: sorted(value for phase in phases if phase.name == name for value in phase.latencies)
        for name in ("alone", "together")
    }
    p99 = {name: percentile(values, 0.99) for name, values in pooled.items()}
    rates = {
        name: [phase.tokens / phase.seconds for phase in phases if phase.name == name]
        for name in ("groups", "together")
    }
    rate = {name: sum(values) / len(values) for name, values in rates.items()}
    return {
        "singles_s": {name: {**summary(values), "p99": p99[name]} for name, values in pooled.items()},
        "p50_ratio": percentile(pooled["together"], 0.5) / percentile(pooled["alone"], 0.5),
        "p99_ratio": p99["together"] / p99["alone"],
        "groups_tokens_per_s": rate,
        "groups_keep": rate["together"] / rate["groups"] if rate["groups"] else None,
        "errors": sum(phase.errors for phase in phases),
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; returns its result."""
    async with open_client(options.url, 512) as client:
        model = await served_model(client)
        name = str(model["id"])
        bench = Bench(client, name, options)
        await bench._singles(None, 2.0, send=True)  # caches and kernels are warm
        phases = []
        for repeat in range(options.repeats):
            order = PHASES if repeat % 2 == 0 else PHASES[::-1]
            phases += [await bench.turn(phase) for phase in order]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "url")}
    return {
        "benchmark": "fairness",
        "simulated": name.startswith("sim"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "settings": settings,
        "machine": describe_machine(),
        **figures(phases),
        "phases": msgspec.to_builtins(phases),
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__.splitlines()[0])
    made.add_argument("--url", default="http://127.0.0.1:8000")
    made.add_argument("--rate", type=float, default=2.0, help="single requests a second")
    made.add_argument("--seconds", type=float, default=15.0, help="of each phase")
    made.add_argument("--warm-s", type=float, default=3.0, help="that groups run before a phase counts")
    made.add_argument("--rest-s", type=float, default=1.0, help="between phases")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--groups", type=int, default=4, help="kept running")
    made.add_argument("--n", type=int, default=64, help="samples of a group")
    made.add_argument("--single-tokens", type=int, default=32)
    made.add_argument("--group-tokens", type=int, default=96)
    made.add_argument("--note", default="", help="goes into the result: how the server was started")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="where the result goes (default benchmarks/results)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    found = asyncio.run(run(options))
    keep(found, "fairness", options.out)
    show(found, ("phases", "machine", "settings"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
