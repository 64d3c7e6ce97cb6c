"""Requests with a strategy: parsing the extension, running it, and wording the reply."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from braid.errors import BadRequest
from braid.settings import RouterSettings
from braid.wire import KvRecord
from router import efforts, proof, strategies
from router.cluster import Cluster
from router.dispatch import Job
from router.efforts import Effort, Table
from router.groups import WorkerSampler
from router.history import Entry
from router.http import JSON, Call
from router.sampler import Answer, GroupUsage, Progress
from router.sse import DONE, event
from router.strategies import StrategySpec
from router.strategies.options import Options
from router.validate import Request, integer

_SUFFIX = re.compile(r"(?P<strategy>[a-z][a-z0-9_]{0,63})(:(?P<n>[0-9]{1,6}))?")
_SSE = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")]
_OURS = ("n", "stream", "stream_options")
_LEAST_S = 1e-3

GRACE_S = 0.03
"""How long after a request's deadline its cancelled samples may still say what they have cost."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A strategy with its checked options. ``slots``: samples that run at the same time."""

    spec: StrategySpec
    options: Options
    slots: int


def split(body: dict[str, Any], served: Sequence[str], effort: Effort = "pass") -> dict[str, Any] | None:
    """Take the reasoning extension out of a body, also from the model's name; None if there is none.

    The result has ``strategy`` and the options. ``direct`` without options is a plain request. OpenAI's own
    ``reasoning.effort`` becomes ``reasoning_effort``, which the engine reads (``effort`` ``pass``), or
    strategy ``auto`` where no strategy is named (``auto``).

    Raises:
        BadRequest: the extension is malformed or contradicts itself.
    """
    options: dict[str, Any] | None = body.pop("reasoning", None)
    if options is not None and not isinstance(options, dict):
        raise BadRequest("reasoning must be an object.", param="reasoning")
    model = body.get("model")
    named = _from_name(model, served) if isinstance(model, str) else None
    if named is not None:
        body["model"], suffix = named
        options = _agree(options or {}, suffix, "the model's name and reasoning")
    options = efforts.separate(body, options, effort)
    if options is None:
        return None
    if not isinstance(options.get("strategy"), str):
        raise BadRequest(
            f"reasoning.strategy is missing; it is one of {', '.join(strategies.names())}.",
            param="reasoning.strategy",
        )
    strategies.get(options["strategy"])
    if body.get("n") is not None:
        options = _agree(options, {"n": body.pop("n")}, "n and reasoning.n")
    if options["strategy"] == "direct" and options.keys() <= {"strategy", "n"}:
        body.update({key: value for key, value in options.items() if key == "n"})
        return None
    return options


def prepare(
    plan: Mapping[str, Any], request: Request, settings: RouterSettings, table: Table | None = None
) -> Prepared:
    """Check a strategy's options; ``auto`` goes by ``table``. Raises :class:`BadRequest`."""
    context = {"efforts": table}
    if request.prompts != 1:
        raise BadRequest("A strategy takes one prompt a request.", param="prompt")
    n = plan.get("n")
    if n is not None and not integer(n, 1, settings.max_n):
        raise BadRequest(f"reasoning.n must be an integer from 1 to {settings.max_n}.", param="reasoning.n")
    spec = strategies.get(plan["strategy"])
    if "trigger" in spec.options.model_fields:
        plan = {"trigger": settings.trigger, **plan}
    options = spec.parse(plan, context)
    if options.n > settings.max_n:  # a default, as the client gave none
        options = spec.parse({**plan, "n": settings.max_n}, context)
    return Prepared(spec, options, options.slots)


async def run(cluster: Cluster, call: Call, job: Job, prepared: Prepared, stream: bool, entry: Entry) -> None:
    """Answer ``call`` with what the strategy makes of it, and tell ``entry`` of it; raises
    :class:`braid.errors.BraidError`."""
    cluster.metrics.strategies.labels(prepared.spec.name).inc()
    options = prepared.options
    until = call.due(options.deadline_s)
    if until is not None:
        left = max(_LEAST_S, until - asyncio.get_running_loop().time())
        options = options.model_copy(update={"deadline_s": left})
    job = replace(job, several=prepared.slots > 1, cut_at=None if until is None else until + GRACE_S)
    sampler = WorkerSampler(cluster, job)
    reply = _Reply(cluster, call, job, sampler)
    body = {key: value for key, value in job.body.items() if key not in _OURS}
    entry.follow(reply.workers, prepared.spec.name)

    async def progress(told: Mapping[str, Any]) -> None:
        entry.told(told)
        if stream:
            await reply.progress(told)

    try:
        answer = await prepared.spec.run(sampler, body, options, progress)
        answer.report["group"] = job.group
        usage = usage_of(answer)
        entry.spent(usage, answer.report)
        call.trace.usage(usage)
        await (reply.finish_stream(answer) if stream else reply.whole(answer))
    finally:
        sampler.forget()
        proof.count(cluster.metrics, _kv(sampler.usages))


