"""What losers cost after a vote is decided: decode steps, counted inside the engine.

    python -m benchmarks.cancel

Self-consistency on a cluster of one prefill and one decode worker whose engines keep a journal
(`benchmarks.counting_scheduler`). The moment of decision is the forward pass that ended the sample after
which no other could change the winner; each step that any other sample of the group takes part in from then
on is counted, also one of the pass that runs already. Without early stopping (`--waiting`) all samples run to
their end, as under OptiLLM and its_hub, which cancel none: that is what there is to save.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.accuracy import problems
from benchmarks.bench import positive, save
from benchmarks.counted import JOURNAL, journal, late_samples
from benchmarks.machine import describe_machine, package_versions
from benchmarks.stats import summary
from braid import __version__
from braid.lines import alines
from deploy.local import Cluster, UpSettings
from router.strategies.voting import Votes, is_decided

ROOT = Path(__file__).resolve().parents[1]
SCHEDULER = "benchmarks.counting_scheduler.CountingScheduler"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cancel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--groups", type=positive, default=50, help="groups of each size")
    parser.add_argument("--n", type=positive, nargs="+", default=[16, 64], help="samples of a group")
    parser.add_argument("--waiting", type=int, default=20, help="groups of each size without early stopping")
    parser.add_argument("--concurrency", type=positive, default=1, help="groups at the same time")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="of the samples")
    parser.add_argument("--max-tokens", type=positive, default=320)
    parser.add_argument("--seed", type=int, default=0, help="of problems and samples")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cancel.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Start a cluster, measure, save, show; 1 where a group failed."""
    args = parse(argv)
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="cancel-", ignore_cleanup_errors=True) as folder:
        run_dir, ends = Path(folder, "run"), Path(folder, "ends")
        ends.mkdir()
        settings = UpSettings(prefill=1, decode=1, port=0, run_dir=run_dir, drain_s=5, _cli_parse_args=False)
        env = {JOURNAL: str(ends), "PYTHONPATH": str(ROOT)}
        with Cluster(settings, ["--scheduler-cls", SCHEDULER], env=env) as cluster:
            cluster.wait_ready()
            groups = asyncio.run(measure(args, cluster.url))
        ended = journal(ends)
    for one in groups:
        one["late"] = [] if one["error"] else late_samples(ended, one["id"], one["decided_by"])
    kinds = dict.fromkeys((one["n"], one["temperature"], one["early"]) for one in groups)
    rows = [figures(*kind, groups) for kind in kinds]
    result = {
        "benchmark": "cancel",
        "started": started.isoformat(timespec="seconds"),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "versions": {"braid": __version__, **package_versions(sys.executable)},
        "machine": describe_machine(),
        "figures": rows,
        "groups": groups,
    }
    save(msgspec.to_builtins(result), args.out)
    show(rows)
    print(f"Written to {args.out}")
    return 1 if any(group["error"] for group in groups) else 0


async def measure(args: argparse.Namespace, url: str) -> list[dict[str, Any]]:
    """Every group, of all sizes with and without early stopping."""
    asked = problems("test", args.seed, args.groups)
    gate = asyncio.Semaphore(args.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def one(n: int, temperature: float, early: bool, number: int) -> dict[str, Any]:
            told = {"n": n, "temperature": temperature, "early": early, "problem": asked[number].id}
            async with gate:
                return await group(client, told, body(args, asked[number].prompt, told, number))

        jobs = [
            one(n, temperature, early, number)
            for n in args.n
            for temperature in args.temperature
            for early in (True, False)
            for number in range(args.groups if early else min(args.waiting, args.groups))
        ]
        return list(await asyncio.gather(*jobs))


def body(args: argparse.Namespace, prompt: str, told: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The request of a group."""
    options = {"strategy": "self_consistency", "n": told["n"], "early_stop": told["early"]}
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": args.max_tokens,
        "temperature": told["temperature"],
        "seed": args.seed + number,
        "stream": True,
        "reasoning": options,
    }


async def group(
    client: httpx.AsyncClient, asked: Mapping[str, Any], body: Mapping[str, Any]
) -> dict[str, Any]:
    """One group as its stream tells it: the sample that decided it, None if all were needed."""
    told: dict[str, Any] = {**asked, "id": "", "error": ""}
    events: list[Mapping[str, Any]] = []
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            told["id"] = reply.headers["x-request-id"]
            if reply.is_error:
                await reply.aread()
                reply.raise_for_status()
            async for line in alines(reply.aiter_bytes()):
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]).get("reasoning") or {})
    except (httpx.HTTPError, ValueError, LookupError) as error:
        told["error"] = f"{type(error).__name__}: {error}"
    report: Mapping[str, Any] = next((event for event in reversed(events) if "strategy" in event), {})
    samples = [event for event in events if event.get("event") == "sample"]
    return {
        **told,
        "decided_by": decisive(samples, asked["n"]),
        "stopped_early": report.get("stopped_early"),
        "cancelled": report.get("samples_cancelled"),
        "tokens": report.get("tokens"),
    }


def decisive(samples: Sequence[Mapping[str, Any]], n: int) -> int | None:
    """The sample whose end decided the vote, by the events of a stream in their order; None if it was the
    last one."""
    for place, event in enumerate(samples, 1):
        votes = [Votes(v["answer"], v["weight"], tuple(v["samples"])) for v in event["votes"]]
        if event["state"] == "finished" and is_decided(votes, n - place):
            return int(event["index"]) if place < n else None
    return None


def figures(n: int, temperature: float, early: bool, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps after the decision of the losers of all groups, and their sum in each group that has any.

    A loser is a sample that needed at least one more step: what ends in the same pass as the deciding sample
    costs nothing. `cancelled` are those that were aborted.
    """
    kind = (n, temperature, early)
    mine = [
        one for one in groups if (one["n"], one["temperature"], one["early"]) == kind and not one["error"]
    ]
    losers = [[late for late in one["late"] if late.steps or late.aborted] for one in mine]
    every = [late for group in losers for late in group]
    return {
        "n": n,
        "temperature": temperature,
        "early_stop": early,
        "groups": len(mine),
        "with_losers": sum(map(bool, losers)),
        "losers": len(every),
        "cancelled": sum(late.aborted for late in every),
        "steps_of_a_loser": summary([late.steps for late in every]),
        "steps_of_a_cancelled": summary([late.steps for late in every if late.aborted]),
        "steps_of_a_group": summary([sum(late.steps for late in group) for group in losers if group]),
        "tokens_of_a_group": summary([one["tokens"] for one in mine]),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each size and way."""
    for row in rows:
        way = "early stop" if row["early_stop"] else "all run on"
        print(
            f"n={row['n']:<3} T={row['temperature']} {way}: {row['losers']} losers in "
            f"{row['with_losers']}/{row['groups']} groups, {row['cancelled']} cancelled; "
            f"steps after the decision (median / worst): {both(row['steps_of_a_loser'])} of a loser, "
            f"{both(row['steps_of_a_cancelled'])} of a cancelled one, "
            f"{both(row['steps_of_a_group'])} of a group; "
            f"tokens of a group: median {row['tokens_of_a_group']['p50']:g}"
        )


def both(found: Mapping[str, Any]) -> str:
    """Median and worst; dashes where there is none."""
    return f"{found['p50']:g} / {found['max']:g}" if found["count"] else "- / -"


if __name__ == "__main__":
    sys.exit(main())
