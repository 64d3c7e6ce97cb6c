"""Plain load through vLLM's own benchmark client, ``vllm bench serve``, in a process of its own.

The ``vllm`` command of the CPU package ends with an error before it reads its arguments, so the
benchmark's module is called as that command would call it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import counted_paths

PROGRAM = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser(prog="vllm bench serve")
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
LIMIT_S = 1800
# Names, paths and generated texts of the tool's result; the rest are figures.
LEFT_OUT = ("model_id", "tokenizer_id", "date", "generated_texts", "label", "start_times")


class LoadFailed(RuntimeError):
    """The tool ended without a result; the message has the end of its output."""


@dataclass(frozen=True)
class PlainLoad:
    """Random prompts of ``prompt_tokens`` to ``/v1/completions``, each answered with ``max_tokens``."""

    requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int
    seed: int

    def arguments(self) -> list[str]:
        """The tool's arguments that say what the load is; they have no address and no path."""
        return [
            "--backend=openai",
            "--endpoint=/v1/completions",
            "--dataset-name=random",
            f"--random-input-len={self.prompt_tokens}",
            f"--random-output-len={self.max_tokens}",
            f"--num-prompts={self.requests}",
            f"--max-concurrency={self.concurrency}",
            f"--seed={self.seed}",
            "--ignore-eos",
            "--temperature=0",
            "--percentile-metrics=ttft,tpot,itl,e2el",
            "--metric-percentiles=50,95,99",
        ]


def available() -> bool:
    """Whether vLLM is installed beside this program."""
    return importlib.util.find_spec("vllm") is not None


def run_plain(load: PlainLoad, url: str, model: str, tokenizer: Path) -> dict[str, Any]:
    """The tool's own figures and measurements (times in ms where the name says so, else seconds).

    Raises:
        LoadFailed: it ended with an error, took too long, or completed no request.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-c", PROGRAM, *load.arguments()),
            *(f"--base-url={url.rstrip('/')}", f"--model={model}", f"--tokenizer={tokenizer}"),
            *("--save-result", "--save-detailed", f"--result-dir={folder}", "--result-filename=plain.json"),
            "--disable-tqdm",
        ]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"vllm bench serve took more than {LIMIT_S} s") from None
        result = Path(folder) / "plain.json"
        if done.returncode != 0 or not result.is_file():
            raise LoadFailed(f"vllm bench serve ended with status {done.returncode}:\n{done.stdout[-2000:]}")
        figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if not figures.get("completed"):
        raise LoadFailed(f"vllm bench serve completed no request:\n{done.stdout[-2000:]}")
    figures["failed"] = load.requests - figures["completed"]
    figures.pop("errors", None)
    return {name: value for name, value in figures.items() if name not in LEFT_OUT}


def summarise(figures: Mapping[str, Any], wanted: int, counted: Mapping[str, float]) -> dict[str, Any]:
    """The tool's figures under the names that this project's own loads have.

    It shows no headers of the replies, so KV and paths are what the router's counters grew by.
    """

    def times(metric: str) -> dict[str, Any]:
        return {p: figures.get(f"{p}_{metric}_ms") for p in ("p50", "p95", "p99")}

    failed = wanted - int(figures["completed"])
    return {
        "requests": wanted,
        "failed": {"failed": failed} if failed else {},
        "wall_s": figures["duration"],
        "ttft_ms": times("ttft"),
        "itl_ms": times("itl"),
        "total_ms": times("e2el"),
        "completion_tokens": figures["total_output_tokens"],
        "tokens_per_s": figures["output_throughput"],
        "requests_per_s": figures["request_throughput"],
        "kv_bytes": int(counted.get("braid_kv_bytes_total", 0)),
        "kv_transfers": int(counted.get("braid_kv_transfers_total", 0)),
        "paths": counted_paths(counted),
        "counters": dict(counted),
    }