class _Reply:
    """Words one strategy's reply, whole or as a stream."""

    def __init__(self, cluster: Cluster, call: Call, job: Job, sampler: WorkerSampler) -> None:
        self._cluster = cluster
        self._call = call
        self._job = job
        self._sampler = sampler
        self._chat = job.target.endswith("/chat/completions")
        self._created = int(time.time())

    async def progress(self, told: Mapping[str, Any]) -> None:
        """Stream an event of the strategy; a :data:`Progress`."""
        told = {**told, "group": self._job.group}
        await self._write({"choices": [self._choice({}, None)], "reasoning": told})

    def workers(self) -> tuple[str, list[str]]:
        """The prefill workers, joined, and the decode workers so far."""
        return _prefill(self._sampler.usages), list(self._records(self._sampler.usages))

    async def whole(self, answer: Answer) -> None:
        kind = "chat.completion" if self._chat else "text_completion"
        reply = {
            **self._frame(kind),
            "choices": [{**answer.choice, "index": 0}],
            "usage": usage_of(answer),
            "reasoning": self._report(answer),
            "braid": self._proof(answer.usages),
        }
        headers = [JSON, *self._headers(answer.usages)]
        await self._call.respond(200, headers, msgspec.json.encode(reply))

    async def finish_stream(self, answer: Answer) -> None:
        await self._write({"choices": [self._choice(answer.choice, None)]})
        last = {
            "choices": [self._choice({}, answer.choice.get("finish_reason") or "stop")],
            "reasoning": self._report(answer),
            "braid": self._proof(answer.usages),
        }
        await self._write(last)
        options = self._job.body.get("stream_options") or {}
        if options.get("include_usage"):
            await self._write({"choices": [], "usage": usage_of(answer)})
        await self._call.write(DONE, more=False)

    async def _write(self, fields: Mapping[str, Any]) -> None:
        if not self._call.started:
            await self._call.start(200, [*_SSE, *self._headers(self._sampler.usages)])
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        await self._call.write(event({**self._frame(kind), **fields}))

    def _report(self, answer: Answer) -> dict[str, Any]:
        redrawn = sum(group.fanout.redrawn for group in self._sampler.groups)
        return answer.report | ({"samples_redrawn": redrawn} if redrawn else {})

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._chat else "cmpl"
        return {
            "id": f"{prefix}-{self._job.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._job.model,
        }

    def _choice(self, choice: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        if self._chat:
            return {"index": 0, "delta": _delta(choice.get("message")), "finish_reason": finish}
        text = choice.get("text") or ""
        return {"index": 0, "text": text, "logprobs": choice.get("logprobs"), "finish_reason": finish}

    def _headers(self, usages: Sequence[GroupUsage]) -> list[tuple[str, str]]:
        return proof.headers(self._call.request_id, _prefill(usages), self._records(usages))

    def _proof(self, usages: Sequence[GroupUsage]) -> dict[str, Any]:
        return {**proof.body(_prefill(usages), self._records(usages)), "group": self._job.group}

    def _records(self, usages: Sequence[GroupUsage]) -> dict[str, KvRecord | None]:
        placed = [share.worker.name for group in self._sampler.groups for share in group.fanout.shares]
        known = _kv(usages)
        return {name: known.get(name) for name in (*placed, *known)}


def _delta(message: Any) -> dict[str, Any]:
    """A chat message as one delta: what is set of it, tool calls numbered."""
    if not isinstance(message, Mapping):
        return {}
    delta = {key: value for key, value in message.items() if value not in (None, [])}
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
    return delta


def _kv(usages: Sequence[GroupUsage]) -> dict[str, KvRecord | None]:
    return proof.by_worker(pair for usage in usages for pair in usage.kv.items())


def _prefill(usages: Sequence[GroupUsage]) -> str:
    return ",".join(dict.fromkeys(usage.prefill for usage in usages if usage.prefill))


def usage_of(answer: Answer) -> dict[str, Any]:
    """OpenAI's usage: each token once. Of a prompt that goes on from a sample only what is new counts as
    prompt; the rest has been counted, and ``continued_tokens`` tells it, ``recomputed_tokens`` how much of it
    no cache had. ``reasoning_tokens`` are those generated beside the returned answer."""
    usages = answer.usages
    prompt = sum(usage.prompt_tokens - usage.continued_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    read = {"cached_tokens": sum(max(0, one.cached_tokens - one.continued_tokens) for one in usages)}
    if continued := sum(usage.continued_tokens for usage in usages):
        again = sum(max(0, one.continued_tokens - one.cached_tokens) for one in usages)
        read |= {"continued_tokens": continued, "recomputed_tokens": again}
    beside = max(0, completion - answer.tokens) if answer.tokens is not None else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": read,
        "completion_tokens_details": {"reasoning_tokens": beside},
    }


def _from_name(model: str, served: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The served model and options of a name like ``demo+self_consistency:16``."""
    base, plus, suffix = model.rpartition("+")
    if not plus or model in served or base not in served:
        return None
    match = _SUFFIX.fullmatch(suffix)
    if match is None:
        raise BadRequest("A model's suffix is +strategy or +strategy:n.", param="model")
    options: dict[str, Any] = {"strategy": match["strategy"]}
    if match["n"] is not None:
        options["n"] = int(match["n"])
    return base, options


def _agree(options: Mapping[str, Any], other: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Both together; raises :class:`BadRequest` where they differ."""
    for key, value in other.items():
        if key in options and (options[key] != value or type(options[key]) is not type(value)):
            raise BadRequest(f"{what} contradict each other.", param=f"reasoning.{key}")
    return {**options, **other}


__all__ = ["Prepared", "Progress", "prepare", "run", "split"]
