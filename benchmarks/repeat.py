"""Same seed, same votes: groups asked again after a restart, and of another number of decode workers.

    python -m benchmarks.repeat --groups 100

Each cluster is started afresh and asked the same groups with the same seeds, all samples drawn
(`early_stop` off) and then as a user would, with early stopping. Of the former the answer, the votes and
every sample's answer and length must be equal; of the latter the answer, as which samples are cancelled
depends on time. Prints what is equal of how many, and each group that is not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.accuracy import Problem, problems
from benchmarks.bench import positive, save
from benchmarks.machine import describe_machine, package_versions
from braid import __version__
from deploy.local import Cluster, UpSettings

ROOT = Path(__file__).resolve().parents[1]
Votes = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeat", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--groups", type=positive, default=100)
    parser.add_argument("--n", type=positive, default=8, help="samples of a group")
    parser.add_argument(
        "--decode", type=positive, nargs="+", default=[1, 1, 2], help="decode workers of each cluster in turn"
    )
    parser.add_argument("--max-tokens", type=positive, default=320)
    parser.add_argument("--concurrency", type=positive, default=4, help="groups at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of problems and samples")
    parser.add_argument("--url", nargs="+", default=[], help="ask these running servers, and start none")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/repeat.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, compare, save; 1 where something differs or failed."""
    args = parse(argv)
    started = datetime.now(UTC)
    runs = run_all(args)
    compared = [compare(runs[0], other) for other in runs[1:]]
    result = {
        "benchmark": "repeat",
        "started": started.isoformat(timespec="seconds"),
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "url")},
        "versions": {"braid": __version__, **package_versions(sys.executable)},
        "machine": describe_machine(),
        "compared": compared,
        "runs": runs,
    }
    save(result, args.out)
    for one in compared:
        print(
            f"{one['decode']} decode worker(s) against {runs[0]['decode']}: "
            f"{one['equal']}/{one['groups']} groups with equal votes, "
            f"{one['equal_answers']}/{one['groups']} with equal answers under early stopping"
        )
        for group in one["differ"]:
            print(f"  differs: {group}")
    print(f"Written to {args.out}")
    return 1 if any(one["differ"] for one in compared) else 0


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One run a cluster, in turn."""
    runs = []
    for place, decode in enumerate(args.decode[: len(args.url)] if args.url else args.decode):
        with ExitStack() as stack:
            url = args.url[place] if args.url else start(stack, decode)
            runs.append(asyncio.run(measure(args, url, decode)))
            print(f"{decode} decode worker(s): {args.groups} groups asked", file=sys.stderr, flush=True)
    return runs


def start(stack: ExitStack, decode: int) -> str:
    """A cluster that lives as long as `stack`; each group is spread over all its decode workers."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="repeat-", ignore_cleanup_errors=True))
    settings = UpSettings(
        prefill=1, decode=decode, port=0, run_dir=Path(folder), drain_s=5, _cli_parse_args=False
    )
    cluster = stack.enter_context(Cluster(settings, env={"BRAID_SPREAD": "spread"}))
    return cluster.wait_ready().url


async def measure(args: argparse.Namespace, url: str, decode: int) -> dict[str, Any]:
    """Every group twice: all samples, and with early stopping."""
    asked = problems("test", args.seed, args.groups)
    gate = asyncio.Semaphore(args.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def one(number: int, problem: Problem, early: bool) -> Votes:
            async with gate:
                return await group(client, args, problem, args.seed + number, early)

        return {"decode": decode} | {
            name: await asyncio.gather(*(one(i, problem, early) for i, problem in enumerate(asked)))
            for name, early in (("all", False), ("early", True))
        }


async def group(
    client: httpx.AsyncClient, args: argparse.Namespace, problem: Problem, seed: int, early: bool
) -> Votes:
    """What one group answered, and how its samples voted; `workers` ran them."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": problem.prompt}],
        "max_tokens": args.max_tokens,
        "seed": seed,
        "reasoning": {"strategy": "self_consistency", "n": args.n, "early_stop": early},
    }
    try:
        reply = (await client.post("/v1/chat/completions", json=body)).raise_for_status()
        report = reply.json()["reasoning"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        return {"problem": problem.id, "error": f"{type(error).__name__}: {error}"}
    return {
        "problem": problem.id,
        "answer": report["answer"],
        "votes": [[vote["answer"], vote["votes"]] for vote in report["votes"]],
        "samples": [[one["index"], one["state"], one["answer"], one["tokens"]] for one in report["samples"]],
        "workers": len(reply.headers["x-braid-decode"].split(",")),
    }


def compare(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How many groups are equal; those that are not, with what each run said. A failed group differs."""
    differ: list[dict[str, Any]] = []
    counts = {"all": 0, "early": 0}
    for name, fields in (("all", ("answer", "votes", "samples")), ("early", ("answer",))):
        for one, two in zip(first[name], other[name], strict=True):
            failed = "error" in one or "error" in two
            if not failed and all(one[field] == two[field] for field in fields):
                counts[name] += 1
            else:
                differ.append({"run": name, "problem": one["problem"], "first": one, "other": two})
    return {
        "decode": other["decode"],
        "groups": len(first["all"]),
        "equal": counts["all"],
        "equal_answers": counts["early"],
        "differ": differ,
    }


if __name__ == "__main__":
    sys.exit(main())
