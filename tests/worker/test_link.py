"""The worker's end of the link, against a scripted router on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import pytest
import zmq
import zmq.asyncio

from braid import wire
from braid.log import GROUP
from braid.worker.link import WorkerLink, keep_calling
from tests.kvtransfer.proxy import Proxy

DEADLINE_S = 60.0
HEARTBEAT_S = 0.05
M = TypeVar("M")
HELLO = wire.Hello(
    protocol=wire.PROTOCOL,
    role="decode",
    worker="d0",
    epoch=1,
    models=("demo",),
    max_model_len=1,
    block_size=1,
    slots=1,
    fingerprint="fp",
    vllm_version="0",
)
DECODE = wire.Decode(1, "/v1/completions", b"{}", "r", 1.0)


class Recorder:
    """A service that notes what it is told, and the groups that dispatches are started for."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[object] = asyncio.Queue()
        self.groups: list[str] = []

    def start(self, message: object) -> None:
        self.groups.append(GROUP.get())
        self.calls.put_nowait(message)

    cancel = lost = first = forget = start

    def cancel_all(self, reason: str) -> None:
        self.calls.put_nowait(reason)

    def beat(self) -> wire.Beat:
        return wire.Beat(running=3)

    async def next(self) -> object:
        async with asyncio.timeout(DEADLINE_S):
            return await self.calls.get()


