"""Asking: every method on every problem, in turns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any

import httpx

from braid.client import CommandFailed, Retries, closed_loop, post
from braid.evaluate.outcome import Outcome, judge
from braid.evaluate.problems import Problem, gold
from braid.evaluate.store import Store
from braid.meter import Meter
from router.equivalence import canonical
from router.strategies.options import Options

CHAT = "/v1/chat/completions"
REFUSALS = 4
"""So many refused requests, and no answered one, are the method's fault and not a problem's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, and how.

    Attributes:
        methods: by name, the fields of their requests.
        body: fields of every request.
        block: problems that all methods answer before the next ones are begun.
        seed: of the sampling, None for none. A problem has the same for every method, so that methods that
            draw the same prompt compare on the same samples.
        salt: keeps a method from finding prompts of another in the servers' prefix caches; empty shares them.
        options: how answers are found.
        skip_refused: drop a method that the server refuses, instead of ending the run.
    """

    methods: Mapping[str, Mapping[str, Any]]
    problems: Sequence[Problem]
    body: Mapping[str, Any]
    options: Options
    concurrency: int
    block: int
    seed: int | None
    salt: str
    skip_refused: bool
    retries: Retries = field(default_factory=Retries)

    def request(self, method: str, number: int, problem: Problem) -> dict[str, Any]:
        """The request of one method for the problem numbered ``number``; the method's fields win."""
        body = {**self.body, **self.methods[method], "messages": list(problem.messages)}
        if self.seed is not None:
            body["seed"] = self.seed + number
        if self.salt:
            body["cache_salt"] = f"{self.salt}-{list(self.methods).index(method)}"
        return body


def turns(plan: Plan) -> Iterator[tuple[str, list[tuple[int, Problem]]]]:
    """Methods in turn on blocks of numbered problems, each first equally often: what drifts on the machine
    meets all methods alike."""
    names = list(plan.methods)
    numbered = enumerate(plan.problems)
    for number in count():
        block = list(islice(numbered, plan.block))
        if not block:
            return
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            yield name, block


class Run:
    """One session over a plan.

    Attributes:
        skipped: methods that the server refuses, with its words.
    """

    def __init__(self, plan: Plan, client: httpx.AsyncClient, store: Store, meter: Meter) -> None:
        self.skipped: dict[str, str] = {}
        self._plan = plan
        self._client = client
        self._store = store
        self._meter = meter
        self._refused: Counter[str] = Counter()
        self._taken = {one.method for one in store.outcomes.values() if not one.error}
        self._keys: dict[str, tuple[str, str]] = {}

    async def run(self) -> None:
        """Ask what has no answer yet.

        Raises:
            CommandFailed: the server has gone, or refuses a method.
        """
        for name, block in turns(self._plan):
            left = [(number, p) for number, p in block if not self._store.answered(name, p.id)]
            if left and name not in self.skipped:
                start = time.perf_counter()
                await closed_loop(left, self._plan.concurrency, partial(self._ask, name))
                self._store.end_turn(name, len(left), time.perf_counter() - start)

    async def _ask(self, name: str, numbered: tuple[int, Problem]) -> None:
        if name in self.skipped:
            return
        number, problem = numbered
        reply = await post(self._client, CHAT, self._plan.request(name, number, problem), self._plan.retries)
        answer, key = await self._gold(problem)
        one = await judge(name, problem.id, key, answer, self._plan.options, reply)
        self._store.add(one)
        self._meter.advance(one.completion_tokens, bool(one.error))
        self._note_refusal(one)

    async def _gold(self, problem: Problem) -> tuple[str, str]:
        if problem.id not in self._keys:
            answer = gold(problem.answer)
            self._keys[problem.id] = answer, await canonical(answer)
        return self._keys[problem.id]

    def _note_refusal(self, one: Outcome) -> None:
        name = one.method
        if one.status in (401, 403):
            raise CommandFailed(f"the server refuses the key ({one.error}): give one with --key")
        if not one.error:
            self._taken.add(name)
        elif one.status in (400, 404, 422):
            self._refused[name] += 1
        if name in self._taken or self._refused[name] < min(REFUSALS, len(self._plan.problems)):
            return
        if not self._plan.skip_refused:
            raise CommandFailed(f"the server refuses {name}: {one.error}")
        self.skipped[name] = one.error
