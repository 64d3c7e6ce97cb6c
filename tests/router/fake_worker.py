"""A worker without an engine: a real DEALER that speaks the wire protocol and answers from a script."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from braid import wire
from braid.keys import apply_curve_client

M = TypeVar("M")
Script = Callable[["FakeWorker", Any], Awaitable[None]]

REMOTE = wire.KvRecord(path="remote", transfers=1, nbytes=1000, blocks=4)
LOCAL = wire.KvRecord(path="local", reason="no_ticket")
JSON_HEADERS = (("content-type", "application/json"), ("content-length", "1"))
SSE_HEADERS = (("content-type", "text/event-stream; charset=utf-8"),)


class FakeWorker:
    """Says ``Hello`` until welcomed, beats, and runs ``script`` on each ``Prefill`` or ``Decode``.

    ``received`` holds every message; :meth:`expect` awaits one. A ``Cancel`` of a whole dispatch stops
    its script and answers with the terminal message, as a real worker does.
    """

    def __init__(
        self,
        endpoint: str,
        role: wire.Role,
        name: str,
        script: Script | None = None,
        keys_dir: Path | None = None,
        beats: bool = True,
        **hello: Any,
    ) -> None:
        fields: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "role": role,
            "worker": name,
            "epoch": secrets.randbits(63),
            "models": ("demo",),
            "max_model_len": 2048,
            "block_size": 32,
            "slots": 8,
            "fingerprint": "f",
            "vllm_version": "0.32.0",
            "kv_endpoints": ("tcp://127.0.0.1:1",) if role == "prefill" else (),
        }
        self.hello = wire.Hello(**{**fields, **hello})
        self.name = name
        self.script = script or (answer_prefill if role == "prefill" else answer_decode)
        self.received: list[Any] = []
        self.welcomed = asyncio.Event()
        self.gate = asyncio.Event()
        self.beats = beats
        self._arrived = asyncio.Condition()
        self._scripts: dict[int, tuple[Any, asyncio.Task[None]]] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        apply_curve_client(self._socket, keys_dir)
        self._socket.connect(endpoint)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> FakeWorker:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.die()

    async def join(self) -> None:
        """Return once welcomed."""
        await asyncio.wait_for(self.welcomed.wait(), 60)

    async def die(self) -> None:
        """Vanish without a word. Idempotent."""
        tasks = [*self._tasks, *(task for _, task in self._scripts.values())]
        self._tasks, self._scripts = [], {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._socket.closed:
            self._socket.close()
            self._context.term()

    async def send(self, *messages: wire.FromWorker) -> None:
        await self.send_raw(*(wire.encode(message) for message in messages))

    async def send_raw(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    async def expect(self, kind: type[M], count: int = 1, timeout_s: float = 60) -> M:
        """The ``count``-th message of a kind, once it is there (probes of pairs are left out)."""
        async with asyncio.timeout(timeout_s), self._arrived:
            await self._arrived.wait_for(lambda: len(self.got(kind)) >= count)
        return self.got(kind)[count - 1]

    def got(self, kind: type[M]) -> list[M]:
        probes = {m.ref for m in self.received if getattr(m, "request_id", "").startswith("probe-")}
        return [m for m in self.received if isinstance(m, kind) and getattr(m, "ref", 0) not in probes]

    async def _beat(self) -> None:
        while True:
            if not self.welcomed.is_set():
                await self.send(self.hello)
            elif self.beats:
                await self.send(wire.Beat(running=len(self._scripts)))
            await asyncio.sleep(0.05)

    async def _read(self) -> None:
        while True:
            for frame in await self._socket.recv_multipart():
                await self._on_message(wire.decode_to_worker(frame))

    async def _on_message(self, message: wire.ToWorker) -> None:
        async with self._arrived:
            self.received.append(message)
            self._arrived.notify_all()
        match message:
            case wire.Welcome():
                self.welcomed.set()
            case wire.Prefill() | wire.Decode():
                task = asyncio.create_task(self._run(message))
                self._scripts[message.ref] = (message, task)
            case wire.Cancel(ref=ref, samples=None) if ref in self._scripts:
                work, task = self._scripts.pop(ref)
                task.cancel()
                await self.send(terminal(work))

    async def _run(self, message: Any) -> None:
        script = self.script
        if message.request_id.startswith("probe-"):
            script = answer_prefill if self.hello.role == "prefill" else answer_decode
        await script(self, message)
        self._scripts.pop(message.ref, None)


def terminal(work: wire.Prefill | wire.Decode) -> wire.FromWorker:
    """What answers a cancelled dispatch."""
    if isinstance(work, wire.Prefill):
        return wire.PrefillDone(work.ref, 499)
    if work.mode == "samples":
        return wire.GroupDone(work.ref, 200, prompt_tokens=7)
    return wire.Body(work.ref, b"", end=True, cut="cancelled")


# Scripts


async def silent(worker: FakeWorker, message: Any) -> None:
    """Never answers."""
    await asyncio.Event().wait()


async def answer_prefill(worker: FakeWorker, message: wire.Prefill) -> None:
    await worker.send(wire.PrefillDone(message.ref, 200, prompt_tokens=7))


def prefill_fails(status: int, body: bytes = b"{}") -> Script:
    async def script(worker: FakeWorker, message: wire.Prefill) -> None:
        await worker.send(wire.PrefillDone(message.ref, status, body))

    return script


async def answer_decode(worker: FakeWorker, message: wire.Decode) -> None:
    """Two words a sample, ``<worker>.<index>``, in whatever form was asked for."""
    if message.mode == "samples":
        await answer_samples(worker, message)
    elif msgspec.json.decode(message.body).get("stream"):
        await worker.send(wire.Head(message.ref, 200, SSE_HEADERS, record(message)))
        for data in stream_events(message, worker.name):
            await worker.send(wire.Body(message.ref, data))
        await worker.send(wire.Body(message.ref, b"data: [DONE]\n\n", end=True, kv=record(message)))
    else:
        head = wire.Head(message.ref, 200, JSON_HEADERS, record(message))
        body = msgspec.json.encode(whole(message, worker.name))
        await worker.send(head, wire.Body(message.ref, body, end=True, kv=record(message)))


async def answer_at_gate(worker: FakeWorker, message: wire.Decode) -> None:
    """As :func:`answer_decode`, once ``worker.gate`` is set."""
    await worker.gate.wait()
    await answer_decode(worker, message)


async def stream_until_gate(worker: FakeWorker, message: wire.Decode) -> None:
    """The first words of a stream; the rest once ``worker.gate`` is set."""
    events = stream_events(message, worker.name)
    head = wire.Head(message.ref, 200, SSE_HEADERS, record(message))
    await worker.send(head, wire.Body(message.ref, events[0]))
    await worker.gate.wait()
    rest = b"".join(events[1:]) + b"data: [DONE]\n\n"
    await worker.send(wire.Body(message.ref, rest, end=True, kv=record(message)))


def decode_fails(status: int, error: str = "engine says no") -> Script:
    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        body = msgspec.json.encode(
            {"error": {"message": error, "type": "invalid_request_error", "param": "prompt", "code": status}}
        )
        if message.mode == "samples":
            await worker.send(wire.GroupDone(message.ref, status, body))
            return
        head = wire.Head(message.ref, status, JSON_HEADERS)
        await worker.send(head, wire.Body(message.ref, body, end=True))

    return script


async def answer_samples(worker: FakeWorker, message: wire.Decode) -> None:
    n = msgspec.json.decode(message.body)["n"]
    for index in range(message.first, message.first + n):
        await worker.send(sample(message, index, f"The answer is {index % 2}."))
    await worker.send(group_done(message, n))


def sample(message: wire.Decode, index: int, text: str, tokens: int = 5) -> wire.Sample:
    """A finished sample."""
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": text, "tool_calls": []},
        "text": text,
        "finish_reason": "stop",
    }
    return wire.Sample(
        message.ref, index, "finished", msgspec.json.encode(choice), text, "stop", tokens, -0.1 * tokens
    )


def group_done(message: wire.Decode, n: int) -> wire.GroupDone:
    return wire.GroupDone(
        message.ref, 200, prompt_tokens=7, cached_tokens=4, choice_tokens=5 * n, kv=record(message)
    )


def record(message: wire.Decode) -> wire.KvRecord:
    return LOCAL if message.ticket is None else REMOTE


def whole(message: wire.Decode, name: str) -> dict[str, Any]:
    """A chat completion as vLLM words it."""
    body = msgspec.json.decode(message.body)
    n = body.get("n") or 1
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": f"{name}.{i}"},
            "text": f"{name}.{i}",
            "finish_reason": "stop",
        }
        for i in range(n)
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 2 * n, "total_tokens": 7 + 2 * n}
    return {
        "id": f"chatcmpl-{message.request_id}-{name}",
        "object": "chat.completion",
        "created": 1,
        "model": body.get("model", "demo"),
        "choices": choices,
        "usage": usage,
    }


def stream_events(message: wire.Decode, name: str) -> list[bytes]:
    """SSE events of a chat completion without ``[DONE]``: a step an event batch."""
    body = msgspec.json.decode(message.body)
    n = body.get("n") or 1
    frame = {
        "id": f"chatcmpl-{message.request_id}-{name}",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": body.get("model", "demo"),
    }

    def step(text: str, finish: str | None) -> bytes:
        return b"".join(
            event({**frame, "choices": [{"index": i, "delta": {"content": text}, "finish_reason": finish}]})
            for i in range(n)
        )

    events = [step(f"{name} ", None), step("says", None), step("", "stop")]
    if (body.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": 7, "completion_tokens": 2 * n, "total_tokens": 7 + 2 * n}
        events.append(event({**frame, "choices": [], "usage": usage}))
    return events


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
