"""Runs ``Prefill`` dispatches: render, lease, compute; the transfer itself is the worker process's."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from braid import wire
from braid.errors import error_body
from braid.ranks import readers
from braid.worker.asgi import post
from braid.worker.counters import Counters
from braid.worker.engine import Engine
from braid.worker.prompt import Prompt
from kvtransfer import wire as kv
from kvtransfer.plan import CHAIN_TOKENS, needed_blocks
from prefill_server.llm import JOB, Job, Unshareable
from prefill_server.metrics import EARLY, SENT

log = logging.getLogger("braid.prefill")


_SAMPLING_FIELDS = frozenset(
    {"n", "best_of", "stream", "stream_options", "logprobs", "top_logprobs", "use_beam_search", "echo"}
    | {"prompt_logprobs", "max_tokens", "max_completion_tokens", "min_tokens", "stop", "seed"}
)
"""Fields without effect on the rendered prompt that would make vLLM's layer do more than prefill."""


class PrefillService:
    """Owns the dispatches of a prefill worker and, through ``control``, their leases.

    A lease outlives its dispatch: it ends when the decode workers have the KV, by time, or by cancel.
    """

    def __init__(self, engine: Engine, send: Callable[[wire.FromWorker], None]) -> None:
        self._engine = engine
        self._send = send
        self._jobs: dict[int, asyncio.Task[tuple[int, bytes]]] = {}
        self._leases = _Leases(engine)
        self._counters = Counters(engine)

    def start(self, message: wire.Prefill | wire.Decode) -> None:
        if isinstance(message, wire.Decode) or message.ref in self._jobs:
            log.warning("unexpected_dispatch", extra={"ref": message.ref})
            return
        job = Job(message.ticket.id, message.ticket.attempt, self._leases.of(message))
        if message.draw:
            job.on_first = lambda token, shape: self._send(wire.First(message.ref, token, shape))
        task = self._jobs[message.ref] = asyncio.create_task(self._run(message, job))
        started = time.monotonic()
        task.add_done_callback(lambda _: self._ended(message, job, task, time.monotonic() - started))

    def cancel(self, message: wire.Cancel) -> None:
        if (task := self._jobs.get(message.ref)) is not None:
            task.cancel()
        self._leases.close(message.ref, "cancelled")

    def lost(self, message: wire.Lost) -> None:
        """Nothing: a prefill worker depends on no producer."""

    def first(self, message: wire.First) -> None:
        """Nothing: a prefill worker draws first tokens itself."""

    def forget(self, message: wire.Forget) -> None:
        """Nothing: a prefill worker keeps no samples."""

    def cancel_all(self, reason: str) -> None:
        for task in self._jobs.values():
            task.cancel()
        for ref in self._leases.refs():  # also of prompts that are done: nobody will ask for them
            self._leases.close(ref, reason)

    def beat(self) -> wire.Beat:
        return self._counters.beat()

    async def refresh(self) -> None:
        await self._counters.refresh()

    def idle(self) -> bool:
        return not self._jobs and self._leases.empty

    def stats(self) -> dict[str, Any]:
        return {
            **self._counters.core,
            "jobs": len(self._jobs),
            "staging_bytes": self._counters.kv.staging_bytes,
            "leases": self._counters.kv.leases,
            "pending": self._counters.kv.pending,
        }

    async def _run(self, message: wire.Prefill, job: Job) -> tuple[int, bytes]:
        """Status and error body of one dispatch."""
        if message.ticket.epoch != self._engine.epoch:
            return 410, error_body("the ticket is of another epoch")
        try:
            async with asyncio.timeout(message.deadline_s):
                return await self._prefill(message, job)
        except TimeoutError:
            return 504, error_body("prefill passed its deadline")

    def _ended(
        self, message: wire.Prefill, job: Job, task: asyncio.Task[tuple[int, bytes]], elapsed: float
    ) -> None:
        """Last of a dispatch, also of one that was cancelled before its task ever ran."""
        del self._jobs[message.ref]
        status, body = (499, b"") if task.cancelled() else task.result()
        if status != 200:
            self._leases.close(message.ref, f"prefill_{status}")
        self._send(wire.PrefillDone(message.ref, status, body, job.prompt_tokens, job.cached_tokens, elapsed))

    async def _prefill(self, message: wire.Prefill, job: Job) -> tuple[int, bytes]:
        """Run vLLM's layer up to the prefill; the reply that it makes of the one token is not used."""
        status, chunks = 500, list[bytes]()

        def on_start(code: int, headers: list[tuple[str, str]]) -> None:
            nonlocal status
            status = code

        token = JOB.set(job)
        try:
            headers = [("x-request-id", message.request_id)]
            body = _prompt_only(message.body)
            await post(self._engine.app, message.target, body, headers, on_start, chunks.append)
        except Exception as error:
            if job.done < max(1, job.parts):
                return 422, error_body(f"not prefilled: {job.refusal or type(error).__name__}")
        finally:
            JOB.reset(token)
        if job.done and job.done == job.parts:
            return 200, b""
        return 422 if job.refusal else status, b"".join(chunks)


