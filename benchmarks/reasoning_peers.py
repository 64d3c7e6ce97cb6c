"""Self-consistency and best-of-n by Braid, OptiLLM and its_hub, on one engine and the same core, interleaved.

    python -m benchmarks.reasoning_peers --peer-python PEERS/bin/python

`vote`: self-consistency over the demo's problems. `judge`: best of n with a long prompt, then verifications
of every sample. The methods take turns on blocks of problems; the stacks whose turn it is not are stopped by
SIGSTOP. Latency is what the caller waits, tokens and prompt tokens are the engines' own counters.
benchmarks/README.md says what each method was given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.accuracy import Problem, final_number, problems
from benchmarks.braid_stack import ROOT, launch_braid
from benchmarks.handover import absolute, interpreter, progress
from benchmarks.kept import RESULTS, folder
from benchmarks.machine import Load, LoadMeter, describe_machine, package_versions
from benchmarks.measure import Pace, SideBySide, describe
from benchmarks.process import replace_all
from benchmarks.prometheus import difference
from benchmarks.prompts import Prompts
from benchmarks.reasoning_figures import figures, judge_table, vote_table
from benchmarks.reasoning_methods import Ask, Braid, Method, Peer, PeerDriver, Reply
from benchmarks.reasoning_prompts import allowed, long_question
from benchmarks.reasoning_stacks import (
    ENGINE_COUNTERS,
    empty_prefix_cache,
    engine_tokens,
    launch_server,
    launch_single,
)
from benchmarks.stack import EngineSettings, Launcher, Stack

PARTS = ("vote", "judge")
SETTLE_S = 0.25
VERIFIER = "short"
"""The verifier `self` with chains no longer than the judge's samples: after a prompt this long the demo
model's chains would go on to the end of its window."""


class Record(msgspec.Struct):
    """One question answered by one method. `answer` is the number its text ends in."""

    part: str
    method: str
    stack: str
    round: int
    problem: str
    reply: Reply
    answer: int | None
    right: bool


class Turn(msgspec.Struct):
    """A method's turn: what the engines counted over its `questions`, and how busy the machine was.

    `prompt` is the longest prompt, and `allowed` the prompt tokens that sharing leaves to compute (see
    `benchmarks.reasoning_prompts`), both of `judge` only.
    """

    part: str
    method: str
    stack: str
    round: int
    position: int
    questions: int
    engines: dict[str, float]
    load: Load
    prompt: int | None = None
    allowed: int | None = None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    what.add_argument("--methods", nargs="+", help="only these (default: all of each part)")
    what.add_argument("--model", type=absolute, default=ROOT / "demo/model", help="model folder")
    what.add_argument("--problems", type=int, default=40, help="of the demo's test split, for the vote")
    what.add_argument("--first", type=int, default=0, help="problems to pass over")
    what.add_argument("--block", type=int, default=10, help="problems of a turn")
    what.add_argument("--rounds", type=int, default=5, help="questions of each method, for the judge")
    what.add_argument("--prompt-tokens", type=int, default=2000, help="least length of a judge's prompt")
    what.add_argument("--n", type=int, default=16, help="samples")
    what.add_argument("--k", type=int, default=4, help="verifications of a sample")
    what.add_argument("--temperature", type=float, default=1.0)
    what.add_argument("--max-tokens", type=int, default=320, help="of a sample, for the vote")
    what.add_argument("--judge-tokens", type=int, default=64, help="of a sample or verification of the judge")
    what.add_argument("--seed", type=int, default=0, help="of the problems")
    how = parser.add_argument_group("how")
    how.add_argument("--peer-python", default=sys.executable, help="interpreter with optillm and its_hub")
    how.add_argument("--python", default=sys.executable, help="interpreter with Braid and vLLM")
    how.add_argument("--quiet-cores", type=float, default=0.25, help="see benchmarks.handover")
    how.add_argument("--patience-s", type=float, default=60.0, help="seconds of waiting for a quiet machine")
    how.add_argument("--run-dir", type=absolute, help="folder of logs (default: one that is removed)")
    how.add_argument("--out", type=folder, default=RESULTS, help="folder of the result")
    return parser.parse_args(argv)


