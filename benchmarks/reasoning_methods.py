"""The methods under comparison: Braid's strategies over HTTP, the peers' through their driver process."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.measure import describe
from benchmarks.stack import Stack
from demo import tasks

DRIVER = Path(__file__).with_name("reasoning_driver.py")
FAILURES = (httpx.HTTPError, ValueError, LookupError, TypeError)
SYSTEM = "You are a helpful assistant."
"""OptiLLM always sends a system message; the demo model was trained on this one."""


class Reply(msgspec.Struct):
    """One question answered; `tokens` are those the method itself says it generated, None if it doesn't."""

    seconds: float
    text: str = ""
    tokens: int | None = None
    stopped_early: str | None = None
    samples: list[dict[str, Any]] = []
    prompt_tokens: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Ask:
    """A question without its trigger, and how it is to be answered; `salt` keeps methods out of each
    other's prefix cache."""

    question: str
    n: int
    max_tokens: int
    temperature: float
    k: int = 4
    salt: str = ""


@dataclass(frozen=True)
class Braid:
    """A strategy of Braid: `reasoning` without its `n`; `{"k": ...}` is filled in for `genrm`."""

    stack: str
    reasoning: Mapping[str, Any]

    def answer(self, stack: Stack, client: httpx.Client, ask: Ask) -> Reply:
        """One request; an error of the server is the reply's."""
        options = {**self.reasoning, "n": ask.n}
        if options["strategy"] == "genrm":
            options["k"] = ask.k
        body = {
            "model": stack.model,
            "messages": [{"role": "user", "content": ask.question}],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "reasoning": options,
            "cache_salt": ask.salt,
        }
        start = time.perf_counter()
        try:
            response = client.post("/v1/chat/completions", json=body)
            seconds = time.perf_counter() - start
            response.raise_for_status()
            return _read(seconds, response.json())
        except FAILURES as error:
            return Reply(time.perf_counter() - start, error=describe(error))


def _read(seconds: float, reply: Mapping[str, Any]) -> Reply:
    report, usage = reply["reasoning"], reply["usage"]
    return Reply(
        seconds,
        reply["choices"][0]["message"]["content"] or "",
        usage["completion_tokens"],
        report.get("stopped_early"),
        report["samples"],
        usage["prompt_tokens"],
    )


@dataclass
class PeerDriver:
    """The peers' process (`benchmarks/reasoning_driver.py`) from construction to `stop()`."""

    python: str
    log: Path
    methods: list[str] = field(init=False)
    missing: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.python, str(DRIVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "NO_PROXY": "127.0.0.1", "OPENAI_LOG": ""},
                cwd=self.log.parent,
                text=True,
            )
        hello = self._receive()
        self.methods, self.missing = hello["methods"], hello["missing"]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peers' process ended: {self.log.read_text(errors='replace')[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, job: Mapping[str, Any]) -> Reply:
        """One job, see the driver."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return msgspec.convert(self._receive(), Reply)

    def cpu_seconds(self) -> float:
        """CPU seconds used so far: a method's own work."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the process. Idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@dataclass(frozen=True)
class Peer:
    """A method of another project, over the plain server."""

    driver: PeerDriver
    name: str
    stack: str = "plain"

    def answer(self, stack: Stack, client: httpx.Client, ask: Ask) -> Reply:
        """One question, through the driver's own clients; what the peer raises is the reply's error."""
        return self.driver.ask(
            {
                "method": self.name,
                "url": stack.base_url,
                "model": stack.model,
                "system": SYSTEM,
                "prompt": ask.question + tasks.WORKED_SUFFIX,
                "n": ask.n,
                "k": ask.k,
                "verify": tasks.VERIFY_REQUEST,
                "temperature": ask.temperature,
                "max_tokens": ask.max_tokens,
            }
        )


Method = Braid | Peer
__all__ = ["Ask", "Braid", "Method", "Peer", "PeerDriver", "Reply"]
