"""Frames that no honest end sends: neither end writes a wrong byte or stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import zmq

from kvtransfer import wire
from tests.kvtransfer.ends import DEADLINE_S, EPOCH, ConsumerEnd, Pair, contents, make_cache, make_key, same

KEY = make_key()
OURS = (3, 4, 5)
"""Cache blocks of the load under attack."""
GARBAGE = [
    [b""],
    [b"\xff" * 50],
    [b"\x81\xa1t\xa3blk"],
    [os.urandom(1000)],
    [wire.encode(wire.Done(KEY))],
    [wire.encode(wire.Subscribe(KEY, EPOCH, "x", 0))],
    [wire.encode(wire.Stat())],
    [msgspec.msgpack.encode({"t": "blk", "key": {"id": b"", "attempt": 1}, "first": 0, "count": 2**64 - 1})],
    [b"\x91" * 10_000],
    [b""] * 100,
]


class RawProducer:
    """A socket that says what it is told to, where a producer should be."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._peer = b""

    def expect(self, kind: type[wire.Data]) -> wire.Data:
        while True:
            self._peer, frame = self._socket.recv_multipart()
            if isinstance(message := wire.decode_data(frame), kind):
                return message

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._peer, *frames])

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def raw() -> Iterator[RawProducer]:
    raw = RawProducer()
    yield raw
    raw.close()


@pytest.fixture
def d() -> Iterator[ConsumerEnd]:
    d = ConsumerEnd()
    yield d
    assert d.call(d.end.stats) == wire.Stats()
    d.close()


def manifest(d: ConsumerEnd, key: wire.Key = KEY, **changes: Any) -> bytes:
    honest = wire.Manifest(key, EPOCH, 12, b"chain", "fp", d.cache.block_bytes)
    return wire.encode(msgspec.structs.replace(honest, **changes))


def blocks(first: int, count: int, key: wire.Key = KEY) -> bytes:
    return wire.encode(wire.Blocks(key, first, count))


def start(d: ConsumerEnd, raw: RawProducer, key: wire.Key = KEY) -> None:
    d.load(key, raw.endpoint, OURS)
    raw.expect(wire.Subscribe)


def test_garbage_does_not_disturb_a_load(d: ConsumerEnd, raw: RawProducer) -> None:
    start(d, raw)
    source = make_cache(fill=True)
    raw.say(manifest(d))
    for frames in GARBAGE:
        raw.say(*frames)
    raw.say(blocks(0, 3), source.gather([1, 2, 3]).numpy().tobytes())
    d.events.expect(wire.Loaded, KEY)
    assert same(source, [1, 2, 3], d.cache, list(OURS))


@pytest.mark.parametrize(
    ("first", "count", "payloads"),
    [
        (0, 3, []),
        (0, 1, [b"x" * 512, b"x" * 512]),
        (0, 1, [b"x" * 511]),
        (0, 1, [b"x" * 1024]),
        (0, 3, [b""]),
        (0, 4, [b"x" * 2048]),
        (1, 1, [b"x" * 512]),
        (-1, 2, [b"x" * 1024]),
        (0, 0, [b""]),
        (0, -1, [b""]),
        (0, 2**62, [b"x" * 512]),
        (2**63 - 1, 2**63 - 1, [b"x"]),
    ],
)
def test_blocks_that_do_not_fit_end_the_load_and_write_nothing(
    d: ConsumerEnd, raw: RawProducer, first: int, count: int, payloads: list[bytes]
) -> None:
    before = contents(d.cache)
    start(d, raw)
    raw.say(manifest(d), b"a manifest has no payload")
    raw.say(blocks(first, count), *payloads)
    assert d.events.expect(wire.Failed, KEY).reason in ("malformed", "out_of_range", "wrong_length")
    assert torch.equal(contents(d.cache), before)


def test_blocks_before_a_manifest_are_refused(d: ConsumerEnd, raw: RawProducer) -> None:
    start(d, raw)
    raw.say(blocks(0, 1), bytes(512))
    assert d.events.expect(wire.Failed, KEY).reason == "out_of_range"


def test_blocks_sent_twice_are_refused(d: ConsumerEnd, raw: RawProducer) -> None:
    start(d, raw)
    raw.say(manifest(d))
    raw.say(blocks(0, 2), bytes(1024))
    raw.say(blocks(1, 2), b"x" * 1024)
    assert d.events.expect(wire.Failed, KEY).reason == "out_of_range"
    assert not contents(d.cache).any()


def test_blocks_of_a_load_that_failed_are_not_written(d: ConsumerEnd, raw: RawProducer) -> None:
    start(d, raw)
    raw.say(manifest(d, chain=b"other"))
    raw.say(manifest(d))
    raw.say(blocks(0, 3), b"x" * 1536)
    raw.expect(wire.Drop)
    _next_load_is_served(d, raw)
    assert d.events.expect(wire.Failed, KEY).reason == "prompt_mismatch"
    assert not contents(d.cache)[:, list(OURS)].any()


def test_another_producer_cannot_write_a_load(d: ConsumerEnd, raw: RawProducer) -> None:
    other, its_key = RawProducer(), make_key(2)
    try:
        start(d, raw)
        d.load(its_key, other.endpoint, (7,), tokens=4)
        other.expect(wire.Subscribe)
        other.say(manifest(d))
        other.say(blocks(0, 3), b"x" * 1536)
        other.say(wire.encode(wire.Refused(KEY, "forged")))
        other.say(manifest(d, its_key, tokens=4))
        other.say(blocks(0, 1, its_key), b"y" * 512)
        d.events.expect(wire.Loaded, its_key)
        assert not contents(d.cache)[:, list(OURS)].any()
        d.unload(KEY)
        assert d.events.expect(wire.Failed, KEY).reason == "cancelled"
    finally:
        other.close()


