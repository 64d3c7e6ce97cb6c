"""Runs ``Decode`` dispatches on a simulated engine; what it tells the router is as in ``decode_server``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from braid import wire
from braid.errors import BadRequest, error_body
from braid.proof import merge
from braid.sim import reply
from braid.sim.draws import Draw, Profile, draw
from braid.sim.engine import Engine
from braid.sim.imports import Held, Imports
from braid.sim.kept import Kept
from braid.sim.request import TOKENIZE, Ask, parse, parse_tokenize
from braid.sim.scheduler import Sequence
from braid.sim.tokens import Prompt
from braid.sim.watch import lowest, watched
from braid.worker.seats import DispatchFlow, Seat, Seats
from braid.worker.source import Source
from braid.worker.told import Told, roomy

log = logging.getLogger("braid.sim")

Send = Callable[[wire.FromWorker], None]


class Identity(msgspec.Struct, frozen=True):
    """What a worker's replies say of it, and how long a sequence may be (tokens)."""

    model: str
    fingerprint: str
    max_model_len: int


@dataclass(slots=True, eq=False)
class _Sample:
    """One sample of a dispatch. ``number`` is the group's, ``index`` the body's. ``entered``: the engine has
    it."""

    number: int
    index: int
    part: _Part
    sequence: Sequence
    seat: Seat | None = None
    entered: bool = False
    state: str = ""
    said: int = 0


@dataclass(slots=True, eq=False)
class _Part:
    """One prompt of a dispatch and its samples; ``left``: those that have not ended."""

    prompt: Prompt
    held: Held
    left: int
    cached: int = 0
    first: _Sample | None = None


@dataclass(slots=True, eq=False)
class _Dispatch:
    """A ``Decode`` that runs. ``cancelled``: numbers that the router no longer wants. ``told``: the first
    token, where a prefill worker draws it."""

    message: wire.Decode
    source: Source
    flow: DispatchFlow
    told: Told | None
    task: asyncio.Task[None] | None = None
    ask: Ask | None = None
    words: reply.Words | None = None
    parts: list[_Part] = field(default_factory=list)
    samples: dict[int, _Sample] = field(default_factory=dict)
    choices: dict[int, reply.Json] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    begun: bool = False
    over: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def record(self) -> wire.KvRecord:
        return merge(part.held.record for part in self.parts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(part.prompt) for part in self.parts)

    @property
    def cached_tokens(self) -> int:
        return sum(part.cached for part in self.parts)

    @property
    def generated(self) -> int:
        return sum(sample.sequence.generated for sample in self.samples.values())


