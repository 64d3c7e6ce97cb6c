"""Every strategy on the demo's test problems, from one command: cluster, retriever and ``braid eval``.

    python -m benchmarks.evaluation --count 500

Starts both demo models and, for the strategy ``retrieval``, a search over solved problems of the train split;
then runs ``braid eval`` with the methods below and writes its files. The same command goes on where it was
stopped, if ``--run`` is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from braid.evaluate.command import main as evaluate
from demo import tasks
from deploy.local import Cluster, UpSettings

RESULTS = Path(__file__).parent / "results"
RETRIEVER = "examples"
SOLVED = 300
"""Solved problems that the retriever knows."""

GREEDY = {"temperature": 0}


def _reasoning(strategy: str, **options: Any) -> dict[str, Any]:
    return {"reasoning": {"strategy": strategy, **options}}


METHODS: dict[str, dict[str, Any]] = {
    "plain": _reasoning("direct"),
    "plain-greedy": {**GREEDY, **_reasoning("direct")},
    "cot": {"temperature": 1, **_reasoning("cot")},
    "cot-greedy": {**GREEDY, **_reasoning("cot")},
    "cot_decoding:10": _reasoning("cot_decoding", n=10),
    "self_consistency:16": _reasoning("self_consistency", n=16),
    "weighted-vote:16": _reasoning("self_consistency", n=16, weight="mean_logprob"),
    "adaptive_consistency:16": _reasoning("adaptive_consistency", n=16),
    "adaptive-tau-0.9:16": _reasoning("adaptive_consistency", n=16, tau=0.9),
    "early_stopping:16": _reasoning("early_stopping_consistency", n=16, window=4),
    "deepconf:16": _reasoning("deepconf", n=16, warmup=8, wave=4, filter="high"),
    "universal_consistency:8": _reasoning("universal_consistency", n=8),
    "mbr:8": _reasoning("mbr", n=8),
    "first_finish:8": _reasoning("first_finish", n=8),
    "best_of_n:16": _reasoning("best_of_n", n=16),
    "genrm:16": _reasoning("genrm", n=16, k=1, select="sum"),
    "tools:8": _reasoning("tools", n=8),
    "rejection_sampling:8": _reasoning("rejection_sampling", n=8, verifier="arithmetic", threshold=1.0),
    "rollouts:8": _reasoning("rollouts", n=8),
    "car": _reasoning("car"),
    "certaindex": _reasoning("certaindex"),
    "self_refine": _reasoning("self_refine"),
    "mixture_of_agents:2": _reasoning("mixture_of_agents", n=2),
    "retrieval:1": _reasoning("retrieval", retriever=RETRIEVER, k=1),
    "beam_search:2": _reasoning("beam_search", n=2),
    "beam_of_steps:4": _reasoning("beam_of_steps", n=4, width=2),
    "particle_filtering:4": _reasoning("particle_filtering", n=4),
    "tree_of_thoughts:2": _reasoning("tree_of_thoughts", n=2, breadth=2),
    "auto": _reasoning("auto"),
    "ensemble:4": _reasoning("ensemble", n=4),
    "cascade": _reasoning("cascade"),
    "cascade-checked": _reasoning("cascade", n=1, by="arithmetic", threshold=1.0),
}
"""Request fields of each row, by its label."""


def solved(count: int = SOLVED) -> list[dict[str, str]]:
    """Worked examples of the train split: ``text``, ``id`` and the question's ``words``."""
    rows = [tasks.record(p, f"train-{i}", "worked") for i, p in enumerate(tasks.problems("train", 0, count))]
    return [
        {"id": row["id"], "text": f"{row['prompt']}\n{row['solution']}", "question": row["question"]}
        for row in rows
    ]


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z]+", text.lower()))


class Search:
    """The examples whose questions share the most words with a query."""

    def __init__(self, examples: Sequence[dict[str, str]]) -> None:
        self._examples = [(words(one["question"]), one) for one in examples]

    def find(self, query: str, k: int) -> list[dict[str, Any]]:
        """As ``docs/strategies.md`` asks of a retriever; ``score``: Dice coefficient of the two bags."""
        asked = words(query)
        scored = [
            (2 * (asked & bag).total() / max(1, asked.total() + bag.total()), one)
            for bag, one in self._examples
        ]
        best = sorted(scored, key=lambda pair: -pair[0])[:k]
        return [{"id": one["id"], "text": one["text"], "score": score} for score, one in best]


@contextlib.contextmanager
def retriever(search: Search) -> Iterator[str]:
    """The URL of a retriever on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = json.dumps({"documents": search.find(asked["query"], asked["k"])}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/search"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command(options: argparse.Namespace, url: str) -> list[str]:
    """Arguments of ``braid eval``."""
    chosen = options.only or METHODS
    rows = [f"--strategy={label}={json.dumps(METHODS[label])}" for label in chosen]
    given = ["--demo", options.count, "--seed", 7, "--model", "demo", "--max-tokens", 300]
    given += ["--concurrency", options.concurrency, "--block", options.block]
    given += ["--baseline", "self_consistency:16"]
    given += ["--out", options.run, "--name", "evaluation", "--url", url]
    return [*map(str, given), *rows]


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0]
    )
    made.add_argument("--count", type=int, default=500, help="problems of the test split")
    made.add_argument("--concurrency", type=int, default=48, help="requests at a time")
    made.add_argument("--block", type=int, default=100, help="problems that a method has in turn")
    made.add_argument("--only", action="append", choices=METHODS, help="this method; may be repeated")
    made.add_argument("--run", type=Path, default=Path("run/evaluation"), help="folder of logs and outcomes")
    made.add_argument("--keep", action="store_true", help="copy the result to benchmarks/results and docs")
    options = made.parse_args(argv)
    run_dir = options.run / "cluster"
    settings = UpSettings(prefill=1, decode=2, port=0, run_dir=run_dir, also=("demo-small",), drain_s=5)
    with retriever(Search(solved())) as found:
        env = {"BRAID_RETRIEVERS": json.dumps({RETRIEVER: {"url": found}})}
        with Cluster(settings, env=env) as cluster:
            code = evaluate(command(options, cluster.wait_ready().url))
    path = options.run / "evaluation.json"
    result = json.loads(path.read_text())
    result["machine"] = describe_machine()
    path.write_text(json.dumps(result, indent=1) + "\n")
    if options.keep:
        shutil.copy(path, RESULTS / path.name)
        shutil.copy(options.run / "evaluation.svg", RESULTS.parent.parent / "docs" / "evaluation.svg")
    return code


if __name__ == "__main__":
    sys.exit(main())
