"""``braid bench``: plain load and groups on a running server, as a table and as JSON.

Three loads, each in a closed loop of ``--concurrency`` clients:

- ``plain``: one sample a request, by ``vllm bench serve`` where vLLM and the model's tokenizer are at hand;
- ``n``: ``n`` samples a request, streamed, each of ``--max-tokens``;
- ``self_consistency``: the strategy over ``n`` samples, which end by themselves.

Prompts are drawn by ``--seed``. A server that has seen them before has them in its cache, so another run
on the same server takes another seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import load, vllm_load
from benchmarks.machine import describe_machine, package_versions
from benchmarks.prometheus import difference
from braid import __version__

RESULT = Path("benchmarks/results/bench.json")
DEMO_TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "model"
CHAT = "/v1/chat/completions"
QUESTION = "Ana has 12 pens and buys 7 more. How many pens does Ana have?"
WORDS = (
    *("apple", "basket", "coin", "market", "winter", "letter", "river", "number", "seven", "paper"),
    *("street", "garden", "bottle", "train", "window", "sugar", "doctor", "yellow", "square", "music"),
)
PLAIN_FAILED = "vllm bench serve failed"
NOT_RECORDED = ("url", "out", "tokenizer")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(prog="braid bench", description="Benchmark a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=32, help="requests of each load")
    parser.add_argument("--concurrency", type=positive, default=4, help="requests at the same time")
    parser.add_argument("--n", type=positive, default=8, help="samples of a group")
    parser.add_argument("--prompt-tokens", type=positive, default=256)
    parser.add_argument("--max-tokens", type=positive, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--skip-plain", action="store_true", help="leave out the load by vllm bench serve")
    parser.add_argument(
        "--tokenizer", type=Path, help="the model's folder, for plain load (default: the demo's)"
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, save; returns 0 if every request was answered."""
    args = parse(argv)
    console = Console()
    try:
        result = asyncio.run(measure(args, Console(stderr=True)))
    except load.ServerError as error:
        print(f"braid bench: {error}", file=sys.stderr)
        return 1
    console.print(table(result["loads"]))
    for name, reason in result["skipped"].items():
        console.print(f"{name} was left out: {reason}", markup=False)
    save(result, args.out)
    console.print(f"Written to {args.out}", markup=False)
    failed = any(entry["summary"]["failed"] for entry in result["loads"].values())
    return 1 if failed or PLAIN_FAILED in result["skipped"].values() else 0


