"""Runs ``Prefill`` dispatches on a simulated engine; what it tells the router is as in ``prefill_server``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from braid import wire
from braid.errors import BadRequest, error_body
from braid.sim import reply
from braid.sim.decode import Identity
from braid.sim.draws import Draw
from braid.sim.engine import Engine
from braid.sim.imports import content
from braid.sim.kv import Producer, Refused
from braid.sim.request import parse
from braid.sim.scheduler import Sequence
from braid.sim.tokens import Prompt
from kvtransfer import wire as kv
from kvtransfer.plan import CHAIN_TOKENS, chain, finished_blocks

log = logging.getLogger("braid.sim")

SHAPE: wire.Shape = (1.0, 1.0, 0, 0.0)
"""What a first token is said to be drawn with; a simulated decode worker makes it up in any case."""


@dataclass(slots=True, eq=False)
class _Job:
    """A ``Prefill`` that runs, and what its prompts came to."""

    message: wire.Prefill
    keys: list[kv.Key] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    task: asyncio.Task[tuple[int, bytes]] | None = None


class PrefillService:
    """Owns the dispatches of a simulated prefill worker. Their leases are the producer's and outlive them."""

    def __init__(
        self,
        engine: Engine,
        producer: Producer,
        send: Callable[[wire.FromWorker], None],
        identity: Identity,
        epoch: int,
    ) -> None:
        self._engine = engine
        self._producer = producer
        self._send = send
        self._identity = identity
        self._epoch = epoch
        self._jobs: dict[int, _Job] = {}
        self._keys: dict[int, list[kv.Key]] = {}

    def start(self, message: wire.Prefill | wire.Decode) -> None:
        if isinstance(message, wire.Decode) or message.ref in self._jobs:
            log.warning("unexpected_dispatch", extra={"ref": message.ref})
            return
        job = self._jobs[message.ref] = _Job(message)
        task = job.task = asyncio.create_task(self._guard(job))
        started = time.monotonic()
        task.add_done_callback(lambda _: self._ended(job, task, time.monotonic() - started))

    def cancel(self, message: wire.Cancel) -> None:
        if (job := self._jobs.get(message.ref)) is not None:
            self._stop(job)
        self._close(message.ref, "cancelled")

    def lost(self, message: wire.Lost) -> None:
        """Nothing: a prefill worker depends on no producer."""

    def first(self, message: wire.First) -> None:
        """Nothing: a prefill worker is told none."""

    def forget(self, message: wire.Forget) -> None:
        """Nothing: a prefill worker keeps no samples."""

    def cancel_all(self, reason: str) -> None:
        for job in list(self._jobs.values()):
            self._stop(job)
        for ref in list(self._keys):
            self._close(ref, reason)

    def beat(self) -> wire.Beat:
        scheduler, stats = self._engine.scheduler, self._producer.stats()
        return wire.Beat(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.usage,
            staging_bytes=stats.staging_bytes,
            tickets=stats.leases,
        )

    def idle(self) -> bool:
        return not self._jobs and not self._producer.stats().leases

    def stats(self) -> dict[str, Any]:
        scheduler, stats, engine = self._engine.scheduler, self._producer.stats(), self._engine
        return {
            "jobs": len(self._jobs),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "blocks": scheduler.pool.blocks,
            "free": scheduler.pool.free_blocks,
            "preempted": scheduler.preempted,
            "staging_bytes": stats.staging_bytes,
            "leases": stats.leases,
            "steps": engine.steps,
            "busy_s": round(engine.busy_s, 6),
            "lag_s": round(engine.lag_s, 6),
            "lost_s": round(engine.lost_s, 6),
        }

    def check_integrity(self) -> None:
        """Assert that every block is free or held by a sequence that runs."""
        self._engine.scheduler.check_integrity()

    async def _guard(self, job: _Job) -> tuple[int, bytes]:
        """Status and error body of one dispatch."""
        message = job.message
        if message.ticket.epoch != self._epoch:
            return 410, error_body("the ticket is of another epoch")
        try:
            async with asyncio.timeout(message.deadline_s):
                return await self._run(job)
        except BadRequest as error:
            return error.status, reply.error(error.status, error.body())
        except Refused as error:
            return 422, error_body(f"not prefilled: {error}")
        except TimeoutError:
            return 504, error_body("prefill passed its deadline")

    async def _run(self, job: _Job) -> tuple[int, bytes]:
        message = job.message
        ask = parse(message.target, message.body, self._identity.max_model_len)
        for part, prompt in enumerate(ask.prompts):
            key = kv.Key(message.ticket.id, message.ticket.attempt, part)
            job.keys.append(key)
            self._keys.setdefault(message.ref, []).append(key)
            await self._producer.open(self._lease(message, key, prompt), self._content(prompt))
            await self._compute(job, key, prompt)
        if message.draw:
            self._send(wire.First(message.ref, 0, SHAPE))
        return 200, b""

    async def _compute(self, job: _Job, key: kv.Key, prompt: Prompt) -> None:
        """Compute one prompt, handing on each block as soon as it is finished."""
        done = asyncio.get_running_loop().create_future()
        staged = 0

        def on_progress(sequence: Sequence) -> None:
            nonlocal staged
            computed = len(prompt) if sequence.ended else sequence.computed
            finished = finished_blocks(computed, len(prompt), self._engine.scheduler.block_size)
            self._producer.stage(key, staged, finished)
            staged = finished
            if sequence.ended and not done.done():
                done.set_result(None)

        one = Draw("", 1, "length", None, 0, -0.1)
        sequence = Sequence(prompt, one, on_progress, only_end=False)
        job.sequences.append(sequence)
        self._engine.add(sequence)
        try:
            await done
        finally:
            self._engine.abort(sequence)
        job.prompt_tokens += len(prompt)
        job.cached_tokens += sequence.cached

    def _lease(self, message: wire.Prefill, key: kv.Key, prompt: Prompt) -> kv.Open:
        blocks = self._engine.scheduler.blocks_for(len(prompt))
        links = chain(prompt.tokens, CHAIN_TOKENS, prompt.salt)
        readers = max(1, sum(message.ticket.consumers))
        spans = (kv.Want(0, 0, blocks),)
        return kv.Open(key, len(prompt), links, self._identity.fingerprint, spans, readers)

    def _content(self, prompt: Prompt) -> list[bytes]:
        return content(prompt, self._engine.scheduler.block_size)

    def _stop(self, job: _Job) -> None:
        for sequence in job.sequences:
            self._engine.abort(sequence)
        if job.task is not None:
            job.task.cancel()

    def _close(self, ref: int, reason: str) -> None:
        for key in self._keys.pop(ref, ()):
            self._producer.close(key, reason)

    def _ended(self, job: _Job, task: asyncio.Task[tuple[int, bytes]], elapsed: float) -> None:
        message = job.message
        del self._jobs[message.ref]
        if task.cancelled():
            status, body = 499, b""
        elif (error := task.exception()) is not None:
            log.error("dispatch_failed", extra={"request_id": message.request_id, "detail": repr(error)})
            status, body = 500, error_body(type(error).__name__)
        else:
            status, body = task.result()
        if status != 200:
            self._close(message.ref, f"prefill_{status}")
        self._send(wire.PrefillDone(message.ref, status, body, job.prompt_tokens, job.cached_tokens, elapsed))
