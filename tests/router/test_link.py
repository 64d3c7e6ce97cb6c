"""The link over real sockets: joining, beating, malformed frames, keys."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from braid import wire
from braid.keys import make_keys
from router.link import NOBODY, Inbox
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import FakeWorker, silent


async def test_a_worker_is_welcomed_and_pinged(stand: Stand) -> None:
    d0 = await stand.worker("decode", "d0")
    ping = await d0.expect(wire.Ping)
    assert ping.router == stand.app.link.epoch
    assert [w.name for w in stand.app.registry.all()] == ["d0"]


async def test_single_requests_count_until_a_heartbeat_tells_what_runs(make_stand: MakeStand) -> None:
    stand = await make_stand(heartbeat_s=10)
    _, d0 = await stand.workers()
    d0.beats = False
    link, worker = stand.app.link, stand.app.registry.ready("decode", "demo")[0]
    before = worker.crowd
    opened = [link.open(worker, 1, Inbox(), None, single=single) for single in (True, False, True)]
    assert worker.crowd == before + 2
    await d0.send(wire.Beat(running=5))
    await stand.until(lambda: worker.beat.running == 5)
    assert worker.crowd == 5
    assert time.monotonic() - worker.single_at < 60
    sent = worker.single_at
    await d0.send(wire.Body(opened[1].ref, b"", end=True))
    await stand.until(lambda: opened[1].ended)
    assert worker.single_at == sent  # that one was a group's
    await d0.send(*(wire.Body(one.ref, b"", end=True) for one in (opened[0], opened[2])))
    await stand.until(lambda: opened[2].ended)
    assert worker.single_at > sent


async def test_a_worker_that_hangs_is_lost_and_rejoins(make_stand: MakeStand) -> None:
    stand = await make_stand(hang_s=0.3)
    d0 = await stand.worker("decode", "d0", beats=False)
    await stand.until(lambda: not stand.app.registry.all())
    await d0.send(wire.Beat())
    await stand.until(lambda: d0.got(wire.Ping)[-1].router == NOBODY)
    await d0.send(d0.hello)
    await stand.until(lambda: len(stand.app.registry.all()) == 1)


async def test_a_killed_worker_is_noticed_by_its_connection(make_stand: MakeStand) -> None:
    stand = await make_stand(heartbeat_s=0.2, heartbeat_misses=1000)
    d0 = await stand.worker("decode", "d0")
    await d0.die()
    await stand.until(lambda: not stand.app.registry.all())
    assert stand.metric("braid_workers_lost_total", role="decode", reason="disconnected") == 1


async def test_malformed_frames_are_counted_and_harmless(stand: Stand) -> None:
    _, d0 = await stand.workers()
    await d0.send_raw(b"", b"\xff" * 10, b"\x81\xa1t\xa5hello", wire.encode(wire.Ping(1)))
    await stand.until(lambda: stand.metric("braid_frames_dropped_total", reason="malformed") == 4)
    assert (await stand.post(CHAT, chat())).status_code == 200


async def test_unknown_foreign_and_repeated_answers_are_dropped(stand: Stand) -> None:
    p0, d0 = await stand.workers(decode=silent)
    request = asyncio.create_task(stand.post(CHAT, chat()))
    decode = await d0.expect(wire.Decode)
    done = wire.Body(decode.ref, b"{}", end=True)
    await p0.send(done, wire.Body(10**6, b""))
    await stand.until(lambda: stand.metric("braid_frames_dropped_total", reason="unknown_ref") == 2)
    await d0.send(wire.Head(decode.ref, 200, ()), done, done)
    assert (await request).status_code == 200
    await stand.until(lambda: stand.metric("braid_frames_dropped_total", reason="unknown_ref") == 3)


async def test_a_stranger_is_not_heard(stand: Stand) -> None:
    async with FakeWorker(stand.link, "decode", "d0", protocol=wire.PROTOCOL + 1) as worker:
        await stand.until(lambda: stand.metric("braid_frames_dropped_total", reason="hello") > 0)
        await worker.send(wire.Beat())
        await stand.until(lambda: stand.metric("braid_frames_dropped_total", reason="stranger") > 0)
        assert not worker.welcomed.is_set()


async def test_messages_of_one_tick_leave_as_one_batch(stand: Stand) -> None:
    d0 = await stand.worker("decode", "d0", silent)
    worker = stand.app.registry.all()[0]
    for ref in (1, 2, 3):
        stand.app.link.send(worker, wire.Cancel(ref))
    await d0.expect(wire.Cancel, 3)
    assert [m.ref for m in d0.got(wire.Cancel)] == [1, 2, 3]


async def test_only_holders_of_the_cluster_keys_are_let_in(make_stand: MakeStand, tmp_path: Path) -> None:
    make_keys(tmp_path / "ours")
    make_keys(tmp_path / "theirs")
    stand = await make_stand(keys_dir=tmp_path / "ours")
    await stand.worker("decode", "d0", keys_dir=tmp_path / "ours")
    for keys_dir in (tmp_path / "theirs", None):
        async with FakeWorker(stand.link, "decode", "d1", keys_dir=keys_dir) as stranger:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stranger.welcomed.wait(), 0.5)
    assert [w.name for w in stand.app.registry.all()] == ["d0"]


async def test_a_restarted_router_does_not_reuse_numbers(make_stand: MakeStand) -> None:
    """A late answer to the old router's dispatch must not be taken for a new one's."""
    first, second = await make_stand(), await make_stand()
    refs = []
    for stand in (first, second):
        _, d0 = await stand.workers()
        refs.append({m.ref for m in d0.received if isinstance(m, wire.Decode)})
    assert refs[0].isdisjoint(refs[1])
