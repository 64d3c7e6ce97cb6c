"""A plain OpenAI request: the decode workers' answers, joined and passed through with proof of path."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec

from braid import wire
from braid.errors import DeadlineExceeded, UpstreamFailed
from router import proof
from router.cluster import Cluster
from router.direct import Streamed
from router.dispatch import Failed, Fanout, Job, Share
from router.history import Entry
from router.http import Call, Headers, headers_for_clients
from router.link import Inbox
from router.sse import DONE, Broken, Joiner, event, join_bodies, parse_object

HEADS_WAIT_S = 0.1
"""How long the first bytes of a stream wait for the other shares, so that the headers tell of all."""


async def run(
    cluster: Cluster,
    call: Call,
    job: Job,
    stream: bool,
    entry: Entry,
    direct: Streamed | None = None,
) -> None:
    """Answer ``call`` with what the workers make of ``job``, and tell ``entry`` of it. ``direct``: the report
    of that strategy goes with the last chunk of the stream.

    Raises:
        BraidError: it could not be answered; the caller words the error.
    """
    fanout = Fanout(cluster, job, inbox=Inbox() if stream else _all_of_it())
    try:
        fanout.start()
        entry.follow(lambda: (fanout.prefill, list(records(fanout))))
        await (_Stream(cluster, call, fanout, entry, direct).run() if stream else _whole(call, fanout, entry))
    except Broken as error:
        raise UpstreamFailed(f"A worker's answer could not be used: {error}.") from None
    finally:
        fanout.close()
        proof.count(cluster.metrics, records(fanout))


async def passthrough(cluster: Cluster, call: Call, job: Job) -> None:
    """Answer with one decode worker's answer as it is (``/tokenize`` and its kin)."""
    fanout = Fanout(cluster, job, inbox=_all_of_it())
    try:
        fanout.start()
        head, body = (await _collect(fanout))[fanout.shares[0]]
        await _respond(call, fanout, head, body, with_proof=False)
    finally:
        fanout.close()


def _all_of_it() -> Inbox:
    """For an answer that is kept until it is whole, however much of it comes at once."""
    return Inbox(limit=math.inf)


def records(fanout: Fanout) -> dict[str, wire.KvRecord | None]:
    """What each decode worker has reported of its KV so far."""
    return proof.by_worker((share.worker.name, share.kv) for share in fanout.shares)


def proof_headers(call: Call, fanout: Fanout) -> Headers:
    return proof.headers(call.request_id, fanout.prefill, records(fanout))


def proof_body(fanout: Fanout) -> dict[str, Any]:
    return {**proof.body(fanout.prefill, records(fanout)), "group": fanout.job.group}


async def _whole(call: Call, fanout: Fanout, entry: Entry) -> None:
    answers = await _collect(fanout)
    for head, body in answers.values():
        if head.status != 200:
            await _respond(call, fanout, head, body)
            return
    shares = [(share.first, parse_object(body)) for share, (_, body) in answers.items()]
    joined = join_bodies(sorted(shares, key=lambda pair: pair[0]))
    joined["braid"] = proof_body(fanout)
    head = next(iter(answers.values()))[0]
    told = joined.get("usage")
    usage = told if isinstance(told, dict) else {}
    call.trace.usage(usage)
    entry.spent(usage)
    await _respond(call, fanout, head, msgspec.json.encode(joined))


async def _collect(fanout: Fanout) -> dict[Share, tuple[wire.Head, bytes]]:
    """Every share's whole answer; ends early with the first one that is not a success."""
    heads: dict[Share, wire.Head] = {}
    bodies: dict[Share, list[bytes]] = {share: [] for share in fanout.shares}
    async for share, message in fanout.events():
        match message:
            case Failed(error):
                raise error
            case wire.Head():
                heads[share] = message
            case wire.Body():
                bodies[share].append(message.data)
                if share not in heads:
                    raise Broken("it has no head")
                if message.end and heads[share].status != 200:
                    return {share: (heads[share], b"".join(bodies[share]))}
    return {share: (heads[share], b"".join(bodies[share])) for share in fanout.shares}


