"""The Sampler over decode workers: a group of samples as shares in mode ``samples``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from braid import errors, wire
from braid.errors import BraidError
from router import proof
from router.cluster import Cluster
from router.dispatch import Failed, Fanout, Job, Share
from router.retrievers import Retriever
from router.sampler import GroupUsage, Sample, State
from router.validate import prompt_chars
from router.verifiers import Verifier

log = logging.getLogger("braid.router.groups")

CLOSE_S = 5.0
"""Longest wait for the samples of a closed group to end."""

COPY_S = 0.25
"""Longest wait for what the copies of redrawn samples have cost, once every sample has ended."""

_STATES: dict[str, State] = {"finished": "finished", "cancelled": "stopped_early", "failed": "failed"}
_BY_STATUS: dict[int, type[BraidError]] = {
    kind.status: kind
    for kind in (
        errors.BadRequest,
        errors.NotFound,
        errors.TooLarge,
        errors.Overloaded,
        errors.Unavailable,
        errors.DeadlineExceeded,
    )
}


class WorkerSampler:
    """A :class:`router.sampler.Sampler` for one request. ``groups`` are those it has opened."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self.groups: list[WorkerGroup] = []
        self._cluster = cluster
        self._job = job

    def group(
        self,
        body: Mapping[str, Any],
        n: int,
        first: int = 0,
        *,
        keep: bool = False,
        after: Sample | None = None,
        watch: wire.Watch | wire.Verdict | None = None,
    ) -> WorkerGroup:
        position = len(self.groups)
        request_id = f"{self._job.request_id}-{position}" if position else self._job.request_id
        body = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        job = replace(
            self._job,
            body={**body, "n": n},
            model=body.get("model") or self._job.model,  # a verifier may be another one
            n=n,
            mode="samples",
            request_id=request_id,
            local=self._local(body),
            first=first,
            keep=keep,
            watch=watch,
            home=self._home(body) if after is None else after.worker,
            after="" if after is None else after.kept,
            trace=self._job.trace.begin("group", request_id=request_id, n=n, first=first),
        )
        group = WorkerGroup(Fanout(self._cluster, job), 0 if after is None else self._told(after))
        self.groups.append(group)
        return group

    def _told(self, after: Sample) -> int:
        """Tokens of a sample and of the prompt it was drawn from."""
        for group in self.groups:
            job = group.fanout.job
            if job.first <= after.index < job.first + job.n:
                return group.usage.prompt_tokens + after.tokens
        return 0

    def _local(self, body: Mapping[str, Any]) -> str:
        """The job's reason not to prefill remotely; a strategy's prompt may be longer than the client's."""
        long = prompt_chars(body) >= self._cluster.settings.remote_min_chars
        return "" if self._job.local == "short" and long else self._job.local

    def _home(self, body: Mapping[str, Any]) -> str:
        """The worker that has the prompt from an earlier wave, if one alone has."""
        for group in reversed(self.groups):
            if _prompt(group.fanout.job.body) == _prompt(body):
                workers = {share.worker.name for share in group.fanout.shares}
                return workers.pop() if len(workers) == 1 else ""
        return ""

    def forget(self) -> None:
        """Nothing goes on from what has been kept: the request has ended."""
        for group in self.groups:
            group.fanout.forget()

    def verifier(self, name: str) -> Verifier:
        return self._cluster.verifiers.get(name)

    def retriever(self, name: str | None) -> Retriever:
        return self._cluster.retrievers.get(name)

    @property
    def usages(self) -> list[GroupUsage]:
        return [group.usage for group in self.groups]


