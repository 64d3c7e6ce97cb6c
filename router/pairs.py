"""Which prefill and decode workers have shown that KV moves between them.

A pair is used only when the two may exchange KV (:func:`mismatch`) and, with ``verify_pairs``, after a tiny
real request went through it and its KV really crossed the wire. A prefill and a decode worker of one model
that do not fit are shown with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from braid import wire
from braid.ranks import readers
from braid.settings import RouterSettings
from router.link import Gone, Inbox, Link
from router.metrics import Metrics
from router.registry import Registry, Worker

log = logging.getLogger("braid.router.pairs")

PROBE_TIMEOUT_S = 30.0
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Waits between probes of a pair; the last one repeats."""
_FIRST_ID, _IDS = 5, 64
"""Probe prompts use token ids 5..68, which every vocabulary has."""


@dataclass(slots=True, eq=False)
class Pair:
    prefill: Worker
    decode: Worker
    verified: bool = False
    attempts: int = 0
    error: str = ""
    task: asyncio.Task[None] | None = None


class ProbeFailed(Exception):
    """A probe did not show a transfer; the message is a short reason."""


class Pairs:
    """Owns one probe task a pair that is not verified yet. Pairs leave with either worker."""

    def __init__(self, settings: RouterSettings, registry: Registry, link: Link, metrics: Metrics) -> None:
        self._settings = settings
        self._registry = registry
        self._link = link
        self._metrics = metrics
        self._pairs: dict[tuple[Worker, Worker], Pair] = {}
        self._refused: dict[tuple[Worker, Worker], str] = {}
        self._proven: set[str] = set()
        registry.joined.append(self._on_joined)
        registry.lost.append(self._on_lost)

    def usable(self, prefill: Worker, decode: Worker) -> bool:
        """A :data:`router.placement.Usable`."""
        pair = self._pairs.get((prefill, decode))
        return pair is not None and (pair.verified or not self._settings.verify_pairs)

    def ready(self) -> bool:
        """Whether each served model is ready (and there is a model)."""
        models = self.ready_models()
        return bool(models) and all(models.values())

    def ready_models(self) -> dict[str, bool]:
        """Of each served model, whether it has a usable pair of usable workers.

        A model that had one stays ready while a decode worker is: it computes prompts itself, and a
        restart of the only prefill worker must not take the router out of service. One of ``local_models``
        needs a decode worker only.
        """
        models = self._registry.models()
        self._proven.update(model for model in models if self._has_pair(model))
        proven = self._proven.union(self._settings.local_models)
        return {model: model in proven and bool(self._registry.ready("decode", model)) for model in models}

    def state(self) -> list[dict[str, Any]]:
        """What ``/cluster`` shows of the pairs."""
        refused = [Pair(p, d, error=why) for (p, d), why in self._refused.items()]
        return [
            {
                "prefill": pair.prefill.name,
                "decode": pair.decode.name,
                "verified": pair.verified,
                "attempts": pair.attempts,
                "error": pair.error,
            }
            for pair in (*self._pairs.values(), *refused)
        ]

    async def stop(self) -> None:
        """End all probes. Idempotent."""
        tasks = [pair.task for pair in self._pairs.values() if pair.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        """Assert that pairs are of registered workers that match."""
        for (prefill, decode), pair in self._pairs.items():
            assert not prefill.gone
            assert not decode.gone
            assert pair.prefill is prefill
            assert pair.decode is decode
            assert not mismatch(prefill.hello, decode.hello)

    def _has_pair(self, model: str) -> bool:
        return any(
            self.usable(p, d)
            for p in self._registry.ready("prefill", model)
            for d in self._registry.ready("decode", model)
        )

    def _on_joined(self, worker: Worker) -> None:
        for other in self._registry.all():
            prefill, decode = (worker, other) if worker.hello.role == "prefill" else (other, worker)
            if prefill.hello.role == "prefill" and decode.hello.role == "decode":
                self._consider(prefill, decode)

    def _consider(self, prefill: Worker, decode: Worker) -> None:
        if not _common_models(prefill, decode):
            return
        if why := mismatch(prefill.hello, decode.hello):
            self._refused[prefill, decode] = why
            names = {"prefill": prefill.name, "decode": decode.name, "reason": why}
            log.warning("pair refused", extra=names)
        else:
            self._add(Pair(prefill, decode))

    def _add(self, pair: Pair) -> None:
        self._pairs[pair.prefill, pair.decode] = pair
        if self._settings.verify_pairs:
            pair.task = asyncio.create_task(self._verify(pair))

    def _on_lost(self, worker: Worker, reason: str) -> None:
        self._refused = {key: why for key, why in self._refused.items() if worker not in key}
        for key in [key for key in self._pairs if worker in key]:
            pair = self._pairs.pop(key)
            if pair.task is not None:
                pair.task.cancel()

    async def _verify(self, pair: Pair) -> None:
        while not pair.verified:
            pair.attempts += 1
            try:
                await probe(self._link, pair.prefill, pair.decode)
                pair.verified, pair.error = True, ""
                self._proven.update(set(pair.prefill.hello.models) & set(pair.decode.hello.models))
                self._metrics.probes.labels("ok").inc()
            except ProbeFailed as error:
                pair.error = str(error)
                self._metrics.probes.labels("failed").inc()
            log.log(
                logging.INFO if pair.verified else logging.WARNING,
                "pair verified" if pair.verified else "pair probe failed",
                extra={"prefill": pair.prefill.name, "decode": pair.decode.name, "reason": pair.error},
            )
            if not pair.verified:
                await asyncio.sleep(BACKOFF_S[min(pair.attempts, len(BACKOFF_S)) - 1])


def mismatch(prefill: wire.Hello, decode: wire.Hello) -> str:
    """Why one may not read the other's KV, in words; empty if it may."""
    if prefill.fingerprint != decode.fingerprint:
        theirs = dict(decode.traits)
        for name, value in prefill.traits:
            if theirs.get(name) != value:
                return f"{name}: {value} on prefill, {theirs.get(name, 'unknown')} on decode"
        return "the fingerprints differ"
    if prefill.block_size % decode.block_size and decode.block_size % prefill.block_size:
        return f"block sizes {prefill.block_size} and {decode.block_size}: neither is a multiple of the other"
    try:
        readers(prefill.kv_heads, prefill.ranks, decode.ranks)
    except ValueError as error:
        return str(error)
    return ""


def _common_models(prefill: Worker, decode: Worker) -> list[str]:
    return [model for model in decode.hello.models if model in prefill.hello.models]


async def probe(link: Link, prefill: Worker, decode: Worker) -> None:
    """Send one tiny request through a pair.

    Raises:
        ProbeFailed: it was not answered, or its KV did not cross the wire.
    """
    inbox = Inbox()
    request_id = f"probe-{secrets.token_hex(8)}"
    body = _probe_body(prefill, decode)
    ticket = make_ticket(secrets.token_bytes(16), 1, prefill, [decode])
    p = link.open(prefill, 1, inbox, None)
    d = link.open(decode, 1, inbox, None)
    target = "/v1/completions"
    link.send(prefill, wire.Prefill(p.ref, ticket, target, body, request_id, PROBE_TIMEOUT_S))
    link.send(decode, wire.Decode(d.ref, target, body, request_id, PROBE_TIMEOUT_S, ticket=ticket))
    try:
        await _await_transfer(inbox)
    finally:
        link.abandon(p)
        link.abandon(d)


def make_ticket(ticket_id: bytes, attempt: int, prefill: Worker, decode: Sequence[Worker]) -> wire.Ticket:
    """The router's half of a transfer handle, from what producer and consumers registered."""
    hello = prefill.hello
    return wire.Ticket(
        ticket_id,
        attempt,
        hello.worker,
        hello.epoch,
        hello.kv_endpoints,
        hello.fingerprint,
        tuple(worker.hello.ranks for worker in decode),
        hello.block_size,
    )


async def _await_transfer(inbox: Inbox) -> None:
    until = asyncio.get_running_loop().time() + PROBE_TIMEOUT_S
    while True:
        event = await inbox.get(until)
        if event is None:
            raise ProbeFailed("timeout")
        if isinstance(event, Gone):
            raise ProbeFailed("worker gone")
        message = event[1]
        if isinstance(message, wire.PrefillDone | wire.Head) and message.status != 200:
            raise ProbeFailed(f"{type(message).__name__} status {message.status}")
        if isinstance(message, wire.Body) and message.end:
            _check_record(message)
            return


def _check_record(body: wire.Body) -> None:
    if body.cut or body.kv is None:
        raise ProbeFailed("cut" if body.cut else "no record")
    if body.kv.path != "remote" or body.kv.nbytes <= 0:
        raise ProbeFailed(f"path {body.kv.path}, reason {body.kv.reason[:64]}, {body.kv.nbytes} bytes")


def _probe_body(prefill: Worker, decode: Worker) -> bytes:
    """A prompt of two blocks and three tokens that no cache holds: it begins with random ids."""
    block = decode.hello.block_size
    longest = min(prefill.hello.max_model_len, decode.hello.max_model_len) - 1
    length = max(1, min(2 * block + 3, longest))
    fresh = [_FIRST_ID + byte % _IDS for byte in secrets.token_bytes(min(8, length))]
    prompt = fresh + [_FIRST_ID + i % _IDS for i in range(length - len(fresh))]
    model = _common_models(prefill, decode)[0]
    return msgspec.json.encode({"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0})