def methods(driver: PeerDriver) -> dict[str, dict[str, Method]]:
    """Every method by part and name."""

    def vote(stack: str, **options: Any) -> Braid:
        return Braid(stack, {"strategy": "self_consistency", **options})

    judged = {"strategy": "genrm", "verifier": VERIFIER, "return_samples": True}
    return {
        "vote": {
            "braid, one engine": vote("single"),
            "braid, one engine, all samples": vote("single", early_stop=False),
            "braid, prefill + decode": vote("braid"),
            "optillm self_consistency": Peer(driver, "optillm.self_consistency"),
            "optillm majority_voting": Peer(driver, "optillm.majority_voting"),
            "its_hub SelfConsistency": Peer(driver, "its_hub.self_consistency"),
        },
        "judge": {
            "braid genrm, one engine": Braid("single", judged),
            "braid genrm, prefill + decode": Braid("braid", judged),
            "optillm bon": Peer(driver, "optillm.bon"),
            "its_hub BestOfN, demo's verification": Peer(driver, "its_hub.best_of_n"),
            "its_hub BestOfN, LLMJudge": Peer(driver, "its_hub.best_of_n_judge"),
        },
    }


class Run:
    """One run: collects records and turns, and can always say what it has so far."""

    def __init__(self, args: argparse.Namespace, run_dir: Path) -> None:
        self.args = args
        self.driver = PeerDriver(interpreter(args.peer_python), run_dir / "peers.log")
        self.methods = {
            part: {
                name: method
                for name, method in found.items()
                if args.methods is None or name in args.methods
                if isinstance(method, Braid) or method.name in self.driver.methods
            }
            for part, found in methods(self.driver).items()
            if part in args.parts
        }
        self.names = {
            f"{Path(interpreter(args.peer_python)).parent}/": "",
            f"{Path(interpreter(args.python)).parent}/": "",
            str(args.model): "MODEL",
            str(run_dir): "RUN_DIR",
            str(ROOT): "BRAID",
        }
        pace = Pace(warmups=1, quiet_cores=args.quiet_cores, patience_s=args.patience_s)
        self.bench = SideBySide(
            launchers(args, run_dir, self._stacks()), Prompts(args.model, args.seed), pace
        )
        self.records: list[Record] = []
        self.turns: list[Turn] = []
        self.started = datetime.now(UTC)
        self.machine = describe_machine()
        self.ended_by = ""

    def _stacks(self) -> set[str]:
        return {method.stack for found in self.methods.values() for method in found.values()}

    def stop(self) -> None:
        """End everything that was started."""
        self.bench.stop()
        self.driver.stop()

    def measure(self) -> None:
        """All parts; what ends them early is kept in `ended_by` and raised."""
        try:
            self.bench.start()
            progress("all stacks are ready")
            if "vote" in self.methods:
                self._vote()
            if "judge" in self.methods:
                self._judge()
        except BaseException as error:
            self.ended_by = describe(error)
            raise

    def _vote(self) -> None:
        args = self.args
        asked = problems("test", args.seed, args.first + args.problems)[args.first :]
        for number, start in enumerate(range(0, len(asked), args.block)):
            block = asked[start : start + args.block]
            for position, name in enumerate(rotated(list(self.methods["vote"]), number)):
                questions = [self._ask(name, problem.prompt, args.max_tokens) for problem in block]
                self._turn("vote", name, number, position, block, questions)

    def _judge(self) -> None:
        args = self.args
        for number, problem in enumerate(problems("test", args.seed, args.rounds)):
            for position, name in enumerate(rotated(list(self.methods["judge"]), number)):
                key = f"{args.seed}:{number}:{position}"
                self._turn(
                    "judge", name, number, position, [problem], [self._ask(name, key, args.judge_tokens)]
                )

    def _ask(self, name: str, question: str, max_tokens: int) -> Ask:
        args = self.args
        return Ask(question, args.n, max_tokens, args.temperature, args.k, salt=name)

    def _turn(
        self, part: str, name: str, number: int, position: int, block: Sequence[Problem], asks: Sequence[Ask]
    ) -> None:
        """A method's questions on its stack, one at a time, warm and with an empty prefix cache."""
        method = self.methods[part][name]
        with self.bench.turn(method.stack) as (stack, client):
            if part == "judge":  # a key until now: the stack counts the tokens of what it stands for
                key, length = asks[0].question, self.args.prompt_tokens
                asks = [
                    replace(
                        asks[0], question=long_question(client, stack.model, block[0].prompt, key, length)
                    )
                ]
            warm = replace(asks[0], question=f"{part} {number}. " + WARM, n=2, max_tokens=8, k=1)
            method.answer(stack, client, warm)
            if method.stack == "plain":
                empty_prefix_cache(stack)
            before = counters(stack)
            meter = LoadMeter(lambda: stack.cpu_seconds() + self.driver.cpu_seconds())
            replies = [method.answer(stack, client, ask) for ask in asks]
            load = meter.read()
            load.stack_nice = stack.niceness() if stack.processes else 0
            engines = engine_tokens(difference(before, counters(stack)))
            turn = Turn(part, name, method.stack, number, position, len(block), engines, load)
            if part == "judge":
                turn.prompt, turn.allowed = allowed(client, stack.model, asks[0], replies[0])
        self.turns.append(turn)
        for problem, reply in zip(block, replies, strict=True):
            answer = asyncio.run(final_number(reply.text, truncated=False))
            right = answer == problem.answer
            self.records.append(Record(part, name, method.stack, number, problem.id, reply, answer, right))
        progress(f"{part} {number}: {name}: {sum(reply.seconds for reply in replies):.1f} s")

    def result(self) -> dict[str, Any]:
        """Everything the JSON file holds: how it was measured, the figures, every single measurement."""
        processes = [process for stack in self.bench.stacks.values() for process in stack.processes]
        return {
            "benchmark": "reasoning_peers",
            "started": self.started.isoformat(timespec="seconds"),
            "ended_by": self.ended_by,
            "command": command(self.args),
            "machine": self.machine,
            "versions": {
                "engines": package_versions(interpreter(self.args.python)),
                "peers": package_versions(interpreter(self.args.peer_python)),
                "missing": self.driver.missing,
            },
            "launches": [process.launch.public(self.names) for process in processes],
            "figures": figures(self.records, self.turns),
            "turns": self.turns,
            "records": self.records,
        }

    def save(self) -> Path:
        """Write the result with every path of this machine replaced."""
        text = replace_all(msgspec.json.encode(self.result()).decode(), self.names)
        path: Path = self.args.out / f"reasoning-peers-{self.started:%Y%m%d-%H%M%S}.json"
        path.write_text(msgspec.json.format(text, indent=1) + "\n")
        return path


