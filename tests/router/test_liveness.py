"""Who is given up, and who is not: busy event loops, hung ones, stopped and cut off workers."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from braid import wire
from router.registry import Worker
from tests.kvtransfer.proxy import Proxy
from tests.router.conftest import CHAT, LONG_S, MakeStand, Stand, chat
from tests.router.fake_worker import FakeWorker, silent

HEARTBEATS = {"heartbeat_s": 0.1, "heartbeat_misses": 6}
PROCESS = """
import asyncio, sys
from tests.router.fake_worker import FakeWorker

async def main():
    async with FakeWorker(sys.argv[1], "decode", "d0"):
        await asyncio.Event().wait()

asyncio.run(main())
"""


class Apart:
    """A decode worker ``d0`` on an event loop of its own, which can be held up."""

    def __init__(self, link: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-worker", daemon=True)
        self._thread.start()
        self._goes_on = threading.Event()
        self.worker = self._do(self._make(link)).result(LONG_S)

    def hold_up(self) -> None:
        """Block the loop until :meth:`go_on`."""
        self._loop.call_soon_threadsafe(self._goes_on.wait)

    def go_on(self) -> None:
        self._goes_on.set()

    def close(self) -> None:
        self.go_on()
        self._do(self.worker.die()).result(LONG_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _make(self, link: str) -> FakeWorker:
        return await FakeWorker(link, "decode", "d0").__aenter__()

    def _do(self, work: object) -> Future[FakeWorker]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)  # type: ignore[arg-type]


@contextmanager
def apart(link: str) -> Iterator[Apart]:
    worker = Apart(link)
    try:
        yield worker
    finally:
        worker.close()


async def joined(stand: Stand) -> Worker:
    await stand.until(lambda: len(stand.app.registry.all()) == 1)
    return stand.app.registry.all()[0]


async def lost(stand: Stand, reason: str) -> None:
    await stand.until(lambda: not stand.app.registry.all())
    assert stand.metric("braid_workers_lost_total", role="decode", reason=reason) == 1


@pytest.mark.slow
async def test_a_worker_whose_loop_is_busy_is_not_given_up(make_stand: MakeStand) -> None:
    stand = await make_stand(**HEARTBEATS)
    with apart(stand.link) as busy:
        d0 = await joined(stand)
        busy.hold_up()
        await stand.until(lambda: d0.quiet)
        until = time.monotonic() + 10 * HEARTBEATS["heartbeat_s"]
        await stand.until(lambda: time.monotonic() > until)
        assert d0.state == "quiet"
        busy.go_on()
        await stand.until(lambda: d0.state == "ready")


async def test_a_worker_whose_loop_hangs_is_given_up(make_stand: MakeStand) -> None:
    stand = await make_stand(**HEARTBEATS, hang_s=1.0)
    with apart(stand.link) as hung:
        await joined(stand)
        hung.hold_up()
        await lost(stand, "silent")


async def test_a_quiet_worker_gets_work_only_if_there_is_no_other(make_stand: MakeStand) -> None:
    stand = await make_stand(**HEARTBEATS)
    with apart(stand.link) as busy:
        d0 = await joined(stand)
        busy.hold_up()
        await stand.until(lambda: d0.quiet)
        assert stand.app.registry.ready("decode", "demo") == [d0]
        await stand.worker("decode", "d1")
        assert [w.name for w in stand.app.registry.ready("decode", "demo")] == ["d1"]


async def test_a_stopped_process_is_given_up(make_stand: MakeStand) -> None:
    stand = await make_stand(**HEARTBEATS)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROCESS, stand.link)
    try:
        await joined(stand)
        process.send_signal(signal.SIGSTOP)
        await lost(stand, "disconnected")
    finally:
        process.kill()
        await process.wait()


async def test_a_worker_that_is_cut_off_is_given_up_and_rejoins(make_stand: MakeStand) -> None:
    """Its connection stays open, and nothing comes."""
    stand = await make_stand(**HEARTBEATS)
    proxy = Proxy(stand.link)
    try:
        async with FakeWorker(proxy.endpoint, "decode", "d0") as d0:
            await joined(stand)
            proxy.faults.blackhole = True
            await lost(stand, "disconnected")
            proxy.faults.blackhole = False
            proxy.reset()
            d0.welcomed.clear()  # as a worker that has lost its router
            await joined(stand)
    finally:
        proxy.close()


@pytest.mark.slow
async def test_a_router_whose_loop_is_late_gives_nobody_up(make_stand: MakeStand) -> None:
    """What a worker said meanwhile waits in the router's socket, and its request goes on."""
    stand = await make_stand(**HEARTBEATS, hang_s=1.0)
    with apart(stand.link) as worker:
        d0 = await joined(stand)
        worker.worker.script = silent
        request = asyncio.create_task(stand.post(CHAT, chat(deadline_s=LONG_S)))
        await stand.until(lambda: bool(worker.worker.got(wire.Decode)))
        time.sleep(2.0)  # noqa: ASYNC251 - this loop is the router's
        for _ in range(3):
            pings = len(worker.worker.got(wire.Ping))
            await stand.until(lambda: len(worker.worker.got(wire.Ping)) > pings)  # noqa: B023
        assert stand.app.registry.all() == [d0]
        assert not request.done()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
