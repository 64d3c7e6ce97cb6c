"""Accuracy of the strategies on the demo's word problems, at equal settings, against a running server.

    python -m benchmarks.accuracy --count 300

Six ways to answer the same problems: ``brief`` and ``plain`` (greedy), ``cot_greedy``, ``cot`` (one sample
at T=1), ``self_consistency`` and ``best_of_n`` (``--n`` samples at T=1). Reports the share of right answers
with its 95 % Wilson interval, the generated tokens of all samples, and seconds. `braid eval` compares any
strategies on any problems.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import load
from benchmarks.bench import CHAT, positive, save
from benchmarks.machine import describe_machine, package_versions
from braid import __version__
from braid.evaluate.figures import wilson
from demo import tasks
from router.extract import extract

RESULT = Path("benchmarks/results/accuracy.json")
NOT_RECORDED = ("url", "out")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Method:
    """One way to answer: what is added to the question and to the request."""

    temperature: float
    strategy: str = ""
    samples: bool = False
    suffix: str = ""

    def body(self, n: int) -> dict[str, Any]:
        """The request without its model, messages and length."""
        body: dict[str, Any] = {"temperature": self.temperature}
        if self.strategy:
            body["reasoning"] = {"strategy": self.strategy} | ({"n": n} if self.samples else {})
        return body


METHODS: Mapping[str, Method] = {
    "brief": Method(0.0, suffix=tasks.BRIEF_SUFFIX),
    "plain": Method(0.0),
    "cot_greedy": Method(0.0, "cot"),
    "cot": Method(1.0, "cot"),
    "self_consistency": Method(1.0, "self_consistency", samples=True),
    "best_of_n": Method(1.0, "best_of_n", samples=True),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its gold answer."""

    id: str
    prompt: str
    answer: int
    band: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One problem answered: the final number, None if there was none; ``error`` if there was no reply."""

    id: str
    answer: int | None
    right: bool
    tokens: int
    seconds: float
    error: str = ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of the program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description="Accuracy of the strategies on the demo's problems."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--split", choices=tasks.SPLITS, default="test")
    parser.add_argument("--count", type=positive, default=300, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument("--n", type=positive, default=16, help="samples of self_consistency and best_of_n")
    parser.add_argument("--max-tokens", type=positive, default=320)
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at the same time")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sampling-seed", type=int, help="makes sampling repeatable (default: not)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, save; returns 0 if every request was answered."""
    args = parse(argv)
    try:
        result = asyncio.run(measure(args))
    except load.ServerError as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(table(result["methods"]))
    save(result, args.out)
    console.print(f"Written to {args.out}", markup=False)
    return 1 if any(entry["failed"] for entry in result["methods"].values()) else 0


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every method in turn on the same problems.

    Raises:
        load.ServerError: there is no server to measure.
    """
    started = datetime.now(UTC)
    asked = problems(args.split, args.seed, args.count)
    methods = {}
    async with load.open_client(args.url, args.concurrency) as client:
        model = str((await load.served_model(client))["id"])
        for name in args.methods:
            methods[name] = await run(client, args, METHODS[name], model, asked)
            print(f"{name}: {methods[name]['accuracy']:.1%}", file=sys.stderr, flush=True)
    return {
        "benchmark": "accuracy",
        "started": started.isoformat(timespec="seconds"),
        "settings": {key: value for key, value in vars(args).items() if key not in NOT_RECORDED},
        "versions": {"braid": __version__, **package_versions(sys.executable)},
        "machine": describe_machine(),
        "model": model,
        "methods": methods,
    }


def problems(split: tasks.Split, seed: int, count: int) -> list[Problem]:
    """The problems that ``python -m demo.tasks`` prints for the same flags."""
    rows = (
        (tasks.record(problem, f"{split}-{seed}-{number}", "plain"))
        for number, problem in enumerate(tasks.problems(split, seed, count))
    )
    return [Problem(row["id"], row["prompt"], int(row["answer"]), row["band"]) for row in rows]


async def run(
    client: httpx.AsyncClient, args: argparse.Namespace, method: Method, model: str, asked: Sequence[Problem]
) -> dict[str, Any]:
    """One method on every problem: its figures and each outcome."""
    body = {"model": model, "max_tokens": args.max_tokens, **method.body(args.n)}

    async def answer(numbered: tuple[int, Problem]) -> Outcome:
        number, problem = numbered
        seed = {} if args.sampling_seed is None else {"seed": args.sampling_seed + number}
        message = {"role": "user", "content": problem.prompt + method.suffix}
        return await ask(client, {**body, **seed, "messages": [message]}, problem)

    start = time.perf_counter()
    outcomes = await load.closed_loop(enumerate(asked), args.concurrency, answer)
    seconds = time.perf_counter() - start
    return {"request": body, **figures(outcomes, asked, seconds), "outcomes": [asdict(o) for o in outcomes]}


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any], problem: Problem) -> Outcome:
    """Ask one problem; a failure is an outcome, not an exception."""
    start = time.perf_counter()
    try:
        response = await client.post(CHAT, json=dict(body))
        response.raise_for_status()
        reply = response.json()
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
    except httpx.HTTPStatusError as error:
        failure = f"HTTP {error.response.status_code}"
    except (httpx.HTTPError, ValueError, LookupError) as error:
        failure = type(error).__name__
    else:
        found = await final_number(text, truncated=choice.get("finish_reason") == "length")
        tokens = (reply.get("usage") or {}).get("completion_tokens", 0)
        return Outcome(problem.id, found, found == problem.answer, tokens, time.perf_counter() - start)
    return Outcome(problem.id, None, False, 0, time.perf_counter() - start, failure)


async def final_number(text: str, *, truncated: bool) -> int | None:
    """The number a text ends in, found as the strategies find it; of a cut text only a stated answer."""
    answer = await extract(text, truncated=truncated)
    numbers = _NUMBER.findall((answer or "").replace(",", "").replace("\N{MINUS SIGN}", "-"))
    return int(numbers[-1]) if numbers else None


def figures(outcomes: Sequence[Outcome], asked: Sequence[Problem], seconds: float) -> dict[str, Any]:
    """Accuracy over all problems (a failed request counts as wrong), by band, tokens and seconds."""
    right = [outcome.right for outcome in outcomes]
    bands = {problem.band for problem in asked}
    return {
        "problems": len(outcomes),
        "failed": sum(bool(outcome.error) for outcome in outcomes),
        "no_answer": sum(outcome.answer is None for outcome in outcomes),
        "accuracy": sum(right) / len(right),
        "accuracy_ci95": wilson(sum(right), len(right)),
        "bands": {
            band: share([ok for ok, problem in zip(right, asked, strict=True) if problem.band == band])
            for band in sorted(bands)
        },
        "completion_tokens": sum(outcome.tokens for outcome in outcomes),
        "seconds": seconds,
    }


def share(flags: Sequence[bool]) -> dict[str, Any]:
    """How many of how many."""
    return {"problems": len(flags), "accuracy": sum(flags) / len(flags)}


def table(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a method."""
    shown = Table(title="accuracy on the demo's problems")
    shown.add_column("method")
    for title in ("right", "95 % interval", "no answer", "failed", "tokens", "seconds"):
        shown.add_column(title, justify="right")
    for name, entry in methods.items():
        shown.add_row(name, *(column(entry) for column in COLUMNS))
    return shown


COLUMNS: tuple[Callable[[Mapping[str, Any]], str], ...] = (
    lambda e: f"{e['accuracy']:.1%}",
    lambda e: " - ".join(f"{bound:.1%}" for bound in e["accuracy_ci95"]),
    lambda e: str(e["no_answer"]),
    lambda e: str(e["failed"]),
    lambda e: str(e["completion_tokens"]),
    lambda e: f"{e['seconds']:.1f}",
)


if __name__ == "__main__":
    sys.exit(main())
