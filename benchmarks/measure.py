"""Measures several stacks side by side: one is running and asked at any moment, the others are put aside."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import httpx
import msgspec

from benchmarks.client import open_client, stream_completion, whole_completion
from benchmarks.machine import Load, LoadMeter
from benchmarks.prometheus import difference
from benchmarks.prompts import Prompts
from benchmarks.stack import Launcher, Stack

Idle = Literal["freeze", "run", "restart"]
FAILURES = (httpx.HTTPError, ValueError, msgspec.MsgspecError)
WARM_TOKENS = 100
KV_COUNTERS = ("braid_kv_sent_bytes", "braid_kv_early_bytes")


class HandoverRecord(msgspec.Struct):
    """One streamed request; times in seconds, `position` is its turn's place among the stacks' turns.

    `counters` is what those of Braid's KV transfer grew by meanwhile.
    """

    stack: str
    round: int
    position: int
    prompt_tokens: int
    ttft_s: float | None = None
    first_chunk_s: float | None = None
    total_s: float | None = None
    chunks: int = 0
    text: str = ""
    headers: dict[str, str] = {}
    counters: dict[str, float] = {}
    error: str = ""
    turn: Load | None = None


class FanoutRecord(msgspec.Struct):
    """One request with `n` samples; `counters` is what each metric grew by while it ran."""

    stack: str
    round: int
    position: int
    n: int
    prompt_tokens: int
    wall_s: float | None = None
    completion_tokens: int = 0
    counters: dict[str, float] = {}
    headers: dict[str, str] = {}
    error: str = ""
    turn: Load | None = None


@dataclass
class Pace:
    """How turns follow one another; seconds and cores.

    A turn starts once programs at nice <= 0 outside this benchmark use at most `quiet_cores` over `sample_s`,
    or `patience_s` has been spent waiting in the whole run. `gap_s` lies between two requests.
    """

    idle: Idle = "freeze"
    warmups: int = 2
    gap_s: float = 0.05
    thaw_timeout_s: float = 60.0
    quiet_cores: float = 0.25
    sample_s: float = 0.3
    patience_s: float = 600.0


@dataclass
class SideBySide:
    """Owns the stacks from `start()` to `stop()` and gives turns to them.

    At most one stack runs at a time, unless `pace.idle` is "run".
    """

    launchers: Mapping[str, Launcher]
    prompts: Prompts
    pace: Pace
    stacks: dict[str, Stack] = field(default_factory=dict)
    _warmed: int = 0

    def start(self) -> None:
        """Launch every stack, one after the other; with idle "restart" each turn does that itself."""
        if self.pace.idle == "restart":
            return
        for name, launch in self.launchers.items():
            self.stacks[name] = launch()
            self._put_aside(self.stacks[name])

    def stop(self) -> None:
        for stack in self.stacks.values():
            stack.stop()

    def order(self, round_number: int) -> list[str]:
        """The stacks in the order of one round: each is first, and each follows each other, equally often.

        A stack that keeps every core busy can leave the machine slower for the next one.
        """
        names = list(self.launchers)
        first = round_number % len(names)
        turned = names[first:] + names[:first]
        return turned[::-1] if round_number // len(names) % 2 else turned

    @contextmanager
    def turn(self, name: str) -> Iterator[tuple[Stack, httpx.Client]]:
        """The named stack, running and warm, and a connected client; put aside again on exit."""
        self._wait_for_quiet()
        stack = self._take_up(name)
        try:
            with open_client(stack.base_url) as client:
                self._warm(client, stack.model)
                yield stack, client
        finally:
            self._put_aside(stack)

    def _take_up(self, name: str) -> Stack:
        if self.pace.idle == "restart":
            self.stacks[name] = self.launchers[name]()
        stack = self.stacks[name]
        stack.thaw()
        stack.wait_ready(self.pace.thaw_timeout_s)
        return stack

    def _put_aside(self, stack: Stack) -> None:
        if self.pace.idle == "freeze":
            stack.freeze()
        elif self.pace.idle == "restart":
            stack.stop()

    def _wait_for_quiet(self) -> None:
        while self.pace.patience_s > 0:
            meter = LoadMeter(lambda: sum(stack.cpu_seconds() for stack in self.stacks.values()))
            time.sleep(self.pace.sample_s)
            load = meter.read()
            if load.others - load.nice <= self.pace.quiet_cores:
                return
            self.pace.patience_s -= load.wall_s

    def _warm(self, client: httpx.Client, model: str) -> None:
        """Uncounted requests through the whole path, until `warmups` in a row went well.

        They also reconnect what a frozen stack's peers have closed meanwhile.
        """
        deadline = time.monotonic() + self.pace.thaw_timeout_s
        good = 0
        while good < self.pace.warmups:
            self._warmed += 1
            body = completion(
                model, self.prompts.draw("warm", self._warmed, length=WARM_TOKENS), max_tokens=2
            )
            try:
                stream_completion(client, body)
                good += 1
            except FAILURES:
                good = 0
                if time.monotonic() > deadline:
                    raise
            time.sleep(self.pace.gap_s)


def completion(model: str, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
    """A body of /v1/completions for a prompt of token ids."""
    return {"model": model, "prompt": prompt, **options}


def measure_handover(
    bench: SideBySide, requests: int, lengths: Sequence[int], max_tokens: int, turn_requests: int = 1
) -> Iterator[list[HandoverRecord]]:
    """`requests` greedy requests of each prompt length on each stack, one at a time; yields finished turns.

    A turn has up to `turn_requests` of each length. A prompt goes once to each stack, so that each can be
    paired with the plain engine's time for it.
    """
    for number, start in enumerate(range(0, requests, turn_requests)):
        rounds = range(start, min(start + turn_requests, requests))
        for position, name in enumerate(bench.order(number)):
            records = []
            with bench.turn(name) as (stack, client):
                meter = LoadMeter(stack.cpu_seconds)
                for round_number, length in product(rounds, lengths):
                    prompt = bench.prompts.draw("handover", round_number, length=length)
                    body = completion(stack.model, prompt, max_tokens=max_tokens, temperature=0)
                    record = HandoverRecord(name, round_number, position, length)
                    before = stack.counters(KV_COUNTERS)
                    records.append(_hand_over(record, client, body))
                    time.sleep(bench.pace.gap_s)
                    record.counters = difference(before, stack.counters(KV_COUNTERS))
                load = meter.read()
                load.stack_nice = stack.niceness()
            for record in records:
                record.turn = load
            yield records


def _hand_over(record: HandoverRecord, client: httpx.Client, body: dict[str, Any]) -> HandoverRecord:
    try:
        seen = stream_completion(client, body)
    except FAILURES as error:
        record.error = describe(error)
        return record
    record.ttft_s, record.first_chunk_s, record.total_s = seen.first_text_s, seen.first_chunk_s, seen.total_s
    record.chunks, record.text, record.headers = seen.chunks, seen.text, seen.headers
    return record


def measure_fanout(
    bench: SideBySide, rounds: int, samples: Sequence[int], length: int, max_tokens: int
) -> Iterator[list[FanoutRecord]]:
    """`rounds` requests of each number of samples on each stack, at temperature 1; yields each finished turn.

    They have no seed: vLLM 0.32 on CPU ends its engine when a seeded prompt takes more than one chunk.
    """
    for number in range(rounds):
        for position, name in enumerate(bench.order(number)):
            records = []
            with bench.turn(name) as (stack, client):
                for n in samples:
                    prompt = bench.prompts.draw("fanout", number, n, length=length)
                    body = completion(stack.model, prompt, max_tokens=max_tokens, temperature=1.0, n=n)
                    records.append(
                        _fan_out(FanoutRecord(name, number, position, n, length), stack, client, body)
                    )
            yield records


def _fan_out(record: FanoutRecord, stack: Stack, client: httpx.Client, body: dict[str, Any]) -> FanoutRecord:
    """One request. A stack that does not answer, or gives no counters, is an error of the record."""
    try:
        before = stack.settled_counters()
        meter = LoadMeter(stack.cpu_seconds)
        record.wall_s, reply, record.headers = whole_completion(client, body)
        record.turn = meter.read()
        record.turn.stack_nice = stack.niceness()
        record.completion_tokens = reply["usage"]["completion_tokens"]
        record.counters = difference(before, stack.settled_counters())
    except FAILURES as error:
        record.error = describe(error)
    return record


def describe(error: BaseException) -> str:
    """One line that names the error, short enough for a table of records."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