async def measure(args: argparse.Namespace, progress: Console) -> dict[str, Any]:
    """Run every load in turn; the whole result as it is written.

    Raises:
        load.ServerError: there is no server to measure.
    """
    started = datetime.now(UTC)
    async with load.open_client(args.url, args.concurrency) as client:
        model = await load.served_model(client)
        loads, skipped = {}, {}
        if reason := plain_obstacle(args, model):
            skipped["plain"] = reason
        else:
            progress.print("plain load ...")
            try:
                loads["plain"] = await plain(client, args, str(model["id"]))
            except vllm_load.LoadFailed as error:
                # The tool's output names folders of this machine: it is shown, and not kept.
                progress.print(str(error), markup=False)
                skipped["plain"] = PLAIN_FAILED
        words = await words_for(client, str(model["id"]), args.prompt_tokens)
        for name, body in groups(args, str(model["id"])).items():
            progress.print(f"{name} ...", markup=False)
            loads[name] = await group_load(client, args, name, body, words)
    return {
        "benchmark": "bench",
        "started": started.isoformat(timespec="seconds"),
        "command": command(args),
        "settings": settings(args),
        "versions": {"braid": __version__, **package_versions(sys.executable)},
        "machine": describe_machine(),
        "model": str(model["id"]),
        "skipped": skipped,
        "loads": loads,
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags without the names of machines and folders."""
    return {key: value for key, value in vars(args).items() if key not in NOT_RECORDED}


def command(args: argparse.Namespace) -> str:
    """The command line that makes the same load."""
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in settings(args).items()
        if value is not False
    ]
    return " ".join(["braid bench", *flags])


def plain_obstacle(args: argparse.Namespace, model: Mapping[str, Any]) -> str:
    """Why plain load can't run, empty if it can."""
    if args.skip_plain:
        return "--skip-plain"
    if not vllm_load.available():
        return "vLLM is not installed here (its client makes the load)"
    if tokenizer(args, model) is None:
        return "the model's tokenizer is not on this machine: name its folder with --tokenizer"
    return ""


def tokenizer(args: argparse.Namespace, model: Mapping[str, Any]) -> Path | None:
    """Folder of the model's tokenizer: as given, as the server names it, or the demo's."""
    root = str(model.get("root") or "")
    candidates = [args.tokenizer] if args.tokenizer else [Path(root or "."), DEMO_TOKENIZER]
    return next((path for path in candidates if (path / "tokenizer.json").is_file()), None)


async def plain(client: httpx.AsyncClient, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """One sample a request, by vLLM's client."""
    wanted = vllm_load.PlainLoad(
        args.requests, args.concurrency, args.prompt_tokens, args.max_tokens, args.seed
    )
    folder = tokenizer(args, await load.served_model(client))
    assert folder is not None
    before = await load.counters(client)
    figures = await asyncio.to_thread(vllm_load.run_plain, wanted, args.url, model, folder)
    counted = difference(before, await load.counters(client))
    return {
        "client": "vllm bench serve",
        "arguments": wanted.arguments(),
        "summary": vllm_load.summarise(figures, args.requests, counted),
        "figures": figures,
    }


def groups(args: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """Request bodies of the group loads, without their messages."""
    body = {"model": model, "max_tokens": args.max_tokens, "temperature": 1.0}
    strategy = {"strategy": "self_consistency", "n": args.n}
    return {
        f"n={args.n}": {**body, "n": args.n, "ignore_eos": True},
        f"self_consistency:{args.n}": {**body, "reasoning": strategy},
    }


async def group_load(
    client: httpx.AsyncClient, args: argparse.Namespace, name: str, body: Mapping[str, Any], words: int
) -> dict[str, Any]:
    """One load of streamed groups, each with a prompt of its own."""

    async def ask(number: int) -> load.Stream:
        prompt = filler(f"{args.seed}:{name}:{number}", words)
        return await load.stream(client, CHAT, {**body, "messages": [{"role": "user", "content": prompt}]})

    before = await load.counters(client)
    start = time.perf_counter()
    replies = await load.closed_loop(range(args.requests), args.concurrency, ask)
    wall = time.perf_counter() - start
    counted = difference(before, await load.counters(client))
    return {
        "client": "braid bench",
        "body": dict(body),
        "summary": load.summarise(replies, wall, counted),
        "requests": [asdict(reply) for reply in replies],
    }


def filler(key: str, words: int) -> str:
    """A question behind ``words`` random words, the same for the same key."""
    return " ".join([*random.Random(key).choices(WORDS, k=words), QUESTION])


async def words_for(client: httpx.AsyncClient, model: str, tokens: int) -> int:
    """How many words make a prompt of about ``tokens``, measured on two prompts that also warm the server.

    Raises:
        load.ServerError: the server does not answer them.
    """
    counts = {}
    for words in (8, 40):
        message = {"role": "user", "content": filler(f"calibration:{words}", words)}
        body = {"model": model, "messages": [message], "max_tokens": 2}
        reply = await load.stream(client, CHAT, body)
        if reply.error:
            raise load.ServerError(f"the server does not answer a short question ({reply.error})")
        counts[words] = reply.prompt_tokens
    per_word = max((counts[40] - counts[8]) / 32, 0.1)
    return max(0, round(8 + (tokens - counts[8]) / per_word))


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write the result; times to the microsecond."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """The same with floats cut to six decimals."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def table(loads: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a load."""
    shown = Table(title="braid bench", caption="times in ms: p50 / p95 / p99")
    shown.add_column("load")
    for title in ("requests", "failed", "TTFT", "ITL", "tokens/s", "KV MB", "KV transfers", "paths"):
        shown.add_column(title, justify="right")
    for name, entry in loads.items():
        shown.add_row(name, *(column(entry["summary"]) for column in COLUMNS))
    return shown


def times(summary: Mapping[str, Any]) -> str:
    """``p50 / p95 / p99``, or a dash for an empty sample."""
    values = [summary.get(p) for p in ("p50", "p95", "p99")]
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


def paths(summary: Mapping[str, Any]) -> str:
    """Replies by path."""
    return " ".join(f"{path}:{count}" for path, count in sorted(summary["paths"].items())) or "-"


COLUMNS: tuple[Callable[[Mapping[str, Any]], str], ...] = (
    lambda s: str(s["requests"]),
    lambda s: str(sum(s["failed"].values())),
    lambda s: times(s["ttft_ms"]),
    lambda s: times(s["itl_ms"]),
    lambda s: f"{s['tokens_per_s']:.0f}",
    lambda s: f"{s['kv_bytes'] / 1e6:.1f}",
    lambda s: str(s["kv_transfers"]),
    paths,
)


if __name__ == "__main__":
    sys.exit(main())
