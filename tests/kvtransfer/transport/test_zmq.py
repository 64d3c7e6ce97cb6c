"""Payloads over ZMQ itself, on one connection or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from kvtransfer import wire
from kvtransfer.transport.zmq import Terms, ZmqSender
from tests.kvtransfer.ends import BLOCK_BYTES, EPOCH, ConsumerEnd, Pair, contents, make_key, same
from tests.kvtransfer.raw import SHAPES, RawConsumer, RawProducer
from tests.kvtransfer.transport.contract import InOneProcess, InTwoProcesses

KEY = make_key()


class TestOneLane(InOneProcess):
    names = ("zmq",)


class TestLanes(InOneProcess):
    names = ("zmq",)
    lanes = 3


class TestInTwoProcesses(InTwoProcesses):
    names = ("zmq",)


@pytest.fixture
def raw() -> Iterator[RawProducer]:
    raw = RawProducer()
    yield raw
    raw.close()


@pytest.fixture
def d() -> Iterator[ConsumerEnd]:
    d = ConsumerEnd(transports=["zmq"], lanes=2)
    yield d
    d.close()


def test_parcels_go_to_the_lanes_in_turn(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(transports=["zmq"], lanes=3, piece_bytes=BLOCK_BYTES)
    pair.d.load(KEY, pair.endpoint, tuple(range(1, 7)))
    pair.p.open(KEY, 6)
    pair.p.until(lambda: _lanes(pair) == 3)
    pair.p.publish(KEY, 0, [1, 2, 3, 4, 5, 6])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, range(1, 7), pair.d.cache, range(1, 7))
    session = next(iter(pair.p.end._sessions.values()))
    assert isinstance(session.sender, ZmqSender)
    assert len(set(session.sender._addresses)) == 3


def test_a_producer_bounds_how_many_lanes_there_are(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(transports=["zmq"], lanes=100)
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.p.open(KEY, 1)
    pair.p.until(lambda: _lanes(pair) == 8)
    pair.p.publish(KEY, 0, [1])
    pair.d.events.expect(wire.Loaded, KEY)
    assert _lanes(pair) == 8


def test_lanes_may_overtake_one_another_and_the_manifest(d: ConsumerEnd, raw: RawProducer) -> None:
    d.load(KEY, raw.endpoint, (1, 2, 3))
    raw.welcome("zmq", msgspec.msgpack.encode(Terms(2)))
    control = raw.peer
    addresses = {control}
    sub = 0
    for _ in range(2):  # in either order
        message = raw.expect(wire.Lane | wire.Subscribe)  # type: ignore[arg-type]
        addresses.add(raw.peer)
        sub = sub or getattr(message, "sub", 0)
    (lane,) = addresses - {control}
    payload = torch.randint(1, 256, (3, SHAPES[0].block_bytes), dtype=torch.uint8)
    blocks = [wire.Blocks(sub, 0, n, 1, SHAPES[0].block_bytes) for n in range(3)]
    raw.peer = lane
    for number in (2, 1):
        raw.say(blocks[number], payload[number].numpy().tobytes())
    d.until(lambda: len(d.end._parts[sub].early) == 2)
    assert not contents(d.cache).any(), "nothing is written before the manifest is checked"
    raw.peer = control
    raw.say(wire.Manifest(sub, EPOCH, 12, b"chain", "fp", SHAPES))
    raw.say(blocks[0], payload[0].numpy().tobytes())
    assert d.events.expect(wire.Loaded, KEY).blocks == 3
    ours = d.cache.take([1, 2, 3]).transpose(0, 1).reshape(3, -1)
    assert torch.equal(ours, payload)


def test_a_lane_of_another_session_gets_nothing(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(transports=["zmq"])
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.p.open(KEY, 1)
    pair.p.events.expect(wire.Opened, KEY)
    pair.p.until(lambda: _lanes(pair) == 1)
    for consumer, session in ((pair.d.end._id, 99), (b"somebody else's!", 1)):
        pair.p.call(lambda c=consumer, s=session: pair.p.end._handle(b"lane", wire.Lane(c, s)))  # type: ignore[misc]
    assert _lanes(pair) == 1
    pair.p.publish(KEY, 0, [1])
    pair.d.events.expect(wire.Loaded, KEY)


def test_memory_that_another_lane_may_still_send_is_not_used_again(make_pair: Callable[..., Pair]) -> None:
    """The lease of a consumer that stood still ended with its first lost connection; what the others had
    queued was sent from memory that was another's."""
    pair = make_pair(transports=["zmq"], piece_bytes=BLOCK_BYTES)
    raw = RawConsumer(pair.endpoint, greet=False)
    lane = RawConsumer(pair.endpoint, greet=False)
    try:
        raw.offers = (("zmq", msgspec.msgpack.encode(Terms(2))),)
        raw.greet(1)
        raw.expect(wire.Welcome)
        lane.say(wire.Lane(raw.id, 1))
        pair.p.until(lambda: _lanes(pair) == 2)
        pair.p.open(KEY, 10)
        raw.subscribe(KEY, 1, 10, deadline_s=500.0)
        raw.expect(wire.Manifest)
        lane.close()
        staged = 0
        while pair.p.call(lambda: bool(pair.p.end._sessions)):  # until one is sent to the lane that is lost
            pair.p.publish(KEY, staged, [1])
            staged += 1
            time.sleep(0.05)
        pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
        time.sleep(1)
        assert pair.p.stats.staging_bytes > 0
        raw.close()
        pair.p.settle()
    finally:
        lane.close()
        raw.close()


def _lanes(pair: Pair) -> int:
    """Connections of the producer's one session."""
    senders = [s.sender for s in pair.p.end._sessions.values()]
    return sum(len(s._addresses) for s in senders if isinstance(s, ZmqSender))