class _Leases:
    """Leases by dispatch, until they close."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._keys: dict[int, list[kv.Key]] = {}

    @property
    def empty(self) -> bool:
        return not self._keys

    def of(self, message: wire.Prefill) -> _JobLeases:
        return _JobLeases(self, message)

    async def open(self, message: wire.Prefill, key: kv.Key, prompt: Prompt) -> None:
        engine = self._engine
        commands = self._commands(message.ticket, key, prompt)
        opened = engine.control.expect(("open", key))
        closed = engine.control.expect(("closed", key))
        closed.add_done_callback(lambda ended: self._closed(message.ref, key, ended))
        self._keys.setdefault(message.ref, []).append(key)
        await engine.control.send(commands)
        try:
            await asyncio.wait([opened, closed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            engine.control.forget(("open", key))
        if not opened.done():
            raise Unshareable("the lease was refused")

    def _commands(self, ticket: wire.Ticket, key: kv.Key, prompt: Prompt) -> list[kv.Command]:
        """One ``Open`` a rank: what it will stage, and how many ranks will read it there."""
        engine, tokens = self._engine, len(prompt.tokens)
        try:
            counts = [readers(engine.kv_heads, engine.ranks, ranks) for ranks in ticket.consumers]
        except ValueError as error:
            raise Unshareable(str(error)) from None
        needed = [needed_blocks(tokens, group, engine.block_size) for group in engine.groups]
        spans = tuple(kv.Want(group, blocks.start, len(blocks)) for group, blocks in enumerate(needed))
        chain = prompt.chain(CHAIN_TOKENS)
        return [
            kv.Open(key, tokens, chain, engine.fingerprint, spans, max(1, sum(readers_)))
            for readers_ in zip(*counts, strict=True)
        ]

    def refs(self) -> list[int]:
        """Dispatches that hold leases."""
        return list(self._keys)

    def close(self, ref: int, reason: str) -> None:
        """End what a dispatch still holds. Idempotent."""
        for key in self._keys.get(ref, []):
            command = kv.Close(key, reason)
            asyncio.get_running_loop().create_task(self._engine.control.broadcast(command))

    def _closed(self, ref: int, key: kv.Key, ended: asyncio.Future[list[kv.Event]]) -> None:
        for event in () if ended.cancelled() else ended.result():
            if isinstance(event, kv.Closed):
                SENT.inc(event.sent)
                EARLY.inc(event.early)
        self._forget(ref, key)

    def _forget(self, ref: int, key: kv.Key) -> None:
        keys = self._keys.get(ref, [])
        if key in keys:
            keys.remove(key)
        if not keys:
            self._keys.pop(ref, None)


class _JobLeases:
    """:class:`prefill_server.llm.Staging` for one dispatch."""

    def __init__(self, leases: _Leases, message: wire.Prefill) -> None:
        self._leases = leases
        self._message = message

    async def open(self, key: kv.Key, prompt: Prompt) -> None:
        await self._leases.open(self._message, key, prompt)


def _prompt_only(body: bytes) -> bytes:
    """The body without sampling fields; one that is not an object is vLLM's to refuse."""
    try:
        fields = json.loads(body)
    except ValueError:
        return body
    if not isinstance(fields, dict):
        return body
    kept = {k: v for k, v in fields.items() if k not in _SAMPLING_FIELDS}
    return json.dumps({**kept, "max_tokens": 1}).encode()
