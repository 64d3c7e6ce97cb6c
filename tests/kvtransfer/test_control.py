"""A server commands its ranks over ipc, and gets one answer of each."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from kvtransfer import wire
from kvtransfer.control import ControlClient, ControlServer
from kvtransfer.loop import Loop

DEADLINE_S = 60.0
KEY = wire.Key(b"k" * 16, 1)
OTHER = wire.Key(b"o" * 16, 1)


class FakeRank:
    """A rank's control client on a loop of its own; it answers only when it is told to."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self.commands: asyncio.Queue[wire.Command] = asyncio.Queue()
        server = asyncio.get_running_loop()

        def on_command(command: wire.Command) -> None:
            server.call_soon_threadsafe(self.commands.put_nowait, command)

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._loop = Loop(f"rank-{rank}")
        self.client = ControlClient(
            self._loop,
            self._context,
            endpoint,
            rank,
            on_command,
        )
        self.client.emit(wire.Ready(rank, f"layout{rank}", (wire.Shape(1, 1, 512),), ""))
        self._loop.start()

    def emit(self, event: wire.Event) -> None:
        self._loop.call_soon(lambda: self.client.emit(event))

    def emit_raw(self, *frames: bytes) -> None:
        def send() -> None:
            self.client._socket.send_multipart(frames)

        self._loop.call_soon(send)

    async def next(self) -> wire.Command:
        return await asyncio.wait_for(self.commands.get(), DEADLINE_S)

    def close(self) -> None:
        self._loop.stop()
        self._context.destroy(linger=0)


class Group:
    """A server with some ranks, all ready."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/kv"
        self.server = ControlServer(self.endpoint)
        self.ranks: list[FakeRank] = []

    async def join(self, ranks: int) -> list[FakeRank]:
        self.ranks = [FakeRank(self.endpoint, rank) for rank in reversed(range(ranks))][::-1]
        ready = await asyncio.wait_for(self.server.wait_ready(ranks), DEADLINE_S)
        assert [r.rank for r in ready] == list(range(ranks)), "in rank order, whoever came first"
        return self.ranks

    def close(self) -> None:
        self.server.close()
        for rank in self.ranks:
            rank.close()


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    group = Group(tmp_path)
    yield group
    group.close()


async def result(future: asyncio.Future[list[wire.Event]]) -> list[wire.Event]:
    return await asyncio.wait_for(future, DEADLINE_S)


async def test_commands_reach_their_rank(group: Group) -> None:
    first, second = await group.join(2)
    await group.server.send([wire.Close(KEY, "for 0"), wire.Close(KEY, "for 1")])
    await group.server.broadcast(wire.Stat())
    assert await first.next() == wire.Close(KEY, "for 0")
    assert await second.next() == wire.Close(KEY, "for 1")
    assert await first.next() == await second.next() == wire.Stat()


async def test_a_request_ends_when_every_rank_has_answered(group: Group) -> None:
    first, second = await group.join(2)
    opened, other = group.server.expect(("open", KEY)), group.server.expect(("open", OTHER))
    second.emit(wire.Opened(KEY))
    second.emit(wire.Opened(KEY))
    second.emit(wire.Opened(OTHER))
    first.emit(wire.Opened(OTHER))
    await result(other)
    assert not opened.done(), "one rank twice is not two ranks"
    first.emit(wire.Opened(KEY))
    assert await result(opened) == [wire.Opened(KEY)] * 2


async def test_loaded_and_failed_both_answer_a_load_in_rank_order(group: Group) -> None:
    first, second = await group.join(2)
    loaded, failed = wire.Loaded(KEY, 1, 1, 0.0, 0.0, 0.0, "zmq", 0), wire.Failed(KEY, "timeout")
    future = group.server.expect(("load", KEY))
    second.emit(failed)
    first.emit(loaded)
    assert await result(future) == [loaded, failed]


async def test_answers_that_nobody_expects_are_dropped(group: Group) -> None:
    (rank,) = await group.join(1)
    forgotten = group.server.expect(("open", KEY))
    group.server.forget(("open", KEY))
    group.server.forget(("open", KEY))
    closed = group.server.expect(("closed", KEY))
    rank.emit(wire.Opened(KEY))
    rank.emit(wire.Failed(OTHER, "late"))
    rank.emit(wire.Closed(KEY, "done"))
    assert await result(closed) == [wire.Closed(KEY, "done")]
    assert not forgotten.done()


async def test_an_answer_to_a_cancelled_request_is_harmless(group: Group) -> None:
    (rank,) = await group.join(1)
    group.server.expect(("open", KEY)).cancel()
    rank.emit(wire.Opened(KEY))
    rank.emit(wire.Closed(KEY, "done"))
    await result(group.server.expect(("closed", KEY)))


async def answer_stats(rank: FakeRank, stats: wire.Stats) -> None:
    while True:
        assert await rank.next() == wire.Stat()
        rank.emit(stats)


async def test_stats_are_summed_over_the_ranks(group: Group) -> None:
    ranks = await group.join(2)
    tasks = [asyncio.create_task(answer_stats(r, wire.Stats(1, 2, 3, 4))) for r in ranks]
    assert await asyncio.wait_for(group.server.stats(), DEADLINE_S) == wire.Stats(2, 4, 6, 8)
    for task in tasks:
        task.cancel()


async def test_stats_may_be_asked_for_twice_at_a_time(group: Group) -> None:
    (rank,) = await group.join(1)
    task = asyncio.create_task(answer_stats(rank, wire.Stats(1)))
    both = asyncio.gather(group.server.stats(), group.server.stats())
    assert list(await asyncio.wait_for(both, DEADLINE_S)) == [wire.Stats(1)] * 2
    task.cancel()


@pytest.mark.parametrize("frames", [(b"",), (b"\xff" * 9,), (wire.encode(wire.Stat()),), (b"a", b"b")])
async def test_a_malformed_event_does_not_end_the_server(group: Group, frames: tuple[bytes, ...]) -> None:
    (rank,) = await group.join(1)
    opened = group.server.expect(("open", KEY))
    rank.emit_raw(*frames)
    rank.emit(wire.Opened(KEY))
    await result(opened)


@pytest.mark.callbacks_may_fail
async def test_a_malformed_command_does_not_end_the_rank(group: Group) -> None:
    (rank,) = await group.join(1)
    identity = next(iter(group.server.ranks))
    for frame in (b"", b"\xff" * 9, wire.encode(wire.Opened(KEY))):
        await group.server._socket.send_multipart([identity, frame])
    await group.server.broadcast(wire.Stat())
    assert await rank.next() == wire.Stat()


async def test_closing_cancels_what_is_still_expected(group: Group, tmp_path: Path) -> None:
    await group.join(1)
    future = group.server.expect(("load", KEY))
    group.server.close()
    with pytest.raises(asyncio.CancelledError):
        await result(future)


async def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    async def once(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        group = Group(folder)
        await group.join(2)
        group.close()
        await asyncio.sleep(0)

    await once(0)
    descriptors: Callable[[], int] = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    gc.collect()  # what tests before this one have left to it
    before = descriptors()
    for number in range(1, 4):
        await once(number)
    assert descriptors() == before


async def test_an_answer_is_waited_for_once(group: Group) -> None:
    """The first who waited did so for ever."""
    first = group.server.expect(("load", KEY))
    with pytest.raises(ValueError, match="waited for already"):
        group.server.expect(("load", KEY))
    first.cancel()
    group.server.expect(("load", KEY)).cancel()