class ScriptedRouter:
    """A socket that says what it is told to, where a router should be."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = wire.MAX_FRAME
        self._port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{self._port}"
        self._worker = b""

    async def batch(self) -> list[wire.FromWorker]:
        """The next multipart message."""
        async with asyncio.timeout(DEADLINE_S):
            self._worker, *frames = await self._socket.recv_multipart()
        return [wire.decode_from_worker(frame) for frame in frames]

    async def expect(self, kind: type[M]) -> M:
        while True:
            for message in await self.batch():
                if isinstance(message, kind):
                    return message

    async def say(self, *messages: wire.ToWorker) -> None:
        await self.raw(*map(wire.encode, messages))

    async def raw(self, *frames: bytes) -> None:
        await self._socket.send_multipart([self._worker, *frames])

    async def welcome(self, epoch: int = 1) -> None:
        await self.expect(wire.Hello)
        await self.say(wire.Welcome(epoch, HEARTBEAT_S))
        await self.expect(wire.Beat)

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    router = ScriptedRouter()
    yield router
    router.close()


@pytest.fixture
def proxy(router: ScriptedRouter) -> Iterator[Proxy]:
    proxy = Proxy(router.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def service() -> Recorder:
    return Recorder()


@asynccontextmanager
async def running(
    endpoint: str, service: Recorder, misses: int = 10**6, hang_s: float = 10**6
) -> AsyncIterator[WorkerLink]:
    link = WorkerLink(endpoint, HELLO, service, heartbeat_s=HEARTBEAT_S, misses=misses, hang_s=hang_s)
    task = asyncio.create_task(link.run())
    yield link
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    link._socket.setsockopt(zmq.LINGER, 0)
    link.close()


@pytest.fixture
async def link(router: ScriptedRouter, service: Recorder) -> AsyncIterator[WorkerLink]:
    """A link that never gives its router up."""
    async with running(router.endpoint, service) as link:
        yield link


async def test_hello_is_repeated_until_it_is_welcomed(link: WorkerLink, router: ScriptedRouter) -> None:
    for _ in range(3):
        assert await router.batch() == [HELLO]
    assert not link.registered
    await router.say(wire.Welcome(5, HEARTBEAT_S))
    assert (await router.expect(wire.Beat)).running == 3
    assert link.registered


async def test_a_dispatch_is_started_for_its_group(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    await router.expect(wire.Hello)
    await router.say(wire.Welcome(5, HEARTBEAT_S))
    for message in (msgspec.structs.replace(DECODE, group="exam"), wire.Cancel(1)):
        await router.say(message)
        assert await service.next() == message
    assert service.groups == ["exam", ""]


async def test_a_ping_alone_registers_nobody(link: WorkerLink, router: ScriptedRouter) -> None:
    await router.expect(wire.Hello)
    await router.say(wire.Ping(5))
    await router.expect(wire.Hello)
    assert not link.registered


async def test_a_dispatch_from_before_the_welcome_is_dropped(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    """It was sent to a worker that has been given up since: nobody waits for its answer."""
    later = msgspec.structs.replace(DECODE, ref=2)
    await router.expect(wire.Hello)
    await router.say(DECODE, wire.Welcome(5, HEARTBEAT_S), later)
    assert await service.next() == later


async def test_what_one_turn_sends_travels_together(link: WorkerLink, router: ScriptedRouter) -> None:
    await router.welcome()
    sent = [wire.Body(n, b"token") for n in range(5)]
    for message in sent:
        link.send(message)
    assert await _without_beats(router) == sent


async def test_body_bytes_of_one_dispatch_are_joined(link: WorkerLink, router: ScriptedRouter) -> None:
    await router.welcome()
    record = wire.KvRecord("remote")
    link.send(wire.Body(1, b"a"))
    link.send(wire.Body(1, b"b"))
    link.send(wire.Body(2, b"x"))
    link.send(wire.Body(1, b"c"))
    link.send(wire.Body(1, b"", end=True, kv=record, cut="why"))
    assert await _without_beats(router) == [
        wire.Body(1, b"ab"),
        wire.Body(2, b"x"),
        wire.Body(1, b"c", end=True, kv=record, cut="why"),
    ]


@pytest.mark.parametrize("whole", [True, False])
async def test_a_reply_larger_than_a_frame_comes_in_parts(
    link: WorkerLink, router: ScriptedRouter, whole: bool
) -> None:
    """It ended the connection, and with it all that the worker ran."""
    await router.welcome()
    record, data = wire.KvRecord("remote"), bytes(range(256)) * ((wire.MAX_FRAME + 4096) // 256)
    if whole:
        link.send(wire.Body(1, data, end=True, kv=record))
    else:
        for at in range(0, len(data), 1 << 20):
            link.send(wire.Body(1, data[at : at + (1 << 20)]))
        link.send(wire.Body(1, b"", end=True, kv=record))
    parts = [part for part in await _without_beats(router) if isinstance(part, wire.Body)]
    while not parts[-1].end:
        parts += [part for part in await _without_beats(router) if isinstance(part, wire.Body)]
    assert b"".join(part.data for part in parts) == data
    assert [part.kv for part in parts] == [None] * (len(parts) - 1) + [record]
    assert link.registered


async def test_a_sample_larger_than_a_frame_fails_alone(link: WorkerLink, router: ScriptedRouter) -> None:
    await router.welcome()
    link.send(wire.Sample(1, 0, "finished", bytes(wire.MAX_FRAME), tokens=7))
    link.send(wire.Sample(1, 1, "finished", b"{}"))
    failed, other = await _without_beats(router)
    assert isinstance(failed, wire.Sample)
    assert (failed.index, failed.state, failed.tokens) == (0, "failed", 7)
    assert "fewer tokens" in failed.error
    assert other == wire.Sample(1, 1, "finished", b"{}")


async def test_dispatches_reach_the_service_in_order(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    await router.welcome()
    sent: list[wire.ToWorker] = [
        DECODE,
        wire.Lost(1, "gone"),
        wire.First(1, 8, (0.0, 1.0, 0, 0.0)),
        wire.Cancel(1),
    ]
    sent.append(wire.Forget(("r-0",)))
    await router.say(*sent)
    assert [await service.next() for _ in sent] == sent


async def test_malformed_frames_are_dropped_and_the_rest_is_heard(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    await router.welcome()
    await router.raw(b"", b"\xff" * 9, wire.encode(wire.Bye()), wire.encode(DECODE), b"\x91" * 9999)
    assert await service.next() == DECODE
    await router.expect(wire.Beat)


async def test_a_router_that_hangs_stops_all_work_and_is_greeted_again(
    router: ScriptedRouter, service: Recorder
) -> None:
    """Its connection lives all the time."""
    async with running(router.endpoint, service, hang_s=2 * HEARTBEAT_S) as link:
        await router.expect(wire.Hello)
        await router.say(wire.Welcome(1, HEARTBEAT_S))
        assert await service.next() == "router_gone"
        assert not link.registered
        await router.expect(wire.Hello)
        assert service.calls.empty(), "the work is stopped once"


async def test_a_router_that_is_gone_stops_all_work(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    await router.welcome()
    router.close()
    assert await service.next() == "router_gone"
    assert not link.registered


async def test_a_router_that_is_cut_off_stops_all_work_and_is_greeted_once_it_is_back(
    router: ScriptedRouter, service: Recorder, proxy: Proxy
) -> None:
    """The connection stays open, and nothing comes."""
    async with running(proxy.endpoint, service, misses=4):
        await router.welcome()
        proxy.faults.blackhole = True
        assert await service.next() == "router_gone"
        proxy.faults.blackhole = False
        proxy.reset()
        await router.welcome()


async def test_a_router_whose_loop_is_busy_is_not_given_up(router: ScriptedRouter, service: Recorder) -> None:
    async with running(router.endpoint, service, misses=2) as link:
        await router.welcome()
        for _ in range(20):  # beats come, pings don't
            await router.expect(wire.Beat)
        assert link.registered
        assert service.calls.empty()


async def test_a_restarted_router_stops_the_work_of_the_old_one(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    await router.welcome(1)
    await router.say(wire.Ping(2))
    assert await service.next() == "router_gone"
    await router.welcome(2)
    assert link.registered


async def test_pings_of_the_same_router_stop_nothing(
    link: WorkerLink, router: ScriptedRouter, service: Recorder
) -> None:
    await router.welcome(1)
    await router.say(wire.Ping(1), wire.Welcome(1, HEARTBEAT_S), wire.Ping(1), DECODE)
    assert await service.next() == DECODE


async def test_draining_says_bye_and_waits_until_nothing_runs(
    link: WorkerLink, router: ScriptedRouter
) -> None:
    await router.welcome()
    idle = False
    drain = asyncio.create_task(link.drain(lambda: idle, DEADLINE_S))
    await router.expect(wire.Bye)
    link.send(wire.Body(1, b"", end=True))
    await router.expect(wire.Body)
    assert not drain.done()
    idle = True
    await asyncio.wait_for(drain, DEADLINE_S)


async def test_draining_ends_at_its_limit(link: WorkerLink) -> None:
    await asyncio.wait_for(link.drain(lambda: False, 0.05), DEADLINE_S)
    assert link.draining


async def test_a_periodic_call_that_fails_is_made_again() -> None:
    calls = 0
    third = asyncio.Event()

    async def call() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            third.set()
        raise RuntimeError

    task = asyncio.create_task(keep_calling(call, 0))
    await asyncio.wait_for(third.wait(), DEADLINE_S)
    task.cancel()


async def _without_beats(router: ScriptedRouter) -> list[wire.FromWorker]:
    """The next batch that is not only a heartbeat."""
    is_beat: Callable[[object], bool] = lambda message: isinstance(message, wire.Beat)  # noqa: E731
    while not (batch := [m for m in await router.batch() if not is_beat(m)]):
        pass
    return batch
