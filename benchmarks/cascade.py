"""Cascade against the large model alone: accuracy, tokens of each model, and cost, on real engines.

    python -m benchmarks.cascade --count 200

Starts a cluster of its own with both demo models (or takes --url). On the calibration split each model
answers every problem, which tells for each threshold what a cascade would answer and cost; of each way to
judge an answer the cheapest threshold is taken that loses at most --slack of the answers there. The router's
own check of arithmetic needs none: an answer passes if its equations hold. The cascades then run on the test
split, in turns with the large and the small model alone. Cost is parameters x generated tokens, and seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.kept import keep
from benchmarks.machine import describe_machine
from braid.evaluate.figures import SOURCES, difference, mcnemar, wilson
from demo import tasks
from demo.evaluate import extract

SMALL, LARGE = "demo-small", "demo"
PARAMETERS = {SMALL: 760_832, LARGE: 3_290_624}
JUDGED = {"margin": ("margin", 1), "agreement of 2": ("agreement", 2), "agreement of 4": ("agreement", 4)}
"""Ways to judge the small model's answer that have a threshold to find: the option `by`, and its samples."""
CHECKED = "arithmetic"
"""A verifier of every router: the share of an answer's equations that hold."""


class Outcome(msgspec.Struct):
    """One problem under one method. ``tokens``: generated, by model; ``score``: what the small model's answer
    would be judged by; ``accepted``: whether a cascade kept it."""

    right: bool
    seconds: float
    tokens: dict[str, int]
    score: float = 0.0
    accepted: bool = False

    @property
    def cost(self) -> int:
        """Parameters x tokens."""
        return sum(PARAMETERS[name] * count for name, count in self.tokens.items())


def alone(model: str) -> dict[str, Any]:
    """One greedy worked answer."""
    return {"model": model, "temperature": 0, "reasoning": {"strategy": "cot"}}


def judged_alone(way: str) -> dict[str, Any]:
    """What a cascade asks of the small model."""
    by, n = JUDGED[way]
    if by == "margin":
        return alone(SMALL)
    return {"model": SMALL, "reasoning": {"strategy": "self_consistency", "n": n, "early_stop": False}}


def cascade(way: str, threshold: float) -> dict[str, Any]:
    by, n = JUDGED.get(way, (way, 1))
    options = {"strategy": "cascade", "models": [SMALL, LARGE], "n": n, "by": by, "threshold": threshold}
    return {"model": LARGE, "reasoning": options}


async def ask(client: httpx.AsyncClient, body: dict[str, Any], problem: tasks.Problem, seed: int) -> Outcome:
    chat = {"messages": [{"role": "user", "content": problem.question}], "max_tokens": 160, "seed": seed}
    began = time.perf_counter()
    reply = (await client.post("/v1/chat/completions", json={**chat, **body})).raise_for_status().json()
    seconds = time.perf_counter() - began
    report = reply["reasoning"]
    right = extract(reply["choices"][0]["message"]["content"]) == problem.answer
    if levels := report.get("models"):
        tokens = {level["model"]: level["tokens"] for level in levels}
        return Outcome(right, seconds, tokens, accepted=report["model"] == SMALL)
    score = math.exp(report["samples"][0]["mean_logprob"] or -math.inf)
    if report["strategy"] == "self_consistency":
        score = report["votes"][0]["votes"] / report["n"] if report["votes"] else 0.0
    return Outcome(right, seconds, {body["model"]: reply["usage"]["completion_tokens"]}, score)


async def run(
    client: httpx.AsyncClient, body: dict[str, Any], problems: Sequence[tasks.Problem], width: int
) -> tuple[list[Outcome], float]:
    """Every problem, ``width`` at a time: the outcomes in order, and the seconds of it all."""
    gate = asyncio.Semaphore(width)

    async def one(number: int, problem: tasks.Problem) -> Outcome:
        async with gate:
            return await ask(client, body, problem, number)

    began = time.perf_counter()
    outcomes = await asyncio.gather(*(one(i, problem) for i, problem in enumerate(problems)))
    return list(outcomes), time.perf_counter() - began


def calibrate(small: Sequence[Outcome], large: Sequence[Outcome], slack: float = 0.0) -> dict[str, Any]:
    """The cheapest threshold at which a cascade has no fewer right than the large model alone, but for
    ``slack`` of all problems; 1 where there is none."""
    pairs = list(zip(small, large, strict=True))
    least = sum(one.right for one in large)
    found: dict[str, Any] = {"threshold": 1.0, "cost": math.inf, "right": None}
    for threshold in sorted({one.score for one in small}):
        right = sum(s.right if s.score >= threshold else b.right for s, b in pairs)
        cost = sum(s.cost + (0 if s.score >= threshold else b.cost) for s, b in pairs)
        if right >= least - slack * len(pairs) and cost < found["cost"]:
            found = {"threshold": threshold, "cost": cost, "right": right}
    cost = found.pop("cost")
    share = cost / sum(one.cost for one in large) if cost < math.inf else None
    return {**found, "right_alone": least, "cost_share": share, "problems": len(pairs)}


