"""What a compressed wire does to the answers: the demo's problems with each codec, on real engines.

    python -m benchmarks.codec --count 300

For each of `none`, `none` again, `int8` and `fp8` it starts a cluster (1 prefill, 1 decode worker) with the
demo model in bfloat16, the only cache that is encoded, and asks the same problems for one greedy worked
answer. Told are the right answers, paired against the first run; in how many problems the text is another;
how far the log-probabilities of equal texts are apart; and the bytes of KV that a prompt took. The second
`none` shows what is no codec's doing. Each problem has a `cache_salt` of its own, so that no block is found
in a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import load
from benchmarks.accuracy import Problem, final_number, problems
from benchmarks.bench import CHAT, positive
from benchmarks.kept import folder, keep
from benchmarks.machine import describe_machine, package_versions
from braid.evaluate.figures import SOURCES, difference, mcnemar, wilson
from demo import tasks
from deploy.local import Cluster, UpSettings

RUNS = (("none", "none"), ("none again", "none"), ("int8", "int8"), ("fp8", "fp8"))
"""Name of a run, and its codec."""
MAX_TOKENS = 320


class Answer(msgspec.Struct):
    """One problem answered. ``logprobs``: of each token of ``text``; ``path`` and ``kv_bytes`` as replied."""

    right: bool
    text: str
    logprobs: list[float]
    path: str
    kv_bytes: int


async def ask(client: httpx.AsyncClient, model: str, problem: Problem) -> Answer:
    """One greedy worked answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": problem.prompt + tasks.WORKED_SUFFIX}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "cache_salt": problem.id,
    }
    reply = (await client.post(CHAT, json=body)).raise_for_status().json()
    choice = reply["choices"][0]
    text = choice["message"]["content"] or ""
    found = await final_number(text, truncated=choice["finish_reason"] == "length")
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Answer(found == problem.answer, text, logprobs, reply["braid"]["path"], reply["braid"]["kv_bytes"])


def measure(codec: str, asked: Sequence[Problem], concurrency: int) -> list[Answer]:
    """All problems on a cluster of its own."""

    async def run(cluster: Cluster) -> list[Answer]:
        async with load.open_client(cluster.url, concurrency) as client:
            return list(await load.closed_loop(asked, concurrency, lambda p: ask(client, cluster.model, p)))

    with tempfile.TemporaryDirectory(prefix="codec-", ignore_cleanup_errors=True) as run_dir:
        settings = UpSettings(
            prefill=1, decode=1, port=0, dtype="bfloat16", run_dir=Path(run_dir), start_timeout_s=600
        )
        with Cluster(settings, env={"BRAID_KV_CODEC": codec}) as cluster:
            return asyncio.run(run(cluster.wait_ready()))


def figures(answers: Sequence[Answer], reference: Sequence[Answer]) -> dict[str, Any]:
    """A run against the reference, problem by problem."""
    pairs = list(zip(answers, reference, strict=True))
    counts = [sum((a.right, b.right) == wanted for a, b in pairs) for wanted in TABLE]
    apart = [d for a, b in pairs for d in differences(a, b)]
    right = sum(a.right for a in answers)
    return {
        "problems": len(answers),
        "right": right,
        "accuracy": right / len(answers),
        "accuracy_ci95": wilson(right, len(answers)),
        "difference_ci95": difference(*counts),
        "mcnemar_p": mcnemar(counts[1], counts[2]),
        "other_text": sum(a.text != b.text for a, b in pairs),
        "logprob_apart_mean": statistics.mean(apart) if apart else 0.0,
        "logprob_apart_max": max(apart, default=0.0),
        "kv_bytes": sum(a.kv_bytes for a in answers) / len(answers),
        "remote": sum(a.path == "remote" for a in answers),
    }


TABLE = ((True, True), (True, False), (False, True), (False, False))


def differences(answer: Answer, reference: Answer) -> list[float]:
    """How far the log-probabilities of equal texts are apart, token by token; of texts that are not, nothing
    is told, as what follows another token is another distribution."""
    if answer.text != reference.text:
        return []
    pairs = zip(answer.logprobs, reference.logprobs, strict=False)
    return [abs(a - b) for a, b in pairs]


def table(runs: dict[str, dict[str, Any]]) -> Table:
    """One row a run."""
    shown = Table(title="answers after a compressed wire, against none")
    shown.add_column("codec")
    for title in ("right", "difference, 95 %", "other text", "log-probability apart", "KV bytes a prompt"):
        shown.add_column(title, justify="right")
    for name, found in runs.items():
        low, high = found["difference_ci95"]
        shown.add_row(
            name,
            f"{found['accuracy']:.1%}",
            f"{low:+.1%} to {high:+.1%}",
            f"{found['other_text']} of {found['problems']}",
            f"{found['logprob_apart_mean']:.4f}, at most {found['logprob_apart_max']:.3f}",
            f"{found['kv_bytes']:,.0f}",
        )
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, save; exit status 1 if a prompt's KV did not travel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--count", type=positive, default=300, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument("--concurrency", type=positive, default=1, help="requests at the same time")
    parser.add_argument("--out", type=folder, help="folder of the result")
    args = parser.parse_args(argv)
    begun = datetime.now(UTC)
    asked = problems("test", args.seed, args.count)
    answers: dict[str, list[Answer]] = {}
    for name, codec in RUNS:
        answers[name] = measure(codec, asked, args.concurrency)
        print(f"{name}: {sum(a.right for a in answers[name])} of {len(asked)} right", file=sys.stderr)
    runs = {name: figures(found, answers["none"]) for name, found in answers.items()}
    result = {
        "benchmark": "codec",
        "started": begun.isoformat(timespec="seconds"),
        "arguments": {"count": args.count, "seed": args.seed, "concurrency": args.concurrency},
        "sources": SOURCES,
        "machine": describe_machine(),
        "versions": package_versions(sys.executable),
        "runs": runs,
        "right": {name: "".join("01"[a.right] for a in found) for name, found in answers.items()},
    }
    Console().print(table(runs))
    print(f"result: {keep(result, 'codec', args.out)}")
    return 0 if all(found["remote"] == len(asked) for found in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
