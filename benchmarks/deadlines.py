"""Groups with deadlines on a running server: how late are their answers, has each one an answer or a reason?

    python -m benchmarks.deadlines --url http://127.0.0.1:8000

sends 200 groups of 4 to 64 samples at random times, with deadlines from 0.2 to 5 seconds. Lateness is what
the client sees: from when it begins to send the request to when it has read the reply, less the deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.kept import keep, show
from benchmarks.load import open_client, served_model
from benchmarks.machine import describe_machine
from benchmarks.stats import summary
from demo.tasks import make_problem

ALLOWED_S = 0.1


class Ask(msgspec.Struct, frozen=True):
    """A group: ``n`` samples, ``at`` seconds after the start, due ``deadline_s`` after that."""

    at: float
    n: int
    deadline_s: float
    question: str
    to_the_end: bool


class Outcome(msgspec.Struct):
    """What became of it. ``late_s`` is negative for an answer before the deadline; ``reason``: of a reply
    that is no complete answer."""

    n: int
    deadline_s: float
    late_s: float
    status: int
    reason: str
    finished: int
    tokens: int


def plan(groups: int, rate: float, seed: int) -> list[Ask]:
    """Groups at random times (Poisson) with log-uniform deadlines."""
    rng = random.Random(seed)
    at, found = 0.0, []
    for number in range(groups):
        at += rng.expovariate(rate)
        deadline = 0.2 * 25.0 ** rng.random()
        question = make_problem("test", seed, number).question
        found.append(Ask(at, rng.choice((4, 16, 64)), round(deadline, 3), question, rng.random() < 0.5))
    return found


def body(ask: Ask, model: str, tokens: int) -> dict[str, Any]:
    """Its request. Samples of every other group go on to ``tokens`` tokens: nearly all end together, or
    none before the deadline; of the rest some end in time."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": ask.question}],
        "max_tokens": tokens,
        "ignore_eos": ask.to_the_end,
        "reasoning": {
            "strategy": "self_consistency",
            "n": ask.n,
            "early_stop": False,
            "deadline_s": ask.deadline_s,
        },
    }


async def send(client: httpx.AsyncClient, ask: Ask, model: str, tokens: int, start: float) -> Outcome:
    """One group at its time."""
    await asyncio.sleep(max(0.0, start + ask.at - time.monotonic()))
    data = msgspec.json.encode(body(ask, model, tokens))
    begun = time.monotonic()
    reply = await client.post(
        "/v1/chat/completions", content=data, headers={"content-type": "application/json"}
    )
    late = time.monotonic() - begun - ask.deadline_s
    return outcome(ask, late, reply.status_code, reply.content)


def outcome(ask: Ask, late_s: float, status: int, content: bytes) -> Outcome:
    """A reply in figures."""
    told = msgspec.json.decode(content)
    if status != httpx.codes.OK:
        return Outcome(ask.n, ask.deadline_s, late_s, status, str(told["error"]["message"]), 0, 0)
    report = told["reasoning"]
    finished = sum(sample["state"] == "finished" for sample in report["samples"])
    tokens = told["usage"]["completion_tokens"]
    return Outcome(ask.n, ask.deadline_s, late_s, status, report.get("stopped_early") or "", finished, tokens)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a run shows."""
    late = [one.late_s for one in outcomes]
    return {
        "groups": len(outcomes),
        "answered": sum(one.status == httpx.codes.OK for one in outcomes),
        "reasons": dict(Counter(f"{one.status} {one.reason}".strip() for one in outcomes)),
        "without_answer_or_reason": sum(one.status != httpx.codes.OK and not one.reason for one in outcomes),
        "late_by_more_than_100_ms": sum(value > ALLOWED_S for value in late),
        "latest_s": max(late),
        "late_s": summary([value for value in late if value > 0]),
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; returns its result."""
    asks = plan(options.groups, options.rate, options.seed)
    async with open_client(options.url, options.groups) as client:
        model = await served_model(client)
        name = str(model["id"])
        await client.get("/v1/models")
        start = time.monotonic()
        outcomes = await asyncio.gather(*(send(client, ask, name, options.tokens, start) for ask in asks))
        wall = time.monotonic() - start
        idle = await settled(client)
    return {
        "benchmark": "deadlines",
        "simulated": name.startswith("sim"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "settings": {key: getattr(options, key) for key in ("groups", "rate", "tokens", "seed")},
        "machine": describe_machine(),
        "wall_s": wall,
        "idle_after_s": idle,
        **figures(outcomes),
        "outcomes": msgspec.to_builtins(outcomes),
    }


async def settled(client: httpx.AsyncClient) -> float | None:
    """Seconds until nothing is in flight any more, None if that takes more than 20."""
    since = time.monotonic()
    while time.monotonic() - since < 20:
        if not (await client.get("/cluster")).json()["inflight"]:
            return time.monotonic() - since
        await asyncio.sleep(0.05)
    return None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.deadlines", description=__doc__.splitlines()[0])
    made.add_argument("--url", default="http://127.0.0.1:8000")
    made.add_argument("--groups", type=int, default=200)
    made.add_argument("--rate", type=float, default=4.0, help="groups a second (Poisson)")
    made.add_argument("--tokens", type=int, default=128, help="tokens of each sample")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="where the result goes (default benchmarks/results)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    found = asyncio.run(run(options))
    keep(found, "deadlines", options.out)
    show(found, ("outcomes", "machine", "settings"))
    return 1 if found["late_by_more_than_100_ms"] or found["without_answer_or_reason"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
