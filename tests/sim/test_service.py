"""A decode worker's service without a router: single samples, kept samples, and what is sent."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from braid import wire
from braid.sim.decode import DecodeService
from braid.sim.worker import Shared, SimWorker
from tests.sim.conftest import settings_of

pytestmark = pytest.mark.slow

M = Any


class Desk:
    """A decode worker's service and what it has sent."""

    def __init__(self, worker: SimWorker) -> None:
        self.worker = worker
        assert isinstance(worker.service, DecodeService)
        self.service = worker.service
        self.sent: list[wire.FromWorker] = []
        self._sent = asyncio.Event()
        worker.link.send = self._send  # type: ignore[method-assign]

    def _send(self, message: wire.FromWorker) -> None:
        self.sent.append(message)
        self._sent.set()

    @property
    def pool(self) -> Any:
        return self.worker.engine.scheduler.pool

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.sent if isinstance(message, kind)]

    async def until(self, kind: type[M], count: int = 1) -> M:
        async with asyncio.timeout(60):
            while len(self.of(kind)) < count:
                self._sent.clear()
                await self._sent.wait()
        return self.of(kind)[count - 1]

    def decode(self, ref: int, text: str, *, n: int = 4, **fields: Any) -> None:
        given = {"mode": "samples", "deadline_s": 60.0, **fields}
        body = {"prompt": text, "n": n, "max_tokens": 4000, "seed": 1}
        data = msgspec.json.encode(body)
        self.service.start(wire.Decode(ref, "/v1/completions", data, f"r{ref}", **given))

    async def running(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.worker.engine.scheduler.running) != count:
                await asyncio.sleep(0)

    async def steps(self, count: int) -> None:
        """Let the engine make this many steps."""
        engine = self.worker.engine
        until = engine.steps + count
        async with asyncio.timeout(60):
            while engine.steps < until:
                await asyncio.sleep(0)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    settings = settings_of("decode", router="tcp://127.0.0.1:1")
    shared = Shared(settings)
    worker = SimWorker("decode", "d0", settings, shared)
    found = Desk(worker)
    yield found
    found.service.cancel_all("over")
    await asyncio.sleep(0)
    worker.check_integrity()
    assert found.pool.free_blocks == found.pool.blocks
    worker.engine.close()
    worker.link.close()  # it has said nothing to anybody
    await shared.stop()


async def test_a_cancelled_sample_gives_its_blocks_back_at_once(desk: Desk) -> None:
    desk.decode(1, "[sim tokens=3000]")
    await desk.running(4)
    await desk.steps(3)
    before = desk.pool.free_blocks
    desk.service.cancel(wire.Cancel(1, (1, 2)))
    assert desk.pool.free_blocks > before
    assert {(s.index, s.state) for s in desk.of(wire.Sample)} == {(1, "cancelled"), (2, "cancelled")}
    desk.service.cancel(wire.Cancel(1, (1, 2)))
    assert len(desk.of(wire.Sample)) == 2
    assert len(desk.worker.engine.scheduler.running) == 2


async def test_a_cancelled_dispatch_is_answered_once_and_counts_its_tokens(desk: Desk) -> None:
    desk.decode(1, "[sim tokens=3000]")
    await desk.running(4)
    await desk.steps(3)
    desk.service.cancel(wire.Cancel(1))
    assert desk.pool.free_blocks == desk.pool.blocks
    done = desk.of(wire.GroupDone)
    assert [d.status for d in done] == [499]
    assert done[0].choice_tokens > 0
    desk.service.cancel(wire.Cancel(1))
    await asyncio.sleep(0.02)
    assert len(desk.of(wire.GroupDone)) == 1
    assert desk.service.idle()


async def test_samples_cancelled_before_they_begin_are_reported(desk: Desk) -> None:
    desk.decode(1, "hello [sim tokens=20]", first=8)
    desk.service.cancel(wire.Cancel(1, (8, 9)))
    done = await desk.until(wire.GroupDone)
    assert done.status == 200
    states = {sample.index: sample.state for sample in desk.of(wire.Sample)}
    assert states == {8: "cancelled", 9: "cancelled", 10: "finished", 11: "finished"}


