"""Strategy ``direct`` as a stream: a plain request that passes token by token, with a report at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from router.dispatch import Job
from router.sampler import Sample
from router.sse import parse_event
from router.strategies import auto, direct
from router.strategies.branches import capped
from router.strategies.options import Options
from router.strategies.scored import score
from router.strategies.spec import StrategySpec

Json = dict[str, Any]


class Streamed:
    """What a streamed ``direct`` has said so far. :meth:`hear` each part of the stream, in order."""

    def __init__(self, options: Options, told: Mapping[str, Any]) -> None:
        self.finish = ""
        self._options = options
        self._told = told
        self._texts: list[str] = []
        self._identity: Json = {}

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(self._texts)

    def hear(self, data: bytes) -> None:
        """Take in whole SSE events of chunks; raises :class:`router.sse.Broken` for what is none."""
        for raw in data.split(b"\n\n"):
            chunk = None if raw.startswith(b"data: [DONE]") else parse_event(raw)
            for choice in (chunk or {}).get("choices") or ():
                self._identity = {key: value for key, value in (chunk or {}).items() if key in _IDENTITY}
                self._texts.append((choice.get("delta") or {}).get("content") or choice.get("text") or "")
                self.finish = choice.get("finish_reason") or self.finish

    def cut(self) -> Json:
        """The chunk that ends a stream whose deadline has passed."""
        chat = self._identity.get("object") == "chat.completion.chunk"
        choice: Json = {"index": 0, "finish_reason": "length", **({"delta": {}} if chat else {"text": ""})}
        return {**self._identity, "choices": [choice]}

    async def report(self, tokens: int | None, stopped: str | None = None) -> Json:
        """The report of the last chunk; ``tokens`` as the usage tells them, if it does."""
        state = "finished" if stopped is None else "stopped_early"
        sample = Sample(0, "finished", self.text, self.finish or "length", tokens or 0)
        one = await score(sample, self._options, left_s=10.0)
        entry = {**one.report(self._options.return_samples), "state": state, "tokens": tokens}
        told = {"n": 1, "samples": [entry], "answer": one.answer, "chosen": 0, "stopped_early": stopped}
        return {**told, "tokens": tokens, **self._told}


_IDENTITY = ("id", "object", "created", "model")


def streamed(
    spec: StrategySpec, options: Options, job: Job, until: float | None
) -> tuple[Job, Streamed] | None:
    """A ``direct``, or an ``auto`` that chooses it, as a plain job; None if it is another strategy.

    ``budget_tokens`` bounds what is generated, ``until`` is when the answer is due.
    """
    body, told = job.body, Json(strategy=spec.name, group=job.group)
    if isinstance(options, auto.AutoOptions):
        choice = options.choose(greedy=body.get("temperature") == 0)
        inner, _ = options.inner(choice.row)
        body = auto.fields(choice.row, body)
        told |= {"then": inner.name, "auto": options.told(choice)}
        spec = inner
    if spec.run is not direct.run:
        return None
    if options.budget_tokens is not None:
        body = capped(body, options.budget_tokens)
    deadline = job.deadline if until is None else min(job.deadline, until)
    return replace(job, body=body, deadline=deadline), Streamed(options, told)
