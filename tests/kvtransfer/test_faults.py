"""What networks do to a transfer: it is resumed or it fails in time, and never counts what has not come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kvtransfer import wire
from tests.kvtransfer.ends import EPOCH, Pair, contents, make_cache, make_key, same
from tests.kvtransfer.proxy import Proxy

pytestmark = pytest.mark.slow

MakePair = Callable[..., Pair]
KEY = make_key()
BLOCKS = 24
ROW_BYTES = 16 * 1024
BLOCK_BYTES = 4 * ROW_BYTES
THEIRS = list(range(20))
OURS = tuple(range(1, 21))


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """Blocks of 64 KiB, each a parcel, through sockets (shared memory has no network)."""
    return make_pair(
        transports=["zmq"], blocks=BLOCKS, row_bytes=ROW_BYTES, piece_bytes=BLOCK_BYTES, capacity=1 << 24
    )


@pytest.fixture
def proxy(pair: Pair) -> Iterator[Proxy]:
    proxy = Proxy(pair.endpoint)
    yield proxy
    proxy.close()


def begin(pair: Pair, proxy: Proxy, **changes: object) -> None:
    """A load of 20 blocks, all of which are published."""
    pair.p.open(KEY, len(THEIRS))
    pair.p.publish(KEY, 0, THEIRS)
    pair.d.load(KEY, proxy.endpoint, OURS, **changes)


def whole(pair: Pair) -> set[int]:
    """The prompt's blocks that lie in the consumer's cache."""
    return {
        n
        for n, (a, b) in enumerate(zip(THEIRS, OURS, strict=True))
        if same(pair.p.cache, [a], pair.d.cache, [b])
    }


def works(pair: Pair, endpoint: str) -> None:
    key = make_key(99)
    pair.p.open(key, 1)
    pair.p.publish(key, 0, [7])
    pair.d.load(key, endpoint, (22,))
    pair.d.events.expect(wire.Loaded, key)
    assert same(pair.p.cache, [7], pair.d.cache, [22])


def test_a_load_goes_on_after_a_reset_with_the_blocks_that_it_lacks(pair: Pair, proxy: Proxy) -> None:
    proxy.faults.cut_after = 7 * BLOCK_BYTES + BLOCK_BYTES // 2
    asked: list[tuple[wire.Want, ...]] = []
    subscribe = pair.p.end._subscribe

    def note(session: object, message: wire.Subscribe) -> None:
        asked.append(message.wants)
        subscribe(session, message)  # type: ignore[arg-type]

    pair.p.end._subscribe = note  # type: ignore[method-assign, assignment]
    begin(pair, proxy)
    loaded = pair.d.events.expect(wire.Loaded, KEY)
    assert (loaded.retries, loaded.blocks, loaded.nbytes) == (1, 20, 20 * BLOCK_BYTES)
    assert whole(pair) == set(range(20))
    assert asked == [(wire.Want(0, 0, 20),), (wire.Want(0, 7, 13),)]
    assert proxy.accepted == 2
    pair.p.settle()


def test_what_was_published_while_there_was_no_connection_comes_after_it(pair: Pair, proxy: Proxy) -> None:
    pair.p.open(KEY, 20)
    pair.p.publish(KEY, 0, THEIRS[:4])
    pair.d.load(KEY, proxy.endpoint, OURS)
    pair.d.until(lambda: len(whole(pair)) == 4)
    proxy.reset()
    pair.p.publish(KEY, 4, THEIRS[4:])
    assert pair.d.events.expect(wire.Loaded, KEY).retries == 1
    assert whole(pair) == set(range(20))
    pair.p.settle()


def test_a_half_closed_connection_is_a_lost_one(pair: Pair, proxy: Proxy) -> None:
    pair.p.open(KEY, 20)
    pair.p.publish(KEY, 0, THEIRS[:4])
    pair.d.load(KEY, proxy.endpoint, OURS)
    pair.d.until(lambda: len(whole(pair)) == 4)
    proxy.half_close()
    pair.p.publish(KEY, 4, THEIRS[4:])
    assert pair.d.events.expect(wire.Loaded, KEY).retries == 1
    pair.p.settle()


def test_too_many_resets_fail_the_load(pair: Pair, proxy: Proxy) -> None:
    pair.p.open(KEY, 20)
    pair.p.publish(KEY, 0, THEIRS[:1])
    pair.d.load(KEY, proxy.endpoint, OURS)
    for retries in range(4):
        pair.d.until(
            lambda retries=retries: any(  # type: ignore[misc]
                peer.up and pair.d.end._loads[KEY].retries == retries for peer in pair.d.end._peers.values()
            )
        )
        proxy.reset()
    assert pair.d.events.expect(wire.Failed, KEY).reason == "disconnected"
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    works(pair, proxy.endpoint)
    pair.p.settle()


def test_a_producer_that_listens_no_more_fails_the_load_at_once(pair: Pair, proxy: Proxy) -> None:
    pair.p.open(KEY, 20)
    pair.p.publish(KEY, 0, THEIRS[:3])
    pair.d.load(KEY, proxy.endpoint, OURS)
    pair.d.until(lambda: len(whole(pair)) == 3)
    began = time.monotonic()
    proxy.refuse()
    assert pair.d.events.expect(wire.Failed, KEY).reason == "disconnected"
    assert time.monotonic() - began < 1
    assert whole(pair) == {0, 1, 2}


def test_a_producer_that_was_never_there_is_unreachable(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.consumer.CONNECT_S", 0.3)
    pair.d.load(KEY, "tcp://127.0.0.1:1", OURS)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "unreachable"


def test_a_crawling_connection_ends_at_the_deadline_and_counts_no_partial_block(
    pair: Pair, proxy: Proxy
) -> None:
    proxy.faults.rate = 4 * BLOCK_BYTES
    before = contents(pair.d.cache)
    begin(pair, proxy, deadline_s=1.0)
    began = time.monotonic()
    assert pair.d.events.expect(wire.Failed, KEY).reason == "timeout"
    assert time.monotonic() - began < 2
    came = contents(pair.d.cache)
    done = whole(pair)
    assert 0 < len(done) < 20
    rest = [ours for n, ours in enumerate(OURS) if n not in done]
    assert torch.equal(came[:, rest], before[:, rest])
    proxy.faults.rate = 0
    works(pair, proxy.endpoint)
    assert torch.equal(contents(pair.d.cache)[:, rest], before[:, rest]), "late blocks are not written"
    pair.p.settle()


def test_a_blackhole_ends_at_the_deadline(pair: Pair, proxy: Proxy) -> None:
    works(pair, proxy.endpoint)
    proxy.faults.blackhole = True
    begin(pair, proxy, deadline_s=0.5)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "timeout"
    assert whole(pair) == set()
    proxy.faults.blackhole = False
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    pair.p.settle()


def test_a_blackhole_is_noticed_before_a_long_deadline(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.sockets.HEARTBEAT_S", 0.1)
    monkeypatch.setattr("kvtransfer.sockets.SILENT_S", 0.3)
    pair = make_pair(transports=["zmq"])
    proxy = Proxy(pair.endpoint)
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, proxy.endpoint, (1, 2))
    pair.d.until(lambda: same(pair.p.cache, [1], pair.d.cache, [1]))
    proxy.faults.blackhole = True
    assert pair.d.events.expect(wire.Failed, KEY).reason == "disconnected"
    pair.p.until(lambda: not pair.p.end._sessions)
    proxy.close()


def test_a_blackhole_is_noticed_by_who_has_much_to_send(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZMQ does not ping where payloads wait: the producer kept the session until TCP gave up."""
    monkeypatch.setattr("kvtransfer.sockets.HEARTBEAT_S", 0.1)
    monkeypatch.setattr("kvtransfer.sockets.SILENT_S", 0.3)
    pair = make_pair(transports=["zmq"], row_bytes=1 << 20, capacity=1 << 26)
    proxy = Proxy(pair.endpoint)
    pair.p.open(KEY, 10)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, proxy.endpoint, tuple(range(1, 11)))
    pair.d.until(lambda: same(pair.p.cache, [1], pair.d.cache, [1]))
    proxy.faults.blackhole = True
    pair.p.publish(KEY, 1, list(range(2, 11)))
    assert pair.d.events.expect(wire.Failed, KEY).reason == "disconnected"
    pair.p.until(lambda: not pair.p.end._sessions)
    proxy.close()
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    pair.p.settle()


