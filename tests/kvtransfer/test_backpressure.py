"""A consumer that does not keep up holds up nobody and nothing but its own blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvtransfer import wire
from tests.kvtransfer.ends import BLOCK_BYTES, Pair, make_key, same
from tests.kvtransfer.raw import RawConsumer

KEY, OTHER = make_key(), make_key(2)
THEIRS = list(range(12))
WINDOW = 4


@pytest.fixture
def pair(make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Four blocks fit the window, each is a parcel; an honest consumer acknowledges every block."""
    monkeypatch.setattr("kvtransfer.producer.WINDOW_BYTES", WINDOW * BLOCK_BYTES)
    monkeypatch.setattr("kvtransfer.consumer.ACK_BYTES", 1)
    return make_pair(piece_bytes=BLOCK_BYTES)


@pytest.fixture(params=["shm", "zmq"])
def idler(pair: Pair, request: pytest.FixtureRequest) -> Iterator[RawConsumer]:
    """It has subscribed a prompt of twelve blocks, all of them published, and acknowledges nothing."""
    idler = RawConsumer(pair.endpoint, offers=(request.param,))
    pair.p.open(KEY, 12, subscribers=2)
    pair.p.publish(KEY, 0, THEIRS)
    idler.subscribe(KEY, 1, 12)
    idler.expect(wire.Manifest)
    assert [idler.expect(wire.Blocks).first for _ in range(WINDOW)] == list(range(WINDOW))
    yield idler
    idler.close()


def test_at_most_a_window_is_on_its_way_to_a_consumer(pair: Pair, idler: RawConsumer) -> None:
    assert idler.hears_nothing(0.1)
    idler.say(wire.Ack(1, BLOCK_BYTES))
    assert idler.expect(wire.Blocks).first == WINDOW
    assert idler.hears_nothing(0.1)
    idler.say(wire.Ack(1, 100 * BLOCK_BYTES))
    assert [idler.expect(wire.Blocks).first for _ in range(WINDOW)] == list(range(WINDOW + 1, 2 * WINDOW + 1))
    assert idler.hears_nothing(0.1), "more was acknowledged than was sent, and it is not credit"


def test_only_the_sessions_own_acknowledgements_count(pair: Pair, idler: RawConsumer) -> None:
    idler.say(wire.Ack(2, 100 * BLOCK_BYTES), wire.Ack(0, 100 * BLOCK_BYTES), wire.Ack(1, -(2**62)))
    assert idler.hears_nothing(0.1)


def test_others_go_on(pair: Pair, idler: RawConsumer) -> None:
    ours = tuple(range(1, 12))
    for key, theirs in ((KEY, THEIRS[:11]), (OTHER, THEIRS[1:])):
        if key is OTHER:
            pair.p.open(OTHER, 11)
            pair.p.publish(OTHER, 0, theirs)
        pair.d.load(key, pair.endpoint, ours, tokens=48 if key is KEY else 44)
        pair.d.events.expect(wire.Loaded, key)
        assert same(pair.p.cache, theirs, pair.d.cache, ours)
    assert idler.hears_nothing(0.05)


def test_after_a_refusal_nothing_of_the_lease_is_sent(pair: Pair, idler: RawConsumer) -> None:
    """What waited for the window lies in memory that may have another owner by then."""
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    assert idler.expect(wire.Refused) == wire.Refused(1, "cancelled")
    idler.say(wire.Ack(1, WINDOW * BLOCK_BYTES))
    assert idler.hears_nothing(0.1)


def test_a_dropped_subscription_makes_way_for_the_next(pair: Pair, idler: RawConsumer) -> None:
    idler.say(wire.Drop(KEY, 1))
    idler.subscribe(KEY, 2, 2)
    idler.expect(wire.Manifest)
    idler.say(wire.Ack(1, WINDOW * BLOCK_BYTES))
    assert [idler.expect(wire.Blocks).sub for _ in range(2)] == [2, 2]
    assert idler.hears_nothing(0.05)