def figures(outcomes: Sequence[Outcome], base: Sequence[Outcome], wall_s: Sequence[float]) -> dict[str, Any]:
    """What a method came to, and against the large model alone on the same problems."""
    right = sum(one.right for one in outcomes)
    table = [0, 0, 0, 0]
    for one, other in zip(outcomes, base, strict=True):
        table[(0 if other.right else 1) if one.right else (2 if other.right else 3)] += 1
    both, own, others, neither = table
    return {
        "right": right,
        "accuracy": right / len(outcomes),
        "accuracy_ci95": wilson(right, len(outcomes)),
        "tokens": {m: sum(one.tokens.get(m, 0) for one in outcomes) for m in PARAMETERS},
        "accepted": sum(one.accepted for one in outcomes),
        "parameter_tokens": sum(one.cost for one in outcomes),
        "cost_share": sum(one.cost for one in outcomes) / sum(one.cost for one in base),
        "wall_s": list(wall_s),
        "p50_s": statistics.median(one.seconds for one in outcomes),
        "difference_ci95": difference(both, own, others, neither),
        "mcnemar_p": mcnemar(own, others),
    }


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, then run every method on blocks of the test problems in turn."""
    learn = list(tasks.problems("calibration", 0, options.calibrate))
    test = list(tasks.problems("test", 0, options.count))
    blocks = [test[i : i + options.block] for i in range(0, len(test), options.block)]
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        large, _ = await run(client, alone(LARGE), learn, options.width)
        chosen = {}
        for way in JUDGED:
            small, _ = await run(client, judged_alone(way), learn, options.width)
            chosen[way] = calibrate(small, large, options.slack)
        methods = {f"{model} alone, greedy": alone(model) for model in (LARGE, SMALL)}
        methods[f"cascade by {CHECKED}"] = cascade(CHECKED, 1.0)
        methods |= {f"cascade by {way}": cascade(way, chosen[way]["threshold"]) for way in JUDGED}
        outcomes: dict[str, list[Outcome]] = {name: [] for name in methods}
        walls: dict[str, list[float]] = {name: [] for name in methods}
        for turn, block in enumerate(blocks):
            names = list(methods)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found, wall_s = await run(client, methods[name], block, options.width)
                outcomes[name] += found
                walls[name].append(wall_s)
    base = outcomes[f"{LARGE} alone, greedy"]
    told = {name: figures(outcomes[name], base, walls[name]) for name in methods}
    single = {name: [msgspec.to_builtins(one) for one in found] for name, found in outcomes.items()}
    return {"calibration": chosen, "methods": told, "requests": methods, "outcomes": single}


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[str]:
    """The URL of a router with both models."""
    if options.url:
        yield options.url
        return
    from deploy.local import Cluster, UpSettings

    with tempfile.TemporaryDirectory(prefix="braid-cascade-") as folder:
        settings = UpSettings(prefill=1, decode=1, port=0, run_dir=Path(folder), also=(SMALL,), drain_s=2)
        with Cluster(settings) as cluster:
            yield cluster.wait_ready().url


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.cascade", description=__doc__.splitlines()[0])
    made.add_argument("--url", default="", help="a router that serves demo and demo-small")
    made.add_argument("--count", type=int, default=200, help="problems of the test split")
    made.add_argument("--calibrate", type=int, default=150, help="problems of the calibration split")
    made.add_argument("--slack", type=float, default=0.01, help="share of answers that a threshold may lose")
    made.add_argument("--block", type=int, default=50, help="problems of a turn")
    made.add_argument("--width", type=int, default=16, help="requests at a time")
    made.add_argument("--out", type=Path, help="where the result goes (default benchmarks/results)")
    options = made.parse_args(argv)
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    with served(options) as url:
        found = asyncio.run(measure(url, options))
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "url")}
    head = {"benchmark": "cascade", "started": started, "settings": settings, "machine": describe_machine()}
    result = {**head, "parameters": PARAMETERS, "sources": SOURCES, **found}
    out = keep(result, "cascade", options.out, indent=0)
    for name, told in found["methods"].items():
        print(
            f"{name}: {100 * told['accuracy']:.1f} % right, cost {told['cost_share']:.2f} of the large, "
            f"{sum(told['wall_s']):.1f} s, tokens {told['tokens']}"
        )
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
