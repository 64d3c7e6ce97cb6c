"""One failure costs one load: what comes after it works, and nobody can make an end hold without bound."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from braid.keys import make_keys
from kvtransfer import wire
from kvtransfer.arena import open_arena
from kvtransfer.codec import CODECS
from kvtransfer.consumer import EARLY_BYTES
from kvtransfer.producer import WINDOW_BYTES
from kvtransfer.sockets import new_context
from kvtransfer.transport import Parcel
from tests.kvtransfer.ends import (
    BLOCK_BYTES,
    DEADLINE_S,
    EPOCH,
    ROW_BYTES,
    Blocks,
    ConsumerEnd,
    Pair,
    ProducerEnd,
    make_cache,
    make_key,
    same,
)
from tests.kvtransfer.proxy import Proxy
from tests.kvtransfer.raw import ONE_LANE, RawConsumer, RawProducer

MakePair = Callable[..., Pair]
KEY = make_key()


def once(function: Callable[..., Any], error: Exception, at: int) -> Callable[..., Any]:
    """The function, whose call number ``at`` fails."""
    calls = 0

    def called(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return function(*args)

    return called


def loads(pair: Pair, number: int) -> wire.Event:
    """How one more load ends, with nothing left of it."""
    key = make_key(number)
    pair.p.open(key, 2)
    pair.p.publish(key, 0, [3, 4])
    pair.d.load(key, pair.endpoint, (1, 2))
    pair.d.until(lambda: any(getattr(event, "key", None) == key for event in pair.d.events.seen))
    pair.p.call(lambda: pair.p.end.end(key, "over"))
    (event,) = (event for event in pair.d.events.seen if getattr(event, "key", None) == key)
    return event


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_the_load_after_one_that_found_no_descriptor_works(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """The pair was connected, began no session any more, and every load failed while there were some."""
    monkeypatch.setattr("kvtransfer.consumer.CONNECT_S", 0.3)
    pair = make_pair(transports=[transport], lanes=2)
    if transport == "shm":
        full = once(open_arena, OSError(errno.EMFILE, "full"), 1)
        monkeypatch.setattr("kvtransfer.transport.shm.open_arena", full)
    else:
        monkeypatch.setattr(pair.d.end, "_open", once(pair.d.end._open, zmq.ZMQError(errno.EMFILE), 2))
    first, second = loads(pair, 1), loads(pair, 2)
    assert isinstance(first, wire.Failed)
    assert isinstance(second, wire.Loaded)
    assert second.transport == transport
    assert same(pair.p.cache, [3, 4], pair.d.cache, [1, 2])


def test_a_load_whose_connection_cannot_be_opened_ends_at_once(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for its deadline."""
    pair = make_pair(transports=["zmq"])
    monkeypatch.setattr(pair.d.end, "_open", once(pair.d.end._open, zmq.ZMQError(errno.EMFILE), 1))
    started = time.monotonic()
    first, second = loads(pair, 1), loads(pair, 2)
    assert time.monotonic() - started < DEADLINE_S / 2
    assert isinstance(first, wire.Failed)
    assert first.reason == "unreachable"
    assert isinstance(second, wire.Loaded)