async def _respond(call: Call, fanout: Fanout, head: wire.Head, body: bytes, with_proof: bool = True) -> None:
    if head.status >= 400:
        call.outcome = "failed"
    ours = proof_headers(call, fanout) if with_proof else [("x-request-id", call.request_id)]
    await call.respond(head.status, [*headers_for_clients(head.headers), *ours], body)


class _Stream:
    """One streamed answer. Holds the first bytes until the headers are known."""

    def __init__(
        self, cluster: Cluster, call: Call, fanout: Fanout, entry: Entry, direct: Streamed | None
    ) -> None:
        self._entry = entry
        self._direct = direct
        self._cluster = cluster
        self._call = call
        self._fanout = fanout
        self._heads: dict[Share, wire.Head] = {}
        self._position = {share: i for i, share in enumerate(fanout.shares)}
        self._joiner = Joiner([share.first for share in fanout.shares], fanout.job.n * fanout.job.prompts)
        self._pending: list[bytes] = []
        self._error: tuple[Share, list[bytes]] | None = None
        self._first_at = 0.0

    async def run(self) -> None:
        """Stream until the end."""
        try:
            async for share, message in self._fanout.events():
                match message:
                    case Failed(error):
                        await self._write(self._joiner.cut(), force=self._call.started)
                        raise error
                    case wire.Head():
                        self._on_head(share, message)
                    case wire.Body():
                        if await self._on_body(share, message):
                            return
        except DeadlineExceeded as error:
            if self._direct is None or not self._direct.text or error.code == "silent":
                raise
            return await self._cut(self._direct)
        usage = self._joiner.usage or {"prompt_tokens": self._fanout.prompt_tokens or None}
        self._call.trace.usage(usage)
        self._entry.spent(usage)
        more = (
            {"reasoning": await self._direct.report(usage.get("completion_tokens"))} if self._direct else {}
        )
        await self._write(self._joiner.finish(proof_body(self._fanout), **more), last=True)

    async def _cut(self, direct: Streamed) -> None:
        """End at the deadline with the text so far."""
        told = {"reasoning": await direct.report(None, "deadline"), "braid": proof_body(self._fanout)}
        await self._write(event({**direct.cut(), **told}) + DONE, last=True)

    def _on_head(self, share: Share, head: wire.Head) -> None:
        self._heads[share] = head
        self._first_at = self._first_at or asyncio.get_running_loop().time()
        if head.status != 200 and self._error is None:
            self._error = (share, [])

    async def _on_body(self, share: Share, message: wire.Body) -> bool:
        """Handle body bytes; True when the response is over."""
        if share not in self._heads:
            raise Broken("it has no head")
        if self._error is not None:
            return await self._on_error_body(share, message)
        if self._direct is not None:
            self._direct.hear(message.data)
        data = self._joiner.feed(self._position[share], message.data)
        if self._joiner.failed:
            self._call.outcome = "failed"
        await self._write(data, last=self._joiner.failed)
        return self._joiner.failed

    async def _on_error_body(self, share: Share, message: wire.Body) -> bool:
        assert self._error is not None
        failing, parts = self._error
        if share is not failing:
            return False
        parts.append(message.data)
        if not message.end:
            return False
        self._call.outcome = "failed"
        body = b"".join(parts)
        if self._call.started:
            await self._call.write(event(parse_object(body)), more=False)
        else:
            await _respond(self._call, self._fanout, self._heads[share], body)
        return True

    async def _write(self, data: bytes, force: bool = False, last: bool = False) -> None:
        """Write once the headers are known; ``force``: as far as they are. The ``last`` bytes leave together
        with the end of the stream."""
        if data:
            self._pending.append(data)
        if not (force or last or (self._pending and self._headers_known())):
            return
        if not self._call.started:
            await self._start()
        if self._pending or last:
            data, self._pending = b"".join(self._pending), []
            await self._call.write(data, more=not last)

    def _headers_known(self) -> bool:
        waited = asyncio.get_running_loop().time() - self._first_at
        return self._call.started or len(self._heads) == len(self._position) or waited > HEADS_WAIT_S

    async def _start(self) -> None:
        head = next(iter(self._heads.values()))
        self._cluster.metrics.ttft.observe(asyncio.get_running_loop().time() - self._call.received)
        headers = [*headers_for_clients(head.headers), *proof_headers(self._call, self._fanout)]
        await self._call.start(head.status, headers)
