"""Runs ``Decode`` dispatches through vLLM's OpenAI layer and sends what it answers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.outputs import RequestOutput

from braid import wire
from braid.errors import error_body
from braid.settings import DecodeSettings
from braid.worker.asgi import post
from braid.worker.counters import Counters
from braid.worker.engine import Engine
from braid.worker.pace import Pace
from braid.worker.seats import DispatchFlow, Seats
from braid.worker.source import Source
from decode_server import beams
from decode_server.choices import ChoiceMaker
from decode_server.first import First
from decode_server.kept import KeptSamples
from decode_server.llm import JOB, Job
from decode_server.metrics import show_seats
from decode_server.prefix import Prefixes
from decode_server.room import divide, longest_sequence

log = logging.getLogger("braid.decode")

Send = Callable[[wire.FromWorker], None]

_HOP_HEADERS = frozenset({"content-length", "transfer-encoding", "connection", "server", "date"})


@dataclass(slots=True)
class _Dispatch:
    """A ``Decode`` that runs."""

    message: wire.Decode
    job: Job
    task: asyncio.Task[None] | None = None
    reports: set[asyncio.Task[None]] = field(default_factory=set)


class DecodeService:
    """Owns the dispatches of a decode worker."""

    def __init__(self, engine: Engine, send: Send, settings: DecodeSettings) -> None:
        self._engine = engine
        self._send = send
        longest = longest_sequence(engine.groups, engine.max_model_len, engine.chunk)
        room = divide(engine.blocks, longest, settings.max_load_share, settings.max_kept_share)
        log.info("cache_room", extra={"blocks": engine.blocks, "imports": room.imports, "kept": room.kept})
        self._prefixes = Prefixes(engine, room.imports, settings.load_timeout_s)
        self._kept = KeptSamples(room.kept, self._prefixes.blocks_of, self._prefixes.let_go)
        self._running: dict[int, _Dispatch] = {}
        self._counters = Counters(engine)
        self.seats = Seats(engine.slots, settings.width_of(engine.slots), settings.calm_s)
        show_seats(self.seats)
        self._pace = Pace()

    def start(self, message: wire.Prefill | wire.Decode) -> None:
        if isinstance(message, wire.Prefill) or message.ref in self._running:
            log.warning("unexpected_dispatch", extra={"ref": message.ref})
            return
        flow = DispatchFlow(group=message.several, priority=message.priority)
        source = Source(message.ticket, message.reason)
        job = Job(source, self._prefixes, self._kept, message.first, self.seats, flow)
        job.ref = message.ref
        job.keep = message.keep and message.mode == "samples"
        job.after = message.after
        job.priority = message.priority if self._engine.by_priority else 0
        job.watch = message.watch if message.mode == "samples" else None
        job.pace = self._pace
        job.drawn = First(self._counters.roomy) if message.drawn else None
        job.searches = beams.searches(message.body)
        job.beams = set() if job.searches else None
        dispatch = self._running[message.ref] = _Dispatch(message, job)
        run = self._run_http
        if message.mode == "samples":
            run = self._run_samples if job.beams is None else self._run_beams
        dispatch.task = asyncio.create_task(self._guard(dispatch, run))
        dispatch.task.add_done_callback(lambda task: self._ended(dispatch, task))

    def cancel(self, message: wire.Cancel) -> None:
        dispatch = self._running.get(message.ref)
        if dispatch is None or dispatch.task is None:
            return
        if message.samples is None:
            dispatch.task.cancel()
            return
        dispatch.job.cancelled.update(message.samples)
        dispatch.job.give_up(message.samples)
        wanted = [dispatch.job.samples[i] for i in message.samples if i in dispatch.job.samples]
        wanted += dispatch.job.beams or ()
        if wanted:
            asyncio.get_running_loop().create_task(self._engine.llm.abort(wanted))

    def lost(self, message: wire.Lost) -> None:
        if (dispatch := self._running.get(message.ref)) is not None:
            dispatch.job.source.change(message.ticket, message.reason)
            if dispatch.job.drawn is not None:
                dispatch.job.drawn.restart()

    def first(self, message: wire.First) -> None:
        dispatch = self._running.get(message.ref)
        if dispatch is not None and dispatch.job.drawn is not None:
            dispatch.job.drawn.tell(message)

    def forget(self, message: wire.Forget) -> None:
        for name in message.names:
            self._kept.forget(name)

    def cancel_all(self, reason: str) -> None:
        self._kept.clear()
        for dispatch in list(self._running.values()):
            if dispatch.task is not None:
                dispatch.task.cancel()

    def beat(self) -> wire.Beat:
        beat = self._pace.tell(self._counters.beat())
        return msgspec.structs.replace(beat, waiting=beat.waiting + self.seats.waiting)

    async def refresh(self) -> None:
        await self._counters.refresh()

    def idle(self) -> bool:
        return not self._running and self._prefixes.idle

    def stats(self) -> dict[str, Any]:
        return {
            **self._counters.core,
            "dispatches": len(self._running),
            "kept": len(self._kept),
            "loads": self._counters.kv.loads,
            "import_blocks": self._prefixes.held_blocks,
            **self.seats.stats(),
        }

    async def _guard(self, dispatch: _Dispatch, run: Callable[[_Dispatch], Any]) -> None:
        """Run a dispatch within its deadline."""
        message = dispatch.message
        token = JOB.set(dispatch.job)
        try:
            async with asyncio.timeout(message.deadline_s):
                await run(dispatch)
        except TimeoutError:
            self._end_early(message, 504, "the request passed its deadline")
        except Exception as error:
            log.exception("dispatch_failed", extra={"request_id": message.request_id})
            self._end_early(message, 500, type(error).__name__)
        finally:
            dispatch.job.leave()
            for held in dispatch.job.held:
                self._prefixes.release(held)
            JOB.reset(token)

    def _ended(self, dispatch: _Dispatch, task: asyncio.Task[None]) -> None:
        """Last of a dispatch, also of one that was cancelled before its task ever ran."""
        del self._running[dispatch.message.ref]
        if task.cancelled():
            self._end_early(dispatch.message, 499, "cancelled")

    def _end_early(self, message: wire.Decode, status: int, why: str) -> None:
        if message.mode == "samples":
            self._send(wire.GroupDone(message.ref, status, error_body(why)))
        else:
            self._send(wire.Body(message.ref, b"", end=True, cut=why))

    async def _run_http(self, dispatch: _Dispatch) -> None:
        """Pass vLLM's response on; the head waits for the first bytes, when the path is known."""
        message, job = dispatch.message, dispatch.job
        head: tuple[int, list[tuple[str, str]]] = (500, [])
        begun = False

        def on_start(status: int, headers: list[tuple[str, str]]) -> None:
            nonlocal head
            head = status, [(k, v) for k, v in headers if k.lower() not in _HOP_HEADERS]

        def begin() -> None:
            nonlocal begun
            begun = True
            self._send(wire.Head(message.ref, head[0], tuple(head[1]), job.record()))

        def on_chunk(data: bytes) -> None:
            if not begun:
                begin()
            self._send(wire.Body(message.ref, data))

        headers = (*message.headers, ("x-request-id", message.request_id))
        await post(self._engine.app, message.target, message.body, headers, on_start, on_chunk)
        if not begun:
            begin()
        self._send(wire.Body(message.ref, b"", end=True, kv=job.record()))

    async def _run_samples(self, dispatch: _Dispatch) -> None:
        """Report each sample as it ends; vLLM's joint response only says whether it went well."""
        message, job = dispatch.message, dispatch.job
        body = _not_streamed(message.body)
        status, chunks, maker = 500, list[bytes](), None

        def on_sample(number: int, output: RequestOutput | None, error: str) -> None:
            nonlocal maker
            if maker is None:
                maker = ChoiceMaker(self._engine.app.state, message.target, body, message.request_id)
            report = asyncio.create_task(self._report(dispatch, maker, number, output, error))
            dispatch.reports.add(report)

        def on_start(code: int, headers: list[tuple[str, str]]) -> None:
            nonlocal status
            status = code

        job.on_sample = on_sample
        headers = (*message.headers, ("x-request-id", message.request_id))
        await post(self._engine.app, message.target, body, headers, on_start, chunks.append)
        await asyncio.gather(*dispatch.reports)
        reported = bool(dispatch.reports) and not job.refused
        self._send(
            wire.GroupDone(
                message.ref,
                200 if reported else status,
                b"" if reported else b"".join(chunks),
                job.prompt_tokens,
                job.cached_tokens,
                sum(job.generated.values()),
                job.record(),
            )
        )

    async def _run_beams(self, dispatch: _Dispatch) -> None:
        """Report the best beam as the one sample of the share."""
        message, job = dispatch.message, dispatch.job
        status, chunks = 500, list[bytes]()

        def on_start(code: int, headers: list[tuple[str, str]]) -> None:
            nonlocal status
            status = code

        headers = (*message.headers, ("x-request-id", message.request_id))
        body = beams.widened(message.body)
        await post(self._engine.app, message.target, body, headers, on_start, chunks.append)
        reply, tokens = b"".join(chunks), sum(job.generated.values())
        if status == 200:
            self._send(beams.best(message.ref, message.first, reply, tokens))
            reply = b""
        told = job.prompt_tokens, job.cached_tokens, tokens, job.record()
        self._send(wire.GroupDone(message.ref, status, reply, *told))

    async def _report(
        self,
        dispatch: _Dispatch,
        maker: ChoiceMaker,
        number: int,
        output: RequestOutput | None,
        error: str,
    ) -> None:
        ref = dispatch.message.ref
        if output is None:
            self._send(wire.Sample(ref, number, "failed" if error else "cancelled", error=error))
            return
        completion = output.outputs[0]
        try:
            choice, text = await maker.make(output)
        except Exception as failure:  # as vLLM says that its grammar has refused a token
            why, tokens = f"{type(failure).__name__}: {failure}", len(completion.token_ids)
            self._send(wire.Sample(ref, number, "failed", tokens=tokens, error=why))
            return
        self._send(
            wire.Sample(
                ref,
                number,
                "cancelled" if completion.finish_reason == "abort" else "finished",
                choice,
                text,
                completion.finish_reason or "",
                len(completion.token_ids),
                completion.cumulative_logprob,
                confidence=dispatch.job.confidence.get(number),
            )
        )


def _not_streamed(body: bytes) -> bytes:
    try:
        fields = json.loads(body)
    except ValueError:
        return body
    if not isinstance(fields, dict):
        return body
    fields.pop("stream_options", None)
    return json.dumps({**fields, "stream": False}).encode()
