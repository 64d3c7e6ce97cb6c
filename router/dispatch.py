"""One request on its workers: dispatch, fallback ladder, cancel.

A :class:`Fanout` is one optional prefill and one decode share a decode worker. It sends ``Prefill`` and
every ``Decode`` at the same time, repairs what can be repaired before a share has begun to answer, and
hands the rest to its reader as events.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from braid import wire
from braid.errors import BraidError, DeadlineExceeded, Unavailable, UpstreamFailed, no_sample_in_time
from router import placement
from router.cluster import RETRY_AFTER_S, Cluster
from router.link import Dispatch, Event, Gone, Inbox
from router.pairs import make_ticket
from router.registry import Worker
from router.tracing import OFF, Trace

log = logging.getLogger("braid.router.dispatch")

_BUSY = (429, 503)
"""Statuses of a worker that another one may do better than."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a fan-out runs.

    Attributes:
        target: path on the workers' OpenAI layer.
        body: the JSON body; its ``n`` is set to each share's.
        n: samples a prompt.
        prompts: prompts in the body; more than one is never split over workers.
        deadline: on the event loop's clock.
        local: reason not to use a prefill worker, empty if there is none.
        first: number of the first sample: workers derive seeds from the number.
        keep: have the decode workers keep the samples' KV (mode ``samples``).
        home: name of the decode worker that has the prompt already; used if it is ready.
        after: what ``home`` knows the sample by that the body goes on from.
        watch: what the decode workers measure of the samples (mode ``samples``).
        several: whether the request runs several samples at a time.
        priority: lower is earlier.
        cut_at: on the event loop's clock, when nobody waits for the samples any more (mode ``samples``): its
            answer is due, and what runs is cancelled without hearing what becomes of it.
        trace: span that those of the dispatches are below.
        group: id of the request's group, for the workers' logs.
    """

    target: str
    body: Mapping[str, Any]
    model: str
    request_id: str
    deadline: float
    n: int = 1
    prompts: int = 1
    mode: Literal["http", "samples"] = "http"
    headers: tuple[tuple[str, str], ...] = ()
    local: str = ""
    first: int = 0
    keep: bool = False
    home: str = ""
    after: str = ""
    watch: wire.Watch | wire.Verdict | None = None
    several: bool = False
    priority: int = 0
    cut_at: float | None = None
    trace: Trace = OFF
    group: str = ""


@dataclass(slots=True, eq=False)
class Share:
    """Consecutive samples on one decode worker. ``begun``: its answer has started, so it can no longer
    move to another worker unseen. ``only``: the numbers among them that it is to draw, None: all. ``told``:
    those it has reported (mode ``samples``)."""

    worker: Worker
    first: int
    n: int
    dispatch: Dispatch | None = None
    prefill: Producer | None = None
    begun: bool = False
    ended: bool = False
    moved: bool = False
    heard: float = 0.0
    kv: wire.KvRecord | None = None
    only: frozenset[int] | None = None
    told: set[int] = field(default_factory=set)
    span: Trace = OFF

    def owes(self, number: int) -> bool:
        """Whether it is still to report this sample."""
        mine = self.first <= number < self.first + self.n and (self.only is None or number in self.only)
        return mine and not self.ended and number not in self.told

    @property
    def left(self) -> list[int]:
        """Numbers that it is still to report, in order."""
        return [i for i in range(self.first, self.first + self.n) if self.owes(i)]


@dataclass(slots=True, eq=False)
class Producer:
    """One attempt at a prefill."""

    worker: Worker
    ticket: wire.Ticket
    deadline: float
    dispatch: Dispatch | None = None
    done: bool = False
    failed: bool = False
    span: Trace = OFF


@dataclass(frozen=True, slots=True)
class Failed:
    """A share ended without its answer, beyond repair; of its samples, those stay that
    :meth:`Fanout.copies` counts."""

    error: BraidError


FromShare = wire.Head | wire.Body | wire.Sample | wire.GroupDone | Failed


@dataclass(slots=True, eq=False)
class Fanout:
    """Runs a :class:`Job`. Call :meth:`start`, read :meth:`events`, and always :meth:`close`.

    ``inbox``: an answer that is read as a whole needs one without a limit.
    """

    cluster: Cluster
    job: Job
    shares: list[Share] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    inbox: Inbox = field(default_factory=Inbox)
    _watched: set[Worker] = field(default_factory=set)
    _ticket_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    _redrawn: set[int] = field(default_factory=set)
    _cancelled: set[int] = field(default_factory=set)
    _ends_at: float = float("inf")
    _prefill_retried: bool = False
    _closed: bool = False

    @property
    def prefill(self) -> str:
        """Names of the prefill workers that the shares pull from, or have pulled from; may be empty."""
        pulled = [s.prefill for s in self.shares if s.prefill and (s.kv is None or s.kv.path == "remote")]
        return ",".join(dict.fromkeys(p.worker.name for p in pulled))

    @property
    def redrawn(self) -> int:
        """Samples that were drawn a second time."""
        return len(self._redrawn)

    def start(self) -> None:
        """Place the job and send everything at once.

        Raises:
            Unavailable: no decode worker is ready.
        """
        decoders = self._decoders()
        if not decoders:
            raise Unavailable("No decode worker is ready.", retry_after_s=RETRY_AFTER_S)
        job = self.job
        home = [worker for worker in decoders if worker.name == job.home]
        spread = self.cluster.settings.spread if self._divisible else "pack"
        local = "continued" if home and job.after else job.local
        if spread == "auto" and not job.after:
            home = []  # who has the prompt is one thing among others
        plan = placement.place(
            home or decoders,
            self._prefillers(),
            self.cluster.pairs.usable,
            job.n,
            spread,
            local,
            self._by_cost,
            not job.several,
        )
        self.reason = plan.reason
        self.shares = [Share(placed.worker, job.first + placed.first, placed.n) for placed in plan.shares]
        if plan.prefill is not None:
            self._send_prefill(plan.prefill, self.shares)
        for share in self.shares:
            self._send_decode(share)

    async def events(self) -> AsyncIterator[tuple[Share, FromShare]]:
        """What the shares answer, until all have ended; each share ends with one ``Body(end=True)``,
        ``GroupDone`` or :class:`Failed`.

        Raises:
            DeadlineExceeded: the job's deadline passed.
            SlowReader: the caller reads too slowly.
        """
        while not all(share.ended for share in self.shares):
            event = await self.inbox.get(self._next_timer())
            if event is None:
                answers = self._on_time(asyncio.get_running_loop().time())
            elif isinstance(event, Gone):
                answers = self._on_gone(event)
            else:
                answers = self._on_message(event)
            for answer in answers:
                yield answer

    def cancel(self, indices: Sequence[int]) -> None:
        """Stop single samples (mode ``samples``) for good: no other worker draws them.

        Idempotent; their ``Sample`` still comes.
        """
        self._cancelled.update(indices)
        for share in self.shares:
            if not share.ended:
                self._stop(share, [i for i in indices if share.first <= i < share.first + share.n])

    def redraw(self, indices: Sequence[int]) -> None:
        """Draw samples once more on other workers than they run on (mode ``samples``), as far as there are
        any. Both copies report; a sample is drawn at most twice."""
        for share in list(self.shares):
            self._redraw(share, [i for i in share.left if i in indices], "straggler")

    def end_within(self, seconds: float) -> None:
        """Wait no longer than this for what the shares that still run have to say (mode ``samples``)."""
        self._ends_at = min(self._ends_at, asyncio.get_running_loop().time() + seconds)

    def copies(self, index: int) -> int:
        """How many shares are still to report this sample."""
        return sum(share.owes(index) for share in self.shares)

    def close(self) -> None:
        """Cancel whatever still runs, at once, and stop listening. Idempotent."""
        if self._closed:
            return
        self._closed = True
        link = self.cluster.link
        for producer in self.producers:
            if producer.dispatch is not None:
                if producer.done:
                    # A share that failed or computed its prompt itself has not ended the lease.
                    link.send(producer.worker, wire.Cancel(producer.dispatch.ref))
                link.abandon(producer.dispatch)
        for share in self.shares:
            if share.dispatch is not None:
                link.abandon(share.dispatch)
        for worker in self._watched:
            worker.watchers.discard(self.inbox.gone)

    def forget(self) -> None:
        """Have the decode workers let go of kept samples. Idempotent."""
        if self.job.keep:
            for share in self.shares:
                names = tuple(self.kept(share, i) for i in range(share.first, share.first + share.n))
                self.cluster.link.send(share.worker, wire.Forget(names))

    def kept(self, share: Share, number: int) -> str:
        """What a share's decode worker knows a kept sample by; empty if none is kept."""
        if not self.job.keep or share.dispatch is None:
            return ""
        return wire.kept_name(share.dispatch.ref, number)

    # Sending

    def _decoders(self, without: Worker | None = None) -> list[Worker]:
        ready = self.cluster.registry.ready("decode", self.job.model)
        return [worker for worker in ready if worker is not without]

    def _prefillers(self, without: Worker | None = None) -> list[Worker]:
        ready = self.cluster.registry.ready("prefill", self.job.model)
        return [worker for worker in ready if worker is not without]

    @property
    def _draws(self) -> bool:
        """Whether the prefill worker draws the first token: where one sample is answered as it grows."""
        job = self.job
        return job.n == job.prompts == 1 and job.mode == "http"

    @property
    def _divisible(self) -> bool:
        """Whether there is one prompt, whose samples may be divided."""
        return self.job.prompts == 1 and self.job.local != "no_prompt"

    def _by_cost(self, workers: Sequence[Worker], n: int, local: bool) -> tuple[placement.Placed, ...]:
        job = self.job
        return self.cluster.estimates.divide(job.model, job.body, workers, n, local, not job.several)

    def _watch(self, worker: Worker) -> None:
        worker.watchers.add(self.inbox.gone)
        self._watched.add(worker)

    def _send_prefill(self, worker: Worker, shares: Sequence[Share]) -> Producer:
        now = asyncio.get_running_loop().time()
        ticket = make_ticket(self._ticket_id, len(self.producers) + 1, worker, [s.worker for s in shares])
        deadline = min(self.job.deadline, now + self.cluster.settings.prefill_timeout_s)
        producer = Producer(worker, ticket, deadline)
        producer.dispatch = self.cluster.link.open(worker, self.job.prompts, self.inbox, producer)
        producer.span = self.job.trace.begin("prefill", worker=worker.name, attempt=ticket.attempt)
        self.producers.append(producer)
        self._watch(worker)
        for share in shares:
            share.prefill = producer
        message = wire.Prefill(
            producer.dispatch.ref,
            ticket,
            self.job.target,
            msgspec.json.encode(self.job.body),
            self.job.request_id,
            deadline - now,
            self.job.group,
            draw=self._draws,
        )
        self.cluster.link.send(worker, message)
        return producer

    def _send_decode(self, share: Share) -> None:
        now = asyncio.get_running_loop().time()
        share.heard = now
        if self._divisible and self.cluster.settings.spread == "auto":
            self.cluster.estimates.prefixes.note(self.job.body, share.worker.hello.epoch)
        cost, single = share.n * self.job.prompts, not self.job.several
        share.dispatch = self.cluster.link.open(share.worker, cost, self.inbox, share, single)
        self._watch(share.worker)
        share.span = self.job.trace.begin(
            "decode", worker=share.worker.name, first=share.first, n=share.n, moved=share.moved
        )
        body = self.job.body if share.n == self.job.n else {**self.job.body, "n": share.n}
        message = wire.Decode(
            share.dispatch.ref,
            self.job.target,
            msgspec.json.encode(body),
            self.job.request_id,
            self.job.deadline - now,
            mode=self.job.mode,
            first=share.first,
            ticket=None if share.prefill is None else share.prefill.ticket,
            headers=share.span.carry(self.job.headers),
            reason=self.reason if share.prefill is None else "",
            keep=self.job.keep,
            after=self.job.after if share.worker.name == self.job.home else "",
            watch=self.job.watch,
            group=self.job.group,
            several=self.job.several,
            priority=self.job.priority,
            drawn=share.prefill is not None and self._draws,
        )
        self.cluster.link.send(share.worker, message)

    # What comes back

    def _on_message(self, event: tuple[Dispatch, wire.FromWorker]) -> list[tuple[Share, FromShare]]:
        dispatch, message = event
        owner = dispatch.owner
        if isinstance(owner, Producer):
            if isinstance(message, wire.First):
                self._on_first(owner, message)
            elif isinstance(message, wire.PrefillDone):
                self._on_prefill_done(owner, message)
            return []
        share: Share = owner
        if share.ended or dispatch is not share.dispatch:
            return []  # what a worker said before the share left it
        share.heard = asyncio.get_running_loop().time()
        if isinstance(message, wire.Head | wire.GroupDone) and message.status in _BUSY:
            if self._move(share, "busy"):
                return []
            return [*self._given_up(share), *self._from_share(share, message)]
        if isinstance(message, wire.Head | wire.Body | wire.Sample | wire.GroupDone):
            return self._from_share(share, message)
        return []

    def _from_share(
        self, share: Share, message: wire.Head | wire.Body | wire.Sample | wire.GroupDone
    ) -> list[tuple[Share, FromShare]]:
        share.begun = True
        share.span.heard(message)
        if isinstance(message, wire.Sample):
            wanted = share.owes(message.index)
            share.told.add(message.index)
            return [(share, message)] if wanted else []
        if message.kv is not None:
            share.kv = message.kv
        if isinstance(message, wire.GroupDone):
            share.ended = True
        elif isinstance(message, wire.Body) and message.end:
            share.ended = True
            if message.cut:
                error = UpstreamFailed("The decode worker could not finish this response.", code="cut")
                return [(share, msgspec.structs.replace(message, end=False)), (share, Failed(error))]
        return [(share, message)]

    def _on_first(self, producer: Producer, first: wire.First) -> None:
        for share in self._waiting(producer):
            if share.dispatch is not None:
                self.cluster.link.send(share.worker, msgspec.structs.replace(first, ref=share.dispatch.ref))

    def _on_prefill_done(self, producer: Producer, done: wire.PrefillDone) -> None:
        producer.done = True
        producer.span.heard(done)
        if done.status == 200:
            self.prompt_tokens, self.cached_tokens = done.prompt_tokens, done.cached_tokens
        elif 400 <= done.status < 499 and done.status != 429:
            # The request is at fault: each decode worker finds the same and words the answer.
            self._tell_lost(producer, "refused", None)
        else:
            self._replace_producer(producer, f"status_{done.status}")

    def _on_gone(self, gone: Gone) -> list[tuple[Share, FromShare]]:
        answers: list[tuple[Share, FromShare]] = []
        for producer in [p for p in self.producers if p.worker is gone.worker and not p.failed]:
            if producer.done:
                producer.failed = True
                self._tell_lost(producer, "prefill_lost", None)
            else:
                self._replace_producer(producer, "prefill_lost")
        for share in [s for s in self.shares if s.worker is gone.worker and not s.ended]:
            if not self._move(share, "decode_lost"):
                answers += self._given_up(share)
                if share.begun and self.job.mode == "samples":
                    self._redraw(share, share.left, "decode_lost")
                error = Unavailable("The decode worker of this request is gone.", retry_after_s=RETRY_AFTER_S)
                answers.append(self._fail(share, error))
        return answers

    def _given_up(self, share: Share) -> list[tuple[Share, FromShare]]:
        """The cancelled samples of a share that tells of them no more."""
        numbers = [i for i in share.left if i in self._cancelled]
        share.told.update(numbers)
        ref = 0 if share.dispatch is None else share.dispatch.ref
        return [(share, wire.Sample(ref, i, "cancelled")) for i in numbers]

    def _fail(self, share: Share, error: BraidError) -> tuple[Share, FromShare]:
        share.ended = True
        share.span.end(error.label)
        if share.dispatch is not None:
            self.cluster.link.abandon(share.dispatch)
        return share, Failed(error)

    # The ladder

    def _replace_producer(self, producer: Producer, reason: str) -> None:
        """Another prefill worker once, then none: the waiting shares compute their prompt."""
        producer.failed = True
        producer.span.end(reason)
        if producer.dispatch is not None:
            self.cluster.link.abandon(producer.dispatch)
        waiting = self._waiting(producer)
        other = None if self._prefill_retried or not waiting else self._prefill_for(waiting, producer.worker)
        if other is None:
            self._tell_lost(producer, reason, None)
            return
        self._prefill_retried = True
        self.cluster.metrics.retries.labels("prefill", reason).inc()
        replacement = self._send_prefill(other, waiting)
        self._tell(waiting, reason, replacement.ticket)

    def _prefill_for(self, shares: Sequence[Share], without: Worker) -> Worker | None:
        usable = self.cluster.pairs.usable
        fitting = [p for p in self._prefillers(without) if all(usable(p, share.worker) for share in shares)]
        return placement.by_load(fitting)[0] if fitting else None

    def _waiting(self, producer: Producer) -> list[Share]:
        return [s for s in self.shares if s.prefill is producer and not s.begun and not s.ended]

    def _tell_lost(self, producer: Producer, reason: str, ticket: wire.Ticket | None) -> None:
        waiting = self._waiting(producer)
        if waiting:
            self.cluster.metrics.retries.labels("recompute", reason).inc()
        self._tell(waiting, reason, ticket)

    def _tell(self, shares: Sequence[Share], reason: str, ticket: wire.Ticket | None) -> None:
        for share in shares:
            if share.dispatch is not None:
                self.cluster.link.send(share.worker, wire.Lost(share.dispatch.ref, reason, ticket))

    def _move(self, share: Share, reason: str) -> bool:
        """Send a share that has not begun to another decode worker, once. False if it can't be, or if none of
        its samples is wanted any more."""
        unwanted = self._cancelled.issuperset(share.left)
        others = [] if share.begun or share.moved or unwanted else self._decoders(share.worker)
        if not others:
            return False
        if share.dispatch is not None:
            self.cluster.link.abandon(share.dispatch)
        share.span.end(reason)
        share.moved = True
        self.cluster.metrics.retries.labels("decode", reason).inc()
        usable, single = self.cluster.pairs.usable, not self.job.several
        plan = placement.place(
            others, self._prefillers(), usable, share.n, "pack", self.job.local, single=single
        )
        share.worker, share.prefill = plan.shares[0].worker, None
        self.reason = plan.reason
        if plan.prefill is not None:
            self._send_prefill(plan.prefill, [share])
        self._send_decode(share)
        self._stop(share, [i for i in share.left if i in self._cancelled])
        return True

    def _stop(self, share: Share, numbers: Sequence[int]) -> None:
        if numbers and share.dispatch is not None:
            self.cluster.link.send(share.worker, wire.Cancel(share.dispatch.ref, tuple(numbers)))

    def _redraw(self, share: Share, numbers: Sequence[int], reason: str) -> None:
        """Have another decode worker draw samples of a share, those for which it is the first time. The
        prompt is asked of a prefill worker again, which has it in its prefix cache."""
        numbers = [i for i in numbers if i not in self._redrawn | self._cancelled]
        others = self._decoders(share.worker)
        if not numbers or not others:
            return
        n = numbers[-1] - numbers[0] + 1
        plan = placement.place(
            others, self._prefillers(), self.cluster.pairs.usable, n, "pack", self.job.local
        )
        again = Share(plan.shares[0].worker, numbers[0], n, moved=True, only=frozenset(numbers))
        self._redrawn.update(numbers)
        self.shares.append(again)
        self.cluster.metrics.retries.labels("sample", reason).inc(len(numbers))
        self.reason = plan.reason
        if plan.prefill is not None:
            self._send_prefill(plan.prefill, [again])
        self._send_decode(again)
        self._stop(again, [i for i in range(again.first, again.first + n) if not again.owes(i)])

    # Time

    def _next_timer(self) -> float:
        timers = [self.job.deadline, self._ends_at, self.job.cut_at or float("inf")]
        timers += [p.deadline for p in self.producers if not p.done and not p.failed]
        if self.job.mode == "http":
            silence = self.cluster.settings.inter_token_timeout_s
            timers += [s.heard + silence for s in self.shares if s.begun and not s.ended]
        return min(timers)

    def _on_time(self, now: float) -> list[tuple[Share, FromShare]]:
        if now >= min(self._ends_at, self.job.cut_at or float("inf")):
            return [self._fail(share, no_sample_in_time()) for share in self.shares if not share.ended]
        if now >= self.job.deadline:
            raise DeadlineExceeded("The deadline of this request has passed.")
        for producer in [p for p in self.producers if not p.done and not p.failed and now >= p.deadline]:
            self._replace_producer(producer, "prefill_timeout")
        if self.job.mode != "http":
            return []
        silence = self.cluster.settings.inter_token_timeout_s
        silent = [s for s in self.shares if s.begun and not s.ended and now >= s.heard + silence]
        return [
            self._fail(s, DeadlineExceeded("The decode worker fell silent.", code="silent")) for s in silent
        ]


__all__ = ["Event", "Failed", "Fanout", "FromShare", "Job", "Producer", "Share"]