class WorkerGroup:
    """A :class:`router.sampler.Group`. Owns its fan-out: started on entry, closed on exit."""

    def __init__(self, fanout: Fanout, told: int = 0) -> None:
        """``told``: tokens at the beginning of the prompt that the request has told of already."""
        self.usage = GroupUsage()
        self._told = told
        self.fanout = fanout
        self._outstanding = set(range(fanout.job.first, fanout.job.first + fanout.job.n))
        self._tokens: dict[Share, int] = {}
        self._produced = False
        self._held: list[Sample] = []
        self._samples = self._read()

    async def __aenter__(self) -> WorkerGroup:
        try:
            self.fanout.start()
        except BraidError as error:
            self.fanout.job.trace.end(error.label)
            raise
        self._note_workers()
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            if not isinstance(exc[1], asyncio.CancelledError):
                await self._wind_down()
        finally:
            await self._samples.aclose()
            self.fanout.close()
            self._bill_rest()
            self._note_workers()
            self._end_span(exc[1])

    def __aiter__(self) -> AsyncIterator[Sample]:
        return self._samples

    async def cancel(self, indices: tuple[int, ...] | None = None) -> None:
        running = self._outstanding if indices is None else self._outstanding.intersection(indices)
        self.fanout.cancel(sorted(running))

    async def redraw(self, indices: tuple[int, ...]) -> None:
        self.fanout.redraw(sorted(self._outstanding.intersection(indices)))

    async def _wind_down(self) -> None:
        """Cancel what runs and read on until every share has told its usage."""
        await self.cancel()
        try:
            async with asyncio.timeout(CLOSE_S):
                async for _ in self._samples:
                    pass
        except TimeoutError:
            log.warning("group did not end", extra={"request_id": self.fanout.job.request_id})
        except BraidError:
            # The reader has its answer or its error already; this one came too late to matter.
            return

    def _end_span(self, error: object) -> None:
        usage = self.usage
        self.fanout.job.trace.end(
            error.label if isinstance(error, BraidError) else "",
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            cancelled=True if isinstance(error, asyncio.CancelledError) else None,
        )

    async def _read(self) -> AsyncGenerator[Sample, None]:
        error: BraidError | None = None
        async for share, message in self.fanout.events():
            match message:
                case wire.Sample():
                    ended = self._on_sample(share, message)
                case wire.GroupDone():
                    error = self._on_done(share, message) or error
                    ended = self._missing(share, error)
                case Failed(error):
                    self._bill(share, 0)
                    ended = self._missing(share, error)
                case _:
                    continue
            for sample in ended:
                yield sample
        if not self._produced and error is not None:
            raise error
        for sample in self._held:
            yield sample

    def _on_sample(self, share: Share, message: wire.Sample) -> list[Sample]:
        self._tokens[share] = self._tokens.get(share, 0) + message.tokens
        if message.index not in self._outstanding:
            return []
        if self.fanout.copies(message.index):
            if message.state != "finished":
                return []  # its other copy may yet finish
            self.fanout.cancel((message.index,))
        self._outstanding.discard(message.index)
        if self.fanout.redrawn and not self._outstanding:
            self.fanout.end_within(COPY_S)
        self._produced = self._produced or message.state != "failed"
        ready, self._held = (
            [*self._held, _sample(message, share.worker.name, self.fanout.kept(share, message.index))],
            [],
        )
        return ready

    def _on_done(self, share: Share, message: wire.GroupDone) -> BraidError | None:
        usage = self.usage
        self._bill(share, message.choice_tokens)
        usage.prompt_tokens = max(usage.prompt_tokens, message.prompt_tokens)
        usage.cached_tokens = max(usage.cached_tokens, message.cached_tokens)
        usage.continued_tokens = min(self._told, usage.prompt_tokens)
        job = self.fanout.job
        self.fanout.cluster.estimates.learn(job.model, job.body, share.n, message)
        self._note_workers()
        return None if message.status == 200 else from_engine(message.status, message.body)

    def _bill(self, share: Share, choice_tokens: int) -> None:
        """Count a share's tokens, once: what it says that it has generated, or what its samples have."""
        self.usage.completion_tokens += max(choice_tokens, self._tokens.pop(share, 0))

    def _bill_rest(self) -> None:
        """Count what shares that told no usage have told otherwise: their end was not waited for."""
        for share in list(self._tokens):
            self._bill(share, 0)
        if not self.usage.prompt_tokens:
            self.usage.prompt_tokens = self.fanout.prompt_tokens
            self.usage.cached_tokens = self.fanout.cached_tokens
            self.usage.continued_tokens = min(self._told, self.usage.prompt_tokens)

    def _missing(self, share: Share, error: BraidError | None) -> list[Sample]:
        """The samples that a share ended without. Held back while nothing has been produced: then the
        group as a whole may turn out to be an error."""
        mine = self._outstanding.intersection(range(share.first, share.first + share.n))
        missing = sorted(i for i in mine if not self.fanout.copies(i))
        self._outstanding.difference_update(missing)
        reason = error.message if error is not None else "The worker ended without this sample."
        state: State = "stopped_early" if isinstance(error, errors.DeadlineExceeded) else "failed"
        samples = [Sample(index, state, error=reason) for index in missing]
        if self._produced or (error is None and missing):
            return samples
        self._held += samples
        return []

    def _note_workers(self) -> None:
        fanout = self.fanout
        self.usage.prefill = fanout.prefill
        known = proof.by_worker((share.worker.name, share.kv) for share in fanout.shares)
        self.usage.kv.update({name: record for name, record in known.items() if record is not None})


_LIMITS = ("n", "max_tokens", "max_completion_tokens", "min_tokens")


def _prompt(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body without what says how much is generated: waves inside a budget differ in that."""
    return {key: value for key, value in body.items() if key not in _LIMITS}


def from_engine(status: int, body: bytes) -> BraidError:
    """An engine's OpenAI-shaped error as one of ours, with its message, param and code."""
    kind = _BY_STATUS.get(status, errors.BadRequest if 400 <= status < 500 else errors.UpstreamFailed)
    try:
        told = msgspec.json.decode(body)["error"]
        message, param, code = str(told["message"]), told.get("param"), told.get("code")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        return kind("The decode worker could not serve this request.")
    return kind(message, param=param, code=None if code is None else str(code))


def _sample(message: wire.Sample, worker: str, kept: str) -> Sample:
    state, error = _STATES[message.state], message.error
    choice: Any = {}
    if message.choice:
        try:
            choice = msgspec.json.decode(message.choice)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            choice = None
        if not isinstance(choice, dict):
            state, choice, error = "failed", {}, "The worker's choice is not a JSON object."
    return Sample(
        index=message.index,
        state=state,
        text=message.text,
        finish_reason=message.finish_reason,
        tokens=message.tokens,
        logprob=message.logprob,
        choice=choice,
        error=error,
        confidence=message.confidence,
        worker=worker,
        kept=kept,
    )