async def test_cancelled_samples_are_the_only_difference(desk: Desk) -> None:
    desk.decode(1, "hello [sim tokens=30]")
    await desk.until(wire.GroupDone)
    whole = {sample.index: sample.text for sample in desk.of(wire.Sample)}
    desk.sent.clear()
    desk.decode(2, "hello [sim tokens=30]", n=2, first=2)
    await desk.until(wire.GroupDone)
    assert {s.index: s.text for s in desk.of(wire.Sample)} == {2: whole[2], 3: whole[3]}


async def test_a_sample_tells_what_it_generated(desk: Desk) -> None:
    desk.decode(1, "hello", n=1)
    sample = await desk.until(wire.Sample)
    choice = msgspec.json.decode(sample.choice)
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, sample.text, "stop")
    assert sample.tokens * 4 == len(sample.text)
    assert sample.logprob is not None
    assert sample.logprob < 0
    done = await desk.until(wire.GroupDone)
    assert (done.choice_tokens, done.prompt_tokens) == (sample.tokens, 2)
    assert done.kv == wire.KvRecord("local", reason="no_ticket")


async def test_a_kept_sample_is_gone_on_from_and_forgotten(desk: Desk) -> None:
    text = "a question of some length " * 8
    desk.decode(1, text, n=1, keep=True)
    sample = await desk.until(wire.Sample)
    await desk.until(wire.GroupDone)
    assert desk.pool.free_blocks < desk.pool.blocks
    desk.decode(2, text + sample.text + " And now?", n=1, after="1-0")
    done = await desk.until(wire.GroupDone, 2)
    assert done.cached_tokens == (len(text) + len(sample.text)) // 4
    desk.service.forget(wire.Forget(("1-0", "unknown")))
    assert desk.pool.free_blocks == desk.pool.blocks


async def test_a_deadline_is_a_504_of_the_group(desk: Desk) -> None:
    desk.decode(1, "[sim tokens=4000]", deadline_s=0.1)
    assert (await desk.until(wire.GroupDone)).status == 504
    assert desk.pool.free_blocks == desk.pool.blocks


async def test_time_never_passes_faster_than_the_model_says(desk: Desk) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    desk.decode(1, "[sim tokens=60]")
    await desk.until(wire.GroupDone)
    engine = desk.worker.engine
    assert loop.time() - begun >= engine.busy_s * engine.time_scale - 0.005
    assert engine.steps >= 60


async def test_beats_tell_what_runs(desk: Desk) -> None:
    desk.decode(1, "[sim tokens=3000]", n=200)
    await desk.running(128)
    beat = desk.service.beat()
    assert (beat.running, beat.waiting) == (128, 72)
    assert 0 < beat.kv_usage < 1


async def test_an_unsure_sample_is_ended_at_the_token_where_it_falls(desk: Desk) -> None:
    watch = wire.Watch(window=4, top=5)
    desk.decode(1, "hello [sim tokens=40]", n=8, watch=watch)
    await desk.until(wire.GroupDone)
    sure = {sample.index: sample for sample in desk.of(wire.Sample)}
    least = sorted(sample.confidence for sample in sure.values())[4]
    desk.sent.clear()
    desk.decode(2, "hello [sim tokens=40]", n=8, watch=wire.Watch(4, 5, least))
    await desk.until(wire.GroupDone)
    for sample in desk.of(wire.Sample):
        whole = sure[sample.index]
        assert sample.text == whole.text[: 4 * sample.tokens]
        if sample.state == "cancelled":
            assert sample.confidence < least
            assert sample.tokens < whole.tokens
        else:
            assert sample == msgspec.structs.replace(whole, ref=2, choice=sample.choice)
    assert Counter(sample.state for sample in desk.of(wire.Sample))["cancelled"] >= 1