def test_slow_but_steady_is_no_fault(pair: Pair, proxy: Proxy) -> None:
    proxy.faults.delay_s = 0.005
    begin(pair, proxy)
    assert pair.d.events.expect(wire.Loaded, KEY).retries == 0
    assert whole(pair) == set(range(20))


def test_a_corrupt_byte_fails_the_load_and_only_that(
    pair: Pair, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults.corrupt_at = 5 * BLOCK_BYTES + BLOCK_BYTES // 2
    begin(pair, proxy)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "corrupt"
    assert whole(pair) == set(range(5)), "those before it"
    (record,) = [r for r in caplog.records if r.msg == "kv_digest_mismatch"]
    assert record.__dict__["security"]
    assert record.levelno == logging.ERROR
    proxy.faults.corrupt_at = None
    works(pair, proxy.endpoint)
    pair.p.settle()


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 5, 11, 40, 64, 70, 90, 120, 150, 190, 230, 260, 300])
def test_a_corrupt_byte_of_the_protocol_leaves_both_ends_working(
    make_pair: MakePair, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greeting, handshake, frame lengths, Welcome, Manifest, headers: whatever it hits."""
    monkeypatch.setattr("kvtransfer.consumer.CONNECT_S", 0.5)
    pair = make_pair(transports=["zmq"])
    proxy = Proxy(pair.endpoint)
    proxy.faults.corrupt_at = offset
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [3, 4])
    pair.d.load(KEY, proxy.endpoint, (1, 2), deadline_s=1.0)
    pair.d.until(lambda: bool(pair.d.events.seen))
    if isinstance(pair.d.events.seen[0], wire.Loaded):
        assert same(pair.p.cache, [3, 4], pair.d.cache, [1, 2])
    proxy.faults.corrupt_at = None
    proxy.reset()
    key = make_key(99)
    pair.p.open(key, 1)
    pair.p.publish(key, 0, [7])
    pair.d.load(key, proxy.endpoint, (5,))
    pair.d.events.expect(wire.Loaded, key)
    assert same(pair.p.cache, [7], pair.d.cache, [5])
    proxy.close()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lane_that_is_lost_does_not_lose_its_blocks(make_pair: MakePair, number: int) -> None:
    pair = make_pair(
        transports=["zmq"],
        lanes=3,
        blocks=BLOCKS,
        row_bytes=ROW_BYTES,
        piece_bytes=BLOCK_BYTES,
        capacity=1 << 24,
    )
    proxy = Proxy(pair.endpoint)
    pair.p.open(KEY, len(THEIRS))
    pair.d.load(KEY, proxy.endpoint, OURS)
    pair.p.until(lambda: any(len(s.sender._addresses) == 3 for s in pair.p.end._sessions.values()))  # type: ignore[attr-defined]
    proxy.faults.cut_after, proxy.faults.cut_only = 3 * BLOCK_BYTES, number
    pair.p.publish(KEY, 0, THEIRS)
    assert pair.d.events.expect(wire.Loaded, KEY).retries == 1
    assert whole(pair) == set(range(20))
    pair.p.settle()
    proxy.close()


def test_a_wall_clock_that_jumps_is_nobodys_clock(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.d.until(lambda: same(pair.p.cache, [1], pair.d.cache, [1]))
    clock = time.time()
    for hours in (1, -1, 10_000):
        monkeypatch.setattr("time.time", lambda hours=hours: clock + hours * 3600)
        pair.p.call(pair.p.end._tick)
        pair.d.call(pair.d.end._tick)
    pair.p.publish(KEY, 1, [2])
    assert pair.d.events.expect(wire.Loaded, KEY).wire_s < 60
    assert not pair.d.events.count(wire.Failed)


def test_alive_keeps_the_lease_of_a_load_that_waits(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.consumer.ALIVE_S", 0.0)
    pair = make_pair(lease_s=0.6)
    pair.p.open(KEY, 2)
    pair.d.load(KEY, pair.endpoint, (1, 2))
    opened = time.monotonic()
    pair.d.until(lambda: time.monotonic() - opened > 1.2)
    assert not pair.p.events.count(wire.Closed)
    pair.p.publish(KEY, 0, [1, 2])
    pair.d.events.expect(wire.Loaded, KEY)


def test_the_lease_of_a_load_that_will_come_is_kept(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It expired while a decode worker had no room for the prompt yet."""
    monkeypatch.setattr("kvtransfer.consumer.ALIVE_S", 0.0)
    pair = make_pair(lease_s=0.6)
    pair.d.call(lambda: pair.d.end.hold(wire.Hold(KEY, (pair.endpoint,))))
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1, 2])
    opened = time.monotonic()
    pair.d.until(lambda: time.monotonic() - opened > 1.2)
    assert not pair.p.events.count(wire.Closed)
    assert pair.d.call(pair.d.end.stats) == wire.Stats(loads=1)
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.d.events.expect(wire.Loaded, KEY)
    pair.d.call(lambda: pair.d.end.hold(wire.Hold(KEY, ())))
    pair.d.settle()


