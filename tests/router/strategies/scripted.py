"""A sampler that follows a script, and running a strategy against it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from braid.errors import BraidError
from router import strategies
from router.sampler import Answer, GroupUsage, Sample


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
    with a sample raises. ``opened`` is what was asked for.
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
        self.cancels = 0
        self.closed = False

    @property
    def waves(self) -> list[int]:
        """Sizes of the groups."""
        return [n for _, n in self.opened]

    @property
    def prompts(self) -> list[str]:
        """The last message of each group."""
        return [body["messages"][-1]["content"] for body, _ in self.opened]

    def group(self, body: Mapping[str, Any], n: int, first: int = 0) -> ScriptedGroup:
        assert first == sum(self.waves), "samples are numbered over all groups"
        self.opened.append((body, n))
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

    async def __aenter__(self) -> ScriptedGroup:
        await asyncio.sleep(self.script.entry_delay_s)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.script.closed = True
        self.usage.completion_tokens = sum(ended.tokens for _, ended in self.mine)

    async def __aiter__(self) -> AsyncIterator[Sample]:
        if self.error is not None:
            raise self.error
        for place, ended in self.mine:
            if place >= self.script.hang_from:
                await self.cancelled.wait()
            if self.cancelled.is_set():
                yield replace(ended, state="stopped_early", text="", finish_reason="", choice={})
            else:
                yield ended

    async def cancel(self, indices: tuple[int, ...] | None = None) -> None:
        assert indices is None
        self.script.cancels += 1
        self.cancelled.set()


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
