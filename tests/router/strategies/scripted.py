"""A sampler that follows a script, and running a strategy against it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from braid.errors import BraidError
from braid.wire import Verdict, Watch
from router import strategies
from router.retrievers import Retriever, choose
from router.sampler import Answer, GroupUsage, Sample
from router.services import named
from router.verifiers import GenerativeVerifier, Verifier
from router.verifiers.local import ArithmeticVerifier, LogprobVerifier

_OWN: dict[str, Verifier] = {
    one.name: one for one in (GenerativeVerifier("self"), ArithmeticVerifier(), LogprobVerifier())
}


def sample(
    index: int, text: str = "", logprob: float | None = -1.0, tokens: int = 10, **fields: Any
) -> Sample:
    """A sample that finished unless ``fields`` say otherwise."""
    state = fields.pop("state", "finished")
    reason = fields.pop("finish_reason", "stop" if state == "finished" else "")
    choice = {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return Sample(index, state, text, reason, tokens, logprob, choice, **fields)


class Scripted:
    """A Sampler whose groups end with given samples in a given order: of all samples those that a group
    asks for by number.

    ``hang_from``: samples from this place on end only when cancelled. ``errors``: what the group that begins
    with a sample raises. ``opened`` is what was asked for; ``kept``, ``after`` and ``watched`` say
    how, a group each.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        hang_from: float = math.inf,
        entry_delay_s: float = 0.0,
        errors: Mapping[int, BraidError] | None = None,
    ) -> None:
        self.samples = list(samples)
        self.hang_from = hang_from
        self.entry_delay_s = entry_delay_s
        self.errors = errors or {}
        self.opened: list[tuple[Mapping[str, Any], int]] = []
        self.kept: list[bool] = []
        self.after: list[Sample | None] = []
        self.watched: list[Watch | Verdict | None] = []
        self.verifiers: dict[str, Verifier] = dict(_OWN)
        self.retrievers: dict[str, Retriever] = {}
        self.cancels = 0
        self.cut: list[int] = []
        self.redrawn: list[int] = []
        self.open = 0
        self.most_open = 0
        self.closed = False

    @property
    def waves(self) -> list[int]:
        """Sizes of the groups."""
        return [n for _, n in self.opened]

    @property
    def prompts(self) -> list[str]:
        """The last message of each group."""
        return [body["messages"][-1]["content"] for body, _ in self.opened]

    def verifier(self, name: str) -> Verifier:
        return named(self.verifiers, name, "verifier", "reasoning.verifier")

    def retriever(self, name: str | None) -> Retriever:
        return choose(self.retrievers, name, "reasoning.retriever")

    def group(
        self,
        body: Mapping[str, Any],
        n: int,
        first: int = 0,
        *,
        keep: bool = False,
        after: Sample | None = None,
        watch: Watch | Verdict | None = None,
    ) -> ScriptedGroup:
        assert first == sum(self.waves), "samples are numbered over all groups"
        self.opened.append((body, n))
        self.kept.append(keep)
        self.after.append(after)
        self.watched.append(watch)
        mine = [(place, one) for place, one in enumerate(self.samples) if first <= one.index < first + n]
        assert n == len(mine)
        return ScriptedGroup(self, mine, self.errors.get(first))


class ScriptedGroup:
    def __init__(self, script: Scripted, mine: list[tuple[int, Sample]], error: BraidError | None) -> None:
        self.script = script
        self.mine = mine
        self.error = error
        self.usage = GroupUsage(prompt_tokens=7)
        self.cancelled = asyncio.Event()
        self.going = asyncio.Event()

    async def __aenter__(self) -> ScriptedGroup:
        self.script.open += 1
        self.script.most_open = max(self.script.most_open, self.script.open)
        await asyncio.sleep(self.script.entry_delay_s)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.script.open -= 1
        self.script.closed = True
        self.usage.completion_tokens = sum(ended.tokens for _, ended in self.mine)

    async def __aiter__(self) -> AsyncIterator[Sample]:
        if self.error is not None:
            raise self.error
        for place, ended in self.mine:
            if place >= self.script.hang_from:
                await self.going.wait()
            if self.cancelled.is_set():
                yield replace(ended, state="stopped_early", text="", finish_reason="", choice={})
            else:
                yield ended

    async def cancel(self, indices: tuple[int, ...] | None = None) -> None:
        if indices is not None:
            self.script.cut += indices
        self.script.cancels += 1
        self.cancelled.set()
        self.going.set()

    async def redraw(self, indices: tuple[int, ...]) -> None:
        self.script.redrawn += indices
        self.going.set()


async def ask(
    name: str, sampler: Scripted, body: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Answer, list[Mapping[str, Any]]]:
    """Run a strategy by name; returns its answer and the progress events."""
    events: list[Mapping[str, Any]] = []

    async def progress(event: Mapping[str, Any]) -> None:
        events.append(event)

    spec = strategies.get(name)
    options.setdefault("n", len(sampler.samples))
    chat = {"messages": [{"role": "user", "content": "2+2?"}]}
    answer = await spec.run(sampler, chat if body is None else body, spec.parse(options), progress)
    return answer, events