class DecodeService:
    """Owns the dispatches of a simulated decode worker."""

    def __init__(
        self,
        engine: Engine,
        imports: Imports,
        kept: Kept,
        send: Send,
        identity: Identity,
        profile: Profile,
        seats: Seats,
    ) -> None:
        self.seats = seats
        self._engine = engine
        self._imports = imports
        self._kept = kept
        self._send = send
        self._identity = identity
        self._profile = profile
        self._running: dict[int, _Dispatch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._firsts = 0

    def start(self, message: wire.Prefill | wire.Decode) -> None:
        if isinstance(message, wire.Prefill) or message.ref in self._running:
            log.warning("unexpected_dispatch", extra={"ref": message.ref})
            return
        flow = DispatchFlow(group=message.several, priority=message.priority)
        told = Told() if message.drawn else None
        dispatch = _Dispatch(message, Source(message.ticket, message.reason), flow, told)
        self._running[message.ref] = dispatch
        dispatch.task = self._spawn(self._guard(dispatch))

    def cancel(self, message: wire.Cancel) -> None:
        """What is cancelled has given its blocks back when this returns, but for a prompt that is on its
        way: that one's follow when the transfer has stopped."""
        dispatch = self._running.get(message.ref)
        if dispatch is None:
            return
        if message.samples is None:
            self._end_early(dispatch, 499, "cancelled")
            return
        dispatch.cancelled.update(message.samples)
        for number in message.samples:
            if (sample := dispatch.samples.get(number)) is not None and not sample.state:
                self._stop(sample)
                self._sample_ended(dispatch, sample, "cancelled")

    def lost(self, message: wire.Lost) -> None:
        if (dispatch := self._running.get(message.ref)) is not None:
            dispatch.source.change(message.ticket, message.reason)
            if dispatch.told is not None:
                dispatch.told.restart()

    def first(self, message: wire.First) -> None:
        """The first token is drawn; which one it is has been made up here."""
        dispatch = self._running.get(message.ref)
        if dispatch is not None and dispatch.told is not None:
            dispatch.told.tell(message)

    def forget(self, message: wire.Forget) -> None:
        for name in message.names:
            self._kept.forget(name)

    def cancel_all(self, reason: str) -> None:
        for dispatch in list(self._running.values()):
            self._end_early(dispatch, 499, reason)
        self._kept.clear()

    def beat(self) -> wire.Beat:
        scheduler = self._engine.scheduler
        beat = wire.Beat(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self.seats.waiting,
            kv_usage=scheduler.pool.usage,
            tickets=len(self._imports.blocks),
            free_blocks=scheduler.pool.free_blocks,
        )
        return self._engine.pace.tell(beat)

    def idle(self) -> bool:
        return not self._running and not self._tasks

    async def settle(self) -> None:
        """Wait until what was cancelled has let go of its blocks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stats(self) -> dict[str, Any]:
        scheduler, engine = self._engine.scheduler, self._engine
        return {
            "dispatches": len(self._running),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "blocks": scheduler.pool.blocks,
            "free": scheduler.pool.free_blocks,
            "preempted": scheduler.preempted,
            "kept": len(self._kept),
            "imports": len(self._imports.blocks),
            **self.seats.stats(),
            "firsts": self._firsts,
            "steps": engine.steps,
            "busy_s": round(engine.busy_s, 6),
            "lag_s": round(engine.lag_s, 6),
            "lost_s": round(engine.lost_s, 6),
        }

    def check_integrity(self) -> None:
        """Assert that every block is free or held by somebody who is known."""
        self._engine.scheduler.check_integrity([*self._imports.blocks, *self._kept.blocks])
        self.seats.check_integrity(idle=not self._running)

    async def _guard(self, dispatch: _Dispatch) -> None:
        message = dispatch.message
        try:
            async with asyncio.timeout(message.deadline_s):
                await self._run(dispatch)
        except BadRequest as error:
            self._refuse(dispatch, error)
        except TimeoutError:
            self._end_early(dispatch, 504, "the request passed its deadline")
        except Exception as error:
            log.exception("dispatch_failed", extra={"request_id": message.request_id})
            self._end_early(dispatch, 500, type(error).__name__)

    async def _run(self, dispatch: _Dispatch) -> None:
        message = dispatch.message
        if message.target.partition("?")[0] == TOKENIZE:
            prompt = parse_tokenize(message.body)
            self._answer(dispatch, 200, reply.tokenized(prompt.tokens, self._identity.max_model_len))
            return
        ask = dispatch.ask = parse(message.target, message.body, self._identity.max_model_len)
        identity = self._identity
        dispatch.words = reply.Words(ask, identity.model, message.request_id, identity.fingerprint)
        for number, prompt in enumerate(ask.prompts):
            held = await self._imports.acquire(prompt, number, dispatch.source)
            self._begin(dispatch, ask, number, prompt, held)
        await dispatch.ended.wait()

    def _begin(self, dispatch: _Dispatch, ask: Ask, number: int, prompt: Prompt, held: Held) -> None:
        """Submit the samples of one prompt."""
        part = _Part(prompt, held, ask.n, held.cached)
        dispatch.parts.append(part)
        ready = len(prompt) - 1 if held.blocks else self._kept.common(dispatch.message.after, prompt.tokens)
        for i in range(ask.n):
            index = number * ask.n + i
            self._submit(dispatch, ask, part, index, ready)

    def _submit(self, dispatch: _Dispatch, ask: Ask, part: _Part, index: int, ready: int) -> None:
        message = dispatch.message
        group_number = message.first + index
        seed, key = (None, 0) if ask.greedy else (ask.seed, group_number)
        said = draw(part.prompt, self._profile, ask.limits, seed, key)
        if isinstance(message.watch, wire.Watch) and message.mode == "samples":
            said = watched(said, message.watch)
        sequence = Sequence(
            part.prompt,
            said,
            lambda _: self._progressed(dispatch, sample),
            only_end=message.mode == "samples" or not ask.stream,
            ready=ready,
            keep=message.keep and message.mode == "samples",
        )
        sample = dispatch.samples[group_number] = _Sample(group_number, index, part, sequence)
        part.first = part.first or sample
        if group_number in dispatch.cancelled:
            sequence.ended = True
            self._sample_ended(dispatch, sample, "cancelled")
            return
        dispatch.flow.most = ask.limits.most
        sample.seat = self.seats.ask(dispatch.flow, lambda seated: self._seated(dispatch, sample, seated))

    def _seated(self, dispatch: _Dispatch, sample: _Sample, seated: bool) -> None:
        """A sample's turn, or its end before that."""
        if not seated:
            sample.sequence.ended = True
        elif dispatch.told is not None and dispatch.ask is not None and _drawable(dispatch.ask):
            self._spawn(self._begun(dispatch, sample, dispatch.told))
        else:
            self._enter(sample)

    def _enter(self, sample: _Sample) -> None:
        sample.entered = True
        self._engine.add(sample.sequence)

    async def _begun(self, dispatch: _Dispatch, sample: _Sample, told: Told) -> None:
        """Begin with the first token that a prefill worker has drawn, if it says so in time and the engine
        goes on at once; as :mod:`decode_server.first`."""
        drawn, sequence = await told.wait() is not None, sample.sequence
        if sequence.ended:
            return
        if drawn and self._roomy():
            self._firsts += 1
            sequence.generated, sequence.ready = 1, len(sequence.prompt)
            sequence.ended = sequence.draw.tokens == 1
        if not sequence.ended:
            self._enter(sample)
        if sequence.generated:
            self._progressed(dispatch, sample)

    def _roomy(self) -> bool:
        scheduler = self._engine.scheduler
        return roomy(len(scheduler.waiting), scheduler.pool.free_blocks, scheduler.pool.blocks)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stop(self, sample: _Sample) -> None:
        """End a sample in the engine, or on its way there; its seat is another's when this returns."""
        if sample.seat is not None:
            if sample.entered:
                self._engine.abort(sample.sequence)
            else:
                sample.sequence.ended = True
            self.seats.leave(sample.seat, sample.sequence.generated)

    def _progressed(self, dispatch: _Dispatch, sample: _Sample) -> None:
        """A step gave this sample a token, or a chunk of its prompt."""
        sequence = sample.sequence
        part = sample.part
        if part.held.record.path != "remote" and part.first is sample:
            part.cached = sequence.cached
        if dispatch.ask is not None and dispatch.ask.stream and dispatch.message.mode == "http":
            self._stream(dispatch, sample)
        if sequence.ended:
            self._sample_ended(
                dispatch, sample, "cancelled" if sequence.draw.finish == "abort" else "finished"
            )

    def _stream(self, dispatch: _Dispatch, sample: _Sample) -> None:
        sequence, words = sample.sequence, dispatch.words
        assert words is not None
        if sequence.generated == sample.said:
            return
        data = b"" if sample.said else words.first(sample.index)
        for i in range(sample.said, sequence.generated):
            finish = sequence.draw.finish if i + 1 == sequence.draw.tokens else None
            data += words.token(sample.index, sequence.draw, i, finish)
        sample.said = sequence.generated
        self._body(dispatch, data)

    def _sample_ended(self, dispatch: _Dispatch, sample: _Sample, state: str) -> None:
        sample.state = state
        sequence, message = sample.sequence, dispatch.message
        if sample.seat is not None:
            self.seats.leave(sample.seat, sequence.generated)
        if sequence.keep and sequence.blocks:
            name = wire.kept_name(message.ref, sample.number)
            self._kept.add(name, sequence.tokens(0, sequence.known), sequence.blocks)
            sequence.blocks = []
        if message.mode == "samples":
            self._send(self._sample_message(dispatch, sample))
        elif dispatch.ask is not None and not dispatch.ask.stream:
            dispatch.choices[sample.index] = self._choice(dispatch, sample, sample.index)
        elif state == "cancelled" and dispatch.words is not None:
            self._body(dispatch, dispatch.words.cut(sample.index))
        part = sample.part
        part.left -= 1
        if not part.left:
            self._imports.release(part.held)
            self._part_ended(dispatch)

    def _part_ended(self, dispatch: _Dispatch) -> None:
        assert dispatch.ask is not None
        assert dispatch.words is not None
        if len(dispatch.parts) < len(dispatch.ask.prompts) or any(part.left for part in dispatch.parts):
            return
        message = dispatch.message
        usage = reply.usage(dispatch.prompt_tokens, dispatch.cached_tokens, dispatch.generated)
        if message.mode == "samples":
            self._over(dispatch, self._group_done(dispatch, 200, b""))
        elif dispatch.ask.stream:
            self._body(dispatch, dispatch.words.last(usage), end=True)
        else:
            choices = [dispatch.choices[i] for i in sorted(dispatch.choices)]
            self._answer(dispatch, 200, dispatch.words.whole(choices, usage))

    def _sample_message(self, dispatch: _Dispatch, sample: _Sample) -> wire.Sample:
        ref, watch, sequence = dispatch.message.ref, dispatch.message.watch, sample.sequence
        count, said = sequence.generated, sequence.draw
        if not count:
            return wire.Sample(ref, sample.number, "cancelled")
        return wire.Sample(
            ref,
            sample.number,
            "finished" if sample.state == "finished" else "cancelled",
            msgspec.json.encode(self._choice(dispatch, sample, 0)),
            said.said(count),
            _finish(said, count),
            count,
            said.cumulative(count),
            confidence=lowest(said, watch, count) if isinstance(watch, wire.Watch) else None,
        )

    def _choice(self, dispatch: _Dispatch, sample: _Sample, index: int) -> reply.Json:
        assert dispatch.words is not None
        said, count = sample.sequence.draw, sample.sequence.generated
        return dispatch.words.choice(index, said, count, _finish(said, count))

    def _group_done(self, dispatch: _Dispatch, status: int, body: bytes) -> wire.GroupDone:
        return wire.GroupDone(
            dispatch.message.ref,
            status,
            body,
            dispatch.prompt_tokens,
            dispatch.cached_tokens,
            dispatch.generated,
            dispatch.record if dispatch.parts else None,
        )

    # What ends a dispatch: each of these sends the terminal message, once.

    def _answer(self, dispatch: _Dispatch, status: int, data: bytes) -> None:
        """A whole HTTP answer."""
        ref, record = dispatch.message.ref, dispatch.record
        self._send(wire.Head(ref, status, reply.JSON_HEADERS, record))
        self._over(dispatch, wire.Body(ref, data, end=True, kv=record))

    def _body(self, dispatch: _Dispatch, data: bytes, end: bool = False) -> None:
        """Bytes of a stream; the head goes before the first."""
        ref = dispatch.message.ref
        if not dispatch.begun:
            dispatch.begun = True
            self._send(wire.Head(ref, 200, reply.SSE_HEADERS, dispatch.record))
        if end:
            self._over(dispatch, wire.Body(ref, data, end=True, kv=dispatch.record))
        else:
            self._send(wire.Body(ref, data))

    def _refuse(self, dispatch: _Dispatch, error: BadRequest) -> None:
        data = reply.error(error.status, error.body())
        if dispatch.message.mode == "samples":
            self._over(dispatch, wire.GroupDone(dispatch.message.ref, error.status, data))
        else:
            self._answer(dispatch, error.status, data)

    def _end_early(self, dispatch: _Dispatch, status: int, why: str) -> None:
        if dispatch.over:
            return
        if dispatch.message.mode == "samples":
            message: wire.FromWorker = self._group_done(dispatch, status, error_body(why))
        else:
            message = wire.Body(dispatch.message.ref, b"", end=True, cut=why)
        self._over(dispatch, message)

    def _over(self, dispatch: _Dispatch, message: wire.FromWorker) -> None:
        dispatch.over = True
        del self._running[dispatch.message.ref]
        for sample in reversed(dispatch.samples.values()):  # those that wait first, so that none is let in
            self._stop(sample)
        for part in dispatch.parts:
            self._imports.release(part.held)
        self._send(message)
        dispatch.ended.set()
        if dispatch.task is not asyncio.current_task() and dispatch.task is not None:
            dispatch.task.cancel()


def _drawable(ask: Ask) -> bool:
    """Whether a first token drawn elsewhere is as good as one drawn here."""
    return ask.logprobs is None and not ask.limits.least and (ask.greedy or ask.seed is None)


def _finish(said: Draw, count: int) -> str:
    return said.finish if count == said.tokens else "abort"