def test_a_lease_that_is_held_no_longer_expires(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.consumer.ALIVE_S", 0.0)
    pair = make_pair(lease_s=0.4)
    for endpoints in ((pair.endpoint,), ()):
        pair.d.call(lambda named=endpoints: pair.d.end.hold(wire.Hold(KEY, named)))  # type: ignore[misc]
    pair.p.open(KEY, 1)
    assert pair.p.events.expect(wire.Closed, KEY).reason == "expired"


@pytest.mark.parametrize("reason", ["expired", "cancelled"])
def test_who_comes_after_a_lease_has_ended_is_told_so_at_once(make_pair: MakePair, reason: str) -> None:
    """It was taken for one that came early, and waited until its deadline."""
    pair = make_pair(lease_s=1000.0)
    pair.p.open(KEY, 1)
    pair.p.call(lambda: pair.p.end.end(KEY, reason))
    pair.d.load(KEY, pair.endpoint, (1,), deadline_s=500.0)
    assert pair.d.events.expect(wire.Failed, KEY).reason == reason
    pair.p.settle()


def test_a_lease_that_expires_tells_a_load_that_still_waits(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.consumer.ALIVE_S", 1000.0)
    pair = make_pair(lease_s=0.5)
    pair.d.load(make_key(2), pair.endpoint, (5,), deadline_s=0.1)  # uses up the first sign of life
    pair.d.events.expect(wire.Failed, make_key(2))
    pair.p.open(KEY, 2)
    pair.d.load(KEY, pair.endpoint, (1, 2))
    assert pair.p.events.expect(wire.Closed, KEY).reason == "expired"
    assert pair.d.events.expect(wire.Failed, KEY).reason == "expired"
    pair.p.settle()


def test_two_loads_of_one_producer_fail_alone(pair: Pair) -> None:
    """One is refused for its fingerprint, the other one on the same connection is not."""
    pair.p.open(KEY, 1, fingerprint="other")
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, pair.endpoint, (1,))
    works(pair, pair.endpoint)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "fingerprint"
    assert not contents(pair.d.cache)[:, 1].any()


def test_a_restarted_producer_is_another_epoch(make_pair: MakePair) -> None:
    """Its tickets from before are refused, and no load of the old life gets bytes of the new one."""
    first = make_pair(transports=["zmq"])
    first.p.open(KEY, 2)
    first.p.publish(KEY, 0, [1])
    first.d.load(KEY, first.endpoint, (1, 2))
    first.d.until(lambda: same(first.p.cache, [1], first.d.cache, [1]))
    first.p.stop()
    first.p.end.close()
    first.p.context.destroy(linger=0)
    second = make_pair(transports=["zmq"], bind=first.endpoint, epoch=EPOCH + 1)
    second.p.cache.tensors = make_cache(fill=True, seed=2).tensors
    second.p.open(KEY, 2)
    second.p.publish(KEY, 0, [1, 2])
    assert first.d.events.expect(wire.Failed, KEY).reason in ("stale_epoch", "disconnected")
    assert not contents(first.d.cache)[:, 2].any()
    first.p.end.close = lambda: None  # type: ignore[method-assign]