def test_an_oversized_payload_costs_the_connection_not_the_consumer(d: ConsumerEnd, raw: RawProducer) -> None:
    start(d, raw)
    raw.say(manifest(d))
    raw.say(blocks(0, 3), bytes(wire.MAX_PAYLOAD + 1))
    assert d.events.expect(wire.Failed, KEY).reason == "disconnected"
    assert not contents(d.cache).any()


def test_a_producer_killed_amid_a_transfer_fails_the_load(d: ConsumerEnd) -> None:
    source = subprocess.Popen(
        [sys.executable, "-c", HALF_A_PRODUCER, str(d.cache.block_bytes)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert source.stdout is not None
        d.load(KEY, source.stdout.readline().strip(), OURS)
        d.until(lambda: bool(contents(d.cache)[:, OURS[0]].any()))
        source.send_signal(signal.SIGKILL)
        assert d.events.expect(wire.Failed, KEY).reason == "disconnected"
        assert not contents(d.cache)[:, OURS[1:]].any()
    finally:
        source.kill()
        source.communicate()


HALF_A_PRODUCER = f"""
import sys, zmq
from kvtransfer import wire
socket = zmq.Context().socket(zmq.ROUTER)
print("tcp://127.0.0.1:%d" % socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
size = int(sys.argv[1])
peer, frame = socket.recv_multipart()
key = wire.decode_data(frame).key
socket.send_multipart([peer, wire.encode(wire.Manifest(key, {EPOCH}, 12, b"chain", "fp", size))])
socket.send_multipart([peer, wire.encode(wire.Blocks(key, 0, 1)), b"x" * size])
while True:
    socket.recv_multipart()
"""


class RawConsumer:
    """A socket that says what it is told to, where a consumer should be."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        self._socket.connect(endpoint)

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def hear(self) -> wire.Data:
        return wire.decode_data(self._socket.recv_multipart()[0])

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def stranger(pair: Pair) -> Iterator[RawConsumer]:
    stranger = RawConsumer(pair.endpoint)
    yield stranger
    stranger.close()


def _transfer_works(pair: Pair, key: wire.Key) -> None:
    pair.p.open(key, 1)
    pair.p.publish(key, 0, [6])
    pair.d.load(key, pair.endpoint, (6,))
    pair.d.events.expect(wire.Loaded, key)
    assert same(pair.p.cache, [6], pair.d.cache, [6])


def test_garbage_does_not_stop_a_producer(pair: Pair, stranger: RawConsumer) -> None:
    for frames in GARBAGE:
        stranger.say(*frames)
    stranger.say(manifest(pair.d), blocks(0, 1))
    stranger.say(wire.encode(wire.Alive(tuple(make_key(n) for n in range(1000)))))
    stranger.say(wire.encode(wire.Subscribe(make_key(5), EPOCH + 1, "x", 0)))
    answer = stranger.hear()
    assert isinstance(answer, wire.Refused)
    assert answer.reason == "stale_epoch"
    _transfer_works(pair, make_key(7))


def test_a_strangers_end_does_not_end_anothers_lease(pair: Pair, stranger: RawConsumer) -> None:
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    stranger.say(wire.encode(wire.Done(KEY)), wire.encode(wire.Drop(KEY)))
    stranger.say(wire.encode(wire.Subscribe(make_key(5), EPOCH + 1, "x", 0)))
    stranger.hear()
    pair.p.publish(KEY, 1, [2])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [1, 2], pair.d.cache, [1, 2])


@pytest.mark.parametrize("have", [-(2**63), -1, 2**63 - 1])
def test_a_subscription_with_an_impossible_offset_is_harmless(
    pair: Pair, stranger: RawConsumer, have: int
) -> None:
    pair.p.open(KEY, 1, subscribers=2)
    pair.p.publish(KEY, 0, [1])
    stranger.say(wire.encode(wire.Subscribe(KEY, EPOCH, "x", have)))
    assert isinstance(stranger.hear(), wire.Manifest)
    _transfer_works(pair, make_key(7))


def test_early_subscriptions_are_bounded_and_do_not_shut_out_an_open_lease(
    pair: Pair, stranger: RawConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.producer.MAX_EARLY", 3)
    for n in range(100, 104):
        stranger.say(wire.encode(wire.Subscribe(make_key(n), EPOCH, "x", 0)))
    answer = stranger.hear()
    assert answer == wire.Refused(make_key(103), "overloaded")
    assert len(pair.p.end.table.early) == 3
    _transfer_works(pair, make_key(7))


def test_an_oversized_message_costs_the_stranger_its_connection(pair: Pair, stranger: RawConsumer) -> None:
    stranger.say(bytes(wire.MAX_MESSAGE + 1))
    _transfer_works(pair, make_key(7))


def _next_load_is_served(d: ConsumerEnd, raw: RawProducer) -> None:
    key = make_key(50)
    d.load(key, raw.endpoint, (8,), tokens=4)
    raw.expect(wire.Subscribe)
    raw.say(manifest(d, key, tokens=4))
    raw.say(blocks(0, 1, key), b"z" * 512)
    d.events.expect(wire.Loaded, key)