def test_a_connection_without_its_monitor_is_closed(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(transports=["zmq"])
    opened: list[Any] = []

    def broken(endpoint: str) -> Any:
        socket = open_socket(endpoint)
        if not opened:
            monkeypatch.setattr(socket, "get_monitor_socket", once(print, zmq.ZMQError(errno.EMFILE), 1))
        opened.append(socket)
        return socket

    open_socket = pair.d.end._open
    monkeypatch.setattr(pair.d.end, "_open", broken)
    first, second = loads(pair, 1), loads(pair, 2)
    assert isinstance(first, wire.Failed)
    assert isinstance(second, wire.Loaded)
    assert opened[0].closed


def test_a_connection_that_broke_and_cannot_be_opened_again_ends_its_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw, d = RawProducer(), ConsumerEnd(transports=["zmq"])
    try:
        d.load(KEY, raw.endpoint, (1,))
        raw.welcome("zmq", ONE_LANE)
        raw.expect(wire.Subscribe)
        monkeypatch.setattr(d.end, "_open", once(d.end._open, zmq.ZMQError(errno.EMFILE), 1))
        (peer,) = d.end._peers.values()
        d.call(lambda: setattr(peer, "lost", True))
        assert d.events.expect(wire.Failed, KEY).reason == "unreachable"
    finally:
        d.close()
        raw.close()


def test_a_prompt_whose_producer_cannot_be_reached_costs_no_other_its_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvtransfer.consumer.ALIVE_S", 0.0)
    raw, d = RawProducer(), ConsumerEnd(transports=["zmq"])
    there = d.end._open

    def open_some(endpoint: str) -> Any:
        if endpoint == raw.endpoint:
            return there(endpoint)
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(d.end, "_open", open_some)
    try:
        d.call(lambda: d.end.hold(wire.Hold(make_key(1), ("tcp://127.0.0.1:1",))))
        d.call(lambda: d.end.hold(wire.Hold(make_key(2), (raw.endpoint,))))
        raw.welcome("zmq", ONE_LANE)
        assert raw.expect(wire.Alive).keys == (make_key(2),)
        for number in (1, 2):
            d.call(lambda n=number: d.end.hold(wire.Hold(make_key(n), ())))  # type: ignore[misc]
    finally:
        d.close()
        raw.close()


def test_a_consumer_may_have_as_many_connections_as_the_library_allows() -> None:
    """ZMQ's own bound of 1,023 sockets is met at 341 producers."""
    context = new_context()
    try:
        assert context.get(zmq.MAX_SOCKETS) == context.get(zmq.SOCKET_LIMIT) > 10_000
    finally:
        context.destroy(linger=0)


def test_a_payload_that_cannot_be_sent_leaves_no_half_message(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent next, to whomever, went to its consumer."""
    pair = make_pair(transports=["zmq"])
    raw = RawConsumer(pair.endpoint)
    other = RawConsumer(pair.endpoint)
    try:
        pair.p.open(KEY, 1)
        pair.p.publish(KEY, 0, [1])
        monkeypatch.setattr(Parcel, "wrap", once(Parcel.wrap, zmq.ZMQError(errno.EMFILE), 1))
        raw.subscribe(KEY, 1, 1)
        raw.expect(wire.Manifest)
        other.greet(2)
        other.expect(wire.Welcome)
        assert raw.hears_nothing(0.2)
        pair.p.call(lambda: pair.p.end.end(KEY, "over"))
    finally:
        raw.close()
        other.close()


def test_keys_that_can_no_longer_be_read_end_a_load_at_once(make_pair: MakePair, tmp_path: Path) -> None:
    """It waited for its deadline, and so did loads from other producers for signs of life."""
    make_keys(tmp_path / "keys")
    pair = make_pair(transports=["zmq"], keys_dir=tmp_path / "keys")
    shutil.rmtree(tmp_path / "keys")
    pair.d.load(KEY, pair.endpoint, (1,), deadline_s=500.0)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "unreachable"


def test_a_lane_whose_keys_cannot_be_read_is_done_without(
    make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path / "keys")
    pair = make_pair(transports=["zmq"], lanes=3, keys_dir=tmp_path / "keys")
    opened = pair.d.end._open
    left = iter([opened, opened])

    def open_two(endpoint: str) -> Any:
        if (how := next(left, None)) is None:
            raise ValueError("keys can't be read")
        return how(endpoint)

    monkeypatch.setattr(pair.d.end, "_open", open_two)
    pair.d.load(KEY, pair.endpoint, (1,), deadline_s=500.0)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "no_transport"
    pair.d.until(lambda: not pair.d.end._peers)


def test_any_number_of_messages_waits_for_a_connection(pair: Pair) -> None:
    """Of more than 1,000 at once some were thrown away, and their loads waited for their deadlines."""
    pair.d.load(KEY, pair.endpoint, (1,))
    limits = pair.d.call(lambda: [p.socket.getsockopt(zmq.SNDHWM) for p in pair.d.end._peers.values()])
    assert limits == [0]
    pair.d.unload(KEY)
    pair.d.events.expect(wire.Failed, KEY)


def test_a_producer_that_begins_no_session_is_tried_anew_with_each_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvtransfer.consumer.CONNECT_S", 0.2)
    raw, d = RawProducer(), ConsumerEnd(transports=["zmq"])
    try:
        for number in (1, 2):
            d.load(make_key(number), raw.endpoint, (1,))
            raw.expect(wire.Hello)
            assert d.events.expect(wire.Failed, make_key(number)).reason == "unreachable"
            d.until(lambda: not d.end._peers)
        d.load(KEY, raw.endpoint, (1,))
        raw.welcome("zmq", ONE_LANE)
        raw.expect(wire.Subscribe)
        d.unload(KEY)
    finally:
        d.close()
        raw.close()


def test_each_connection_of_a_load_may_break_as_often_as_one_may() -> None:
    """A blip of the network that four ranks have in common is one."""
    ranks = [ProducerEnd(transports=["zmq"], cache=make_cache(fill=True, heads=4)) for _ in range(4)]
    proxies = [Proxy(p.end.endpoint) for p in ranks]
    d = ConsumerEnd(transports=["zmq"], cache=make_cache(fill=False, heads=4))
    try:
        for p in ranks:
            p.open(KEY, 4)
            p.publish(KEY, 0, [1, 2])
        sources = tuple(wire.Source(proxy.endpoint, EPOCH, n, n + 1, n) for n, proxy in enumerate(proxies))
        d.load(KEY, "", (1, 2, 3, 4), sources=sources)
        d.until(lambda: d.end._loads[KEY].nbytes == 4 * 2 * 2 * ROW_BYTES)
        for proxy in proxies:
            proxy.reset()
        d.until(lambda: all(part.retries == 1 and part.sub for part in d.end._loads[KEY].parts))
        for p in ranks:
            p.publish(KEY, 2, [3, 4])
        assert d.events.expect(wire.Loaded, KEY).retries == 1
        for p in ranks:
            p.settle()
    finally:
        d.close()
        for proxy in proxies:
            proxy.close()
        for p in ranks:
            p.close()


@pytest.mark.parametrize("large", [False, True])
def test_blocks_without_a_manifest_are_not_kept_without_bound(
    monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr("kvtransfer.consumer.EARLY_BYTES", 3 * BLOCK_BYTES)
    raw, d = RawProducer(), ConsumerEnd(transports=["zmq"])
    try:
        d.load(KEY, raw.endpoint, (1, 2, 3, 4))
        raw.welcome()
        sub = raw.expect(wire.Subscribe).sub
        for _ in range(1 if large else 5):
            payload = bytes(4 * BLOCK_BYTES if large else 8)
            raw.say(wire.Blocks(sub, 0, 0, 1, BLOCK_BYTES), payload)
        assert d.events.expect(wire.Failed, KEY).reason == "no_manifest"
        assert not d.call(lambda: d.end._parts)
    finally:
        d.close()
        raw.close()


def test_connections_over_those_agreed_carry_nothing(make_pair: MakePair) -> None:
    pair = make_pair(transports=["zmq"])
    stranger = RawConsumer(pair.endpoint)
    try:
        stranger.say(*(wire.Lane(stranger.id, 1) for _ in range(100)))
        pair.p.open(KEY, 1)
        stranger.subscribe(KEY, 1, 1)
        stranger.expect(wire.Manifest)
        (session,) = pair.p.call(lambda: list(pair.p.end._sessions.values()))
        assert len(session.sender._addresses) == 1  # type: ignore[attr-defined]
    finally:
        stranger.close()


class NoRoom(Blocks):
    """A cache whose device has no memory left."""

    def scatter(self, *args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    def prepare(self, *args: Any) -> None:
        return None


def test_a_copy_into_the_cache_that_raises_ends_the_load_at_once(make_pair: MakePair) -> None:
    """It waited for its deadline, and the lease with it."""
    pair = make_pair()
    d = pair.consumer(through=lambda cache: NoRoom(cache.tensors))
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1, 2])
    d.load(KEY, pair.endpoint, (1, 2), deadline_s=60.0)
    assert d.events.expect(wire.Failed, KEY).reason == "copy_failed"
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


def test_rows_that_a_manifests_codec_can_not_have_made_are_refused() -> None:
    raw = RawProducer()
    d = ConsumerEnd(cache=make_cache(fill=False, row_bytes=64), codecs=CODECS, transports=["zmq"])
    try:
        d.load(KEY, raw.endpoint, (3, 4), deadline_s=60.0)
        raw.welcome()
        sub = raw.expect(wire.Subscribe).sub
        raw.say(wire.Manifest(sub, EPOCH, 8, b"chain", "fp", (wire.Shape(2, 2, 66),), "int8"))
        assert d.events.expect(wire.Failed, KEY).reason == "layout"
    finally:
        d.close()
        raw.close()


def test_who_came_before_a_lease_that_is_refused_is_told(make_pair: MakePair) -> None:
    pair = make_pair(capacity=4096)
    pair.d.load(KEY, pair.endpoint, tuple(range(1, 11)), deadline_s=60.0)
    pair.p.until(lambda: KEY in pair.p.end.table.early)
    pair.p.open(KEY, 10)
    assert "over the staging bound" in pair.p.events.expect(wire.Closed, KEY).reason
    assert pair.d.events.expect(wire.Failed, KEY).reason == "refused"
    late = pair.consumer()
    late.load(KEY, pair.endpoint, (1,), deadline_s=60.0)
    assert late.events.expect(wire.Failed, KEY).reason == "refused"
    pair.p.settle()


def test_an_endpoint_that_is_none_fails_every_load_at_once() -> None:
    """The second found a connection that had never been begun, and waited for it."""
    d = ConsumerEnd()
    try:
        for number in (1, 2):
            d.load(make_key(number), "tcp://nowhere", (1,), deadline_s=60.0)
            assert d.events.of(wire.Failed, make_key(number))[0].reason == "unreachable"
        assert not d.call(lambda: d.end._peers)
    finally:
        d.close()


class Open:
    """A copy that ends when the test says so."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def wait(self) -> None:
        assert self.gate.wait(DEADLINE_S)


def test_blocks_that_overtake_others_end_the_lease(make_pair: MakePair) -> None:
    """Some were copied by a device and those after them were not: what came first had a gap before it."""
    pair, fence = make_pair(), Open()

    def fill(block: int, fence: Open | None) -> Callable[..., Any]:
        def copy(run: range, out: Any) -> Any:
            pair.p.cache.gather(0, [block], out)
            return fence

        return copy

    pair.p.open(KEY, 2)
    pair.d.load(KEY, pair.endpoint, (1, 2), deadline_s=60.0)
    assert pair.p.end.stage(KEY, 0, 0, 1, fill(1, fence))
    assert pair.p.end.stage(KEY, 0, 1, 1, fill(2, None))
    assert pair.p.events.expect(wire.Closed, KEY).reason == "copy_failed"
    assert pair.d.events.expect(wire.Failed, KEY).reason == "copy_failed"
    fence.gate.set()
    pair.p.settle()


def test_as_much_as_may_be_on_its_way_may_come_before_its_manifest() -> None:
    assert EARLY_BYTES >= WINDOW_BYTES - 1 + wire.MAX_PAYLOAD