WARM = "How many nuts are 3 jars of 12 nuts?"


def rotated(names: list[str], number: int) -> list[str]:
    """The methods' order in one round: each is first as often as any other, backwards every other time."""
    first = number % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if number // len(names) % 2 else turned


def counters(stack: Stack) -> dict[str, float]:
    """The engines' counters once they stand still."""
    last = stack.counters(ENGINE_COUNTERS)
    for _ in range(20):
        asyncio.run(asyncio.sleep(SETTLE_S))
        now = stack.counters(ENGINE_COUNTERS)
        if now == last:
            break
        last = now
    return last


def launchers(args: argparse.Namespace, run_dir: Path, wanted: set[str]) -> Mapping[str, Launcher]:
    """How to start each stack that a method needs. The engine that is compared has core 0 in each; of the
    pair, the prefill engine has it."""
    settings = EngineSettings(args.model, max_model_len=4096)
    verifiers = {
        "BRAID_VERIFIERS": json.dumps({VERIFIER: {"kind": "generative", "max_tokens": args.judge_tokens}})
    }
    known: dict[str, Launcher] = {
        "single": partial(launch_single, settings, interpreter(args.python), run_dir, **verifiers),
        "braid": partial(launch_braid, settings, interpreter(args.python), run_dir, **verifiers),
        "plain": partial(launch_server, settings, interpreter(args.python), run_dir),
    }
    return {name: launch for name, launch in known.items() if name in wanted}


def command(args: argparse.Namespace) -> str:
    """The command line that measures the same; without interpreters and folders."""
    left_out = ("peer_python", "python", "run_dir", "out", "model")
    flags = []
    for key, value in vars(args).items():
        if key in left_out or value is None:
            continue
        text = (
            " ".join(f"'{one}'" if " " in one else one for one in value) if isinstance(value, list) else value
        )
        flags.append(f"--{key.replace('_', '-')} {text}")
    return " ".join(["python -m benchmarks.reasoning_peers", *flags])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, show; SIGTERM and Ctrl-C save and show what there is. Nothing outlives it."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with ExitStack() as stack:
        run_dir = args.run_dir or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="reasoning-", ignore_cleanup_errors=True)
        )
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        run = Run(args, Path(run_dir))
        stack.callback(run.stop)
        try:
            run.measure()
        finally:
            if run.records:
                found = figures(run.records, run.turns)
                print(f"result: {run.save()}")
                print(vote_table(found.get("vote", [])), judge_table(found.get("judge", [])), sep="\n\n")
    return 1 if any(record.reply.error for record in run.records) else 0


if __name__ == "__main__":
    sys.exit(main())
