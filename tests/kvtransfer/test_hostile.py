"""Frames that no honest end sends: neither end writes a wrong byte, stops, or calls another's load off."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from braid.keys import SEALED_BYTES
from kvtransfer import wire
from kvtransfer.transport.zmq import Terms
from tests.kvtransfer.ends import (
    BLOCK_BYTES,
    EPOCH,
    HEADS,
    ConsumerEnd,
    Pair,
    contents,
    make_cache,
    make_key,
    same,
)
from tests.kvtransfer.raw import SHAPES, RawConsumer, RawProducer

Logged = Callable[[str], list[logging.LogRecord]]
KEY = make_key()
OURS = (3, 4, 5)
"""Cache blocks of the load under attack."""
GARBAGE = [
    [b""],
    [b"\xff" * 50],
    [b"\x81\xa1t\xa3blk"],
    [os.urandom(1000)],
    [wire.encode(wire.Done(KEY, 1))],
    [wire.encode(wire.Lane(b"", -1))],
    [wire.encode(wire.Stat())],
    [wire.encode(wire.Ack(1, -(2**63)))],
    [msgspec.msgpack.encode({"t": "blk", "sub": 2**64 - 1, "group": 0, "first": 0, "count": 2**64 - 1})],
    [b"\x91" * 10_000],
    [b""] * 100,
]


@pytest.fixture
def raw() -> Iterator[RawProducer]:
    raw = RawProducer()
    yield raw
    raw.close()


@pytest.fixture
def d() -> Iterator[ConsumerEnd]:
    d = ConsumerEnd()
    yield d
    d.call(d.end.check_integrity)
    assert d.call(d.end.stats) == wire.Stats()
    d.close()


def manifest(sub: int, **changes: Any) -> wire.Manifest:
    honest = wire.Manifest(sub, EPOCH, 12, b"chain", "fp", SHAPES)
    return msgspec.structs.replace(honest, **changes)


def blocks(sub: int, first: int, count: int, **changes: Any) -> wire.Blocks:
    honest = wire.Blocks(sub, 0, first, count, min(max(count, 0) * BLOCK_BYTES, 2**63 - 1))
    return msgspec.structs.replace(honest, **changes)


def start(d: ConsumerEnd, raw: RawProducer, key: wire.Key = KEY) -> int:
    """Begin a load of three blocks; returns its subscription."""
    d.load(key, raw.endpoint, OURS)
    raw.welcome()
    return raw.expect(wire.Subscribe).sub


def test_garbage_does_not_disturb_a_load(d: ConsumerEnd, raw: RawProducer, logged: Logged) -> None:
    sub = start(d, raw)
    source = make_cache(fill=True)
    raw.say(manifest(sub))
    for frames in GARBAGE:
        raw.say_raw(*frames)
    raw.say(blocks(sub, 0, 3), source.take([1, 2, 3]).numpy().tobytes())
    d.events.expect(wire.Loaded, KEY)
    assert same(source, [1, 2, 3], d.cache, OURS)
    assert len(logged("kv_malformed_message")) == len(GARBAGE)


@pytest.mark.parametrize(
    ("first", "count", "payloads"),
    [
        (0, 3, []),
        (0, 1, [bytes(BLOCK_BYTES)] * 2),
        (0, 1, [bytes(BLOCK_BYTES - 1)]),
        (0, 1, [bytes(BLOCK_BYTES * 2)]),
        (0, 3, [b""]),
        (0, 4, [bytes(BLOCK_BYTES * 4)]),
        (-1, 2, [bytes(BLOCK_BYTES * 2)]),
        (3, 1, [bytes(BLOCK_BYTES)]),
        (0, 0, [b""]),
        (0, -1, [b""]),
        (0, 2**62, [bytes(BLOCK_BYTES)]),
        (-(2**62), 2**63 - 1, [bytes(BLOCK_BYTES)]),
        (2**63 - 1, 2**63 - 1, [b"x"]),
    ],
)
def test_blocks_that_do_not_fit_end_the_load_and_write_nothing(
    d: ConsumerEnd, raw: RawProducer, first: int, count: int, payloads: list[bytes]
) -> None:
    before = contents(d.cache)
    sub = start(d, raw)
    raw.say(manifest(sub), b"a manifest has no payload")
    raw.say(blocks(sub, first, count), *(b"x" * len(payload) for payload in payloads))
    assert d.events.expect(wire.Failed, KEY).reason in ("out_of_range", "wrong_length")
    assert torch.equal(contents(d.cache), before)


@pytest.mark.parametrize(
    "changes", [{"nbytes": 1}, {"nbytes": -1}, {"nbytes": 2**64 - 1}, {"group": 1}, {"group": -1}]
)
def test_a_header_that_contradicts_its_payload_ends_the_load(
    d: ConsumerEnd, raw: RawProducer, changes: dict[str, int]
) -> None:
    sub = start(d, raw)
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 1, **changes), b"x" * BLOCK_BYTES)
    assert d.events.expect(wire.Failed, KEY).reason in ("out_of_range", "wrong_length")
    assert not contents(d.cache).any()


def test_corrupt_blocks_end_the_load_and_are_not_counted(
    d: ConsumerEnd, raw: RawProducer, logged: Logged
) -> None:
    sub = start(d, raw)
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 1, digest=12345), b"x" * BLOCK_BYTES)
    assert d.events.expect(wire.Failed, KEY).reason == "corrupt"
    assert not contents(d.cache).any()
    assert logged("kv_digest_mismatch")


def test_blocks_before_a_manifest_wait_for_it(d: ConsumerEnd, raw: RawProducer) -> None:
    """They may overtake it on another lane."""
    sub = start(d, raw)
    raw.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
    _pass_through(d, raw)
    assert not contents(d.cache)[:, list(OURS)].any()
    raw.say(manifest(sub))
    d.events.expect(wire.Loaded, KEY)
    assert contents(d.cache)[:, list(OURS)].all()


@pytest.mark.parametrize("changes", [{"chain": b"other"}, {"shapes": ()}, {"codec": "unknown"}, {"epoch": 8}])
def test_blocks_before_a_manifest_that_is_refused_are_not_written(
    d: ConsumerEnd, raw: RawProducer, changes: dict[str, object]
) -> None:
    sub = start(d, raw)
    raw.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
    raw.say(manifest(sub, **changes))
    d.events.expect(wire.Failed, KEY)
    assert not contents(d.cache).any()


@pytest.mark.parametrize("ends", ["unload", "refused manifest", "refused", "corrupt"])
def test_blocks_before_a_manifest_are_acknowledged_though_their_load_ends(
    d: ConsumerEnd, raw: RawProducer, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """They stayed in the producer's window for as long as the session, until nothing was sent in it."""
    monkeypatch.setattr("kvtransfer.consumer.ACK_BYTES", 4 * BLOCK_BYTES)
    sub = start(d, raw)
    raw.say(blocks(sub, 0, 1, digest=12345), b"x" * BLOCK_BYTES)
    raw.say(blocks(sub, 1, 2), b"x" * 2 * BLOCK_BYTES)
    _pass_through(d, raw)
    if ends == "unload":
        d.unload(KEY)
    else:
        answers: dict[str, wire.Data] = {"refused": wire.Refused(sub, "bad_blocks"), "corrupt": manifest(sub)}
        raw.say(answers.get(ends, manifest(sub, chain=b"other")))
    d.events.expect(wire.Failed, KEY)
    assert raw.expect(wire.Ack).nbytes == 4 * BLOCK_BYTES  # and one of what passed through


def test_more_blocks_than_wanted_before_the_manifest_end_the_load_once(
    d: ConsumerEnd, raw: RawProducer
) -> None:
    sub = start(d, raw)
    for _ in range(3):
        raw.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
    raw.say(manifest(sub))
    d.events.expect(wire.Loaded, KEY)
    _pass_through(d, raw)
    assert d.events.of(wire.Failed, KEY) == []


def test_blocks_sent_twice_are_refused(d: ConsumerEnd, raw: RawProducer) -> None:
    sub = start(d, raw)
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 2), bytes(2 * BLOCK_BYTES))
    raw.say(blocks(sub, 1, 2), b"x" * 2 * BLOCK_BYTES)
    assert d.events.expect(wire.Failed, KEY).reason == "out_of_range"
    assert not contents(d.cache).any()


def test_blocks_of_a_load_that_failed_are_not_written(d: ConsumerEnd, raw: RawProducer) -> None:
    sub = start(d, raw)
    raw.say(manifest(sub, chain=b"other"))
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
    assert raw.expect(wire.Drop) == wire.Drop(KEY, sub)
    _pass_through(d, raw)
    assert d.events.expect(wire.Failed, KEY).reason == "prompt_mismatch"
    assert not contents(d.cache)[:, list(OURS)].any()


def test_blocks_of_a_load_before_are_not_the_next_ones(d: ConsumerEnd, raw: RawProducer) -> None:
    old = start(d, raw)
    raw.say(manifest(old))
    d.unload(KEY)
    d.load(KEY, raw.endpoint, OURS)
    new = raw.expect(wire.Subscribe).sub
    raw.say(manifest(new))
    raw.say(blocks(old, 0, 3), b"o" * 3 * BLOCK_BYTES)
    raw.say(blocks(new, 0, 1), b"n" * BLOCK_BYTES)
    raw.say(blocks(new, 1, 2), b"n" * 2 * BLOCK_BYTES)
    d.events.expect(wire.Loaded, KEY)
    assert (contents(d.cache)[:, list(OURS)] == ord("n")).all()


def test_another_producer_cannot_write_or_end_a_load(d: ConsumerEnd, raw: RawProducer) -> None:
    other, its_key = RawProducer(), make_key(2)
    try:
        sub = start(d, raw)
        d.load(its_key, other.endpoint, (7,), tokens=4)
        other.welcome()
        its_sub = other.expect(wire.Subscribe).sub
        other.say(manifest(sub))
        other.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
        other.say(wire.Refused(sub, "forged"))
        other.say(manifest(its_sub, tokens=4))
        other.say(blocks(its_sub, 0, 1), b"y" * BLOCK_BYTES)
        d.events.expect(wire.Loaded, its_key)
        assert not contents(d.cache)[:, list(OURS)].any()
        d.unload(KEY)
        assert d.events.expect(wire.Failed, KEY).reason == "cancelled"
    finally:
        other.close()


def test_an_oversized_payload_costs_the_connection_not_the_consumer(d: ConsumerEnd, raw: RawProducer) -> None:
    sub = start(d, raw)
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 3), bytes(wire.MAX_PAYLOAD + SEALED_BYTES + 1))
    raw.welcome()  # the load is resumed
    sub = raw.expect(wire.Subscribe).sub
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
    assert d.events.expect(wire.Loaded, KEY).retries == 1


def test_a_welcome_that_was_not_asked_for_is_refused(d: ConsumerEnd, raw: RawProducer) -> None:
    """Another session, a transport that was not offered, terms that are none: none of them begins one."""
    d.load(KEY, raw.endpoint, OURS)
    hello = raw.expect(wire.Hello)
    raw.say(wire.Welcome(hello.session + 1, "zmq", b""))
    raw.say(wire.Welcome(hello.session, "carrier pigeon", b""))
    raw.say(wire.Welcome(raw.expect(wire.Hello).session, "shm", b"garbage"))
    again = raw.expect(wire.Hello)
    assert [name for name, _ in again.offers] == ["zmq"], "what did not work is not offered again"
    raw.say(wire.Welcome(again.session, "zmq", b"garbage"))
    assert raw.expect(wire.Hello).offers == ()
    raw.say(wire.Refused(0, "no_transport"))
    assert d.events.expect(wire.Failed, KEY).reason == "no_transport"


def test_a_producer_does_not_choose_how_many_connections_there_are(d: ConsumerEnd, raw: RawProducer) -> None:
    d.load(KEY, raw.endpoint, OURS)
    raw.welcome(data=msgspec.msgpack.encode(Terms(2**62)))
    sub = raw.expect(wire.Subscribe).sub
    raw.say(manifest(sub))
    raw.say(blocks(sub, 0, 3), b"x" * 3 * BLOCK_BYTES)
    d.events.expect(wire.Loaded, KEY)


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


def test_garbage_does_not_stop_a_producer(pair: Pair, stranger: RawConsumer, logged: Logged) -> None:
    for frames in GARBAGE:
        stranger.say_raw(*frames)
    stranger.say(manifest(1), blocks(1, 0, 1), wire.Welcome(1, "zmq", b""), wire.Refused(0, "no_session"))
    stranger.say(wire.Alive(tuple(make_key(n) for n in range(1000))))
    stranger.subscribe(make_key(5), 1, 1, epoch=EPOCH + 1)
    assert stranger.expect(wire.Refused) == wire.Refused(1, "stale_epoch")
    _transfer_works(pair, make_key(7))
    assert len(logged("kv_malformed_message")) >= len(GARBAGE) - 3
    assert len(logged("kv_unexpected_message")) == 4


def test_a_stale_epoch_is_a_security_event(pair: Pair, logged: Logged) -> None:
    pair.d.load(KEY, pair.endpoint, (1,), epoch=EPOCH - 1)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "stale_epoch"
    (record,) = logged("kv_stale_epoch")
    assert record.__dict__["security"]


def test_handles_that_are_forged_or_unknown_are_security_events(
    pair: Pair, stranger: RawConsumer, logged: Logged
) -> None:
    stranger.subscribe(make_key(9), 1, 1)
    pair.p.until(lambda: make_key(9) in pair.p.end.table.early)
    pair.p.end.table.lease_s = 0.0
    assert stranger.expect(wire.Refused) == wire.Refused(1, "unknown_ticket")
    pair.p.end.table.lease_s = 1000.0
    pair.p.open(KEY, 1)
    stranger.subscribe(KEY, 2, 1)
    stranger.expect(wire.Manifest)
    stranger.say(wire.Drop(make_key(2), 2))
    stranger.subscribe(KEY, 3, 1, wants=(wire.Want(0, 0, 2),))
    assert stranger.expect(wire.Refused) == wire.Refused(3, "bad_blocks")
    for event in ("kv_forged_end", "kv_bad_blocks", "kv_unknown_ticket"):
        assert [record.__dict__["security"] for record in logged(event)] == [True], event


def test_without_a_session_nothing_is_served(pair: Pair) -> None:
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    nobody = RawConsumer(pair.endpoint, greet=False)
    try:
        nobody.subscribe(KEY, 1, 1)
        nobody.say(wire.Done(KEY, 1), wire.Lane(b"x" * 16, 1))
        nobody.subscribe(KEY, 2, 1)
        for _ in range(3):
            assert nobody.expect(wire.Refused) == wire.Refused(0, "no_session")
        _transfer_works(pair, make_key(7))
        pair.p.until(lambda: pair.p.end.stats().leases == 1)
    finally:
        nobody.close()
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))


def test_an_old_hello_does_not_replace_a_session(pair: Pair, stranger: RawConsumer) -> None:
    stranger.greet(1)
    assert stranger.expect(wire.Refused) == wire.Refused(0, "stale_session")
    stranger.greet(2)
    assert stranger.expect(wire.Welcome).session == 2


def test_only_offered_transports_are_agreed(pair: Pair) -> None:
    stranger = RawConsumer(pair.endpoint, greet=False, offers=("carrier pigeon",))
    try:
        stranger.greet(1)
        assert stranger.expect(wire.Refused) == wire.Refused(0, "no_transport")
    finally:
        stranger.close()


def test_a_strangers_end_does_not_end_anothers_lease(pair: Pair, stranger: RawConsumer) -> None:
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    stranger.say(*(message(KEY, sub) for sub in range(5) for message in (wire.Done, wire.Drop)))
    stranger.subscribe(make_key(5), 1, 1, epoch=EPOCH + 1)
    stranger.expect(wire.Refused)
    pair.p.publish(KEY, 1, [2])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [1, 2], pair.d.cache, [1, 2])


def test_a_subscription_ends_only_by_its_own_key_and_number(pair: Pair, stranger: RawConsumer) -> None:
    """Else the producer forgets whom it serves, and keeps memory for who has left."""
    pair.p.open(KEY, 1)
    stranger.subscribe(KEY, 1, 1)
    stranger.expect(wire.Manifest)
    stranger.say(wire.Drop(make_key(2), 1), wire.Done(KEY, 2))
    stranger.subscribe(make_key(2), 1, 1)
    pair.p.publish(KEY, 0, [1])
    assert stranger.expect(wire.Blocks).sub == 1
    assert not pair.p.end.table.early
    stranger.say(wire.Done(KEY, 1))
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"
    pair.p.settle()


def test_subscriptions_of_a_peer_are_bounded(
    pair: Pair, stranger: RawConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.producer.MAX_EARLY", 8)
    for sub in range(1, 9):
        stranger.subscribe(make_key(5 + sub % 2), sub, 1)
    stranger.subscribe(make_key(5), 9, 1)
    assert stranger.expect(wire.Refused) == wire.Refused(9, "overloaded")
    assert pair.p.call(lambda: pair.p.end.table.early_subscribers) == 8
    monkeypatch.setattr("kvtransfer.producer.MAX_SUBSCRIPTIONS", 9)
    pair.p.open(KEY, 1, subscribers=3)
    stranger.subscribe(KEY, 10, 1)
    stranger.expect(wire.Manifest)
    stranger.subscribe(KEY, 11, 1)
    assert stranger.expect(wire.Refused) == wire.Refused(11, "overloaded")
    many = tuple(wire.Want(0, 0, 1) for _ in range(100_000))
    stranger.say(wire.Drop(KEY, 10))
    stranger.subscribe(KEY, 12, 1, wants=many)
    assert stranger.expect(wire.Refused) == wire.Refused(12, "bad_blocks")


def test_a_connection_has_one_session_whatever_it_calls_itself(pair: Pair) -> None:
    """Each cost a descriptor and was kept."""
    stranger = RawConsumer(pair.endpoint, offers=("shm",))
    try:
        for number in range(20):
            stranger.id = number.to_bytes(16, "big")
            stranger.greet(1)
            stranger.expect(wire.Welcome)
        assert len(pair.p.call(lambda: list(pair.p.end._sessions))) == 1
        pair.p.until(lambda: not pair.p.end._departed)
    finally:
        stranger.close()


WRONG: list[dict[str, object]] = [
    {"wants": (wire.Want(0, first, count),)}
    for first, count in [(-(2**63), 1), (-1, 1), (2**63 - 1, 2**63 - 1), (0, 2), (0, 0), (0, -1)]
]
WRONG += [{"wants": (wire.Want(group, 0, 1),)} for group in (-1, 1, 2**63)]
WRONG += [{"heads": heads} for heads in [(0, 0), (-1, 1), (0, HEADS + 1), (1, 0), (2**63, 2**64 - 1)]]


@pytest.mark.parametrize("changes", WRONG)
def test_a_subscription_to_what_can_not_be_is_refused(
    pair: Pair, stranger: RawConsumer, changes: dict[str, Any]
) -> None:
    pair.p.open(KEY, 1, subscribers=3)
    pair.p.publish(KEY, 0, [1])
    stranger.subscribe(KEY, 1, 1, **changes)
    assert stranger.expect(wire.Refused) == wire.Refused(1, "bad_blocks")
    _transfer_works(pair, make_key(7))


def test_a_subscription_to_a_group_twice_is_refused(make_pair: Callable[..., Pair]) -> None:
    """The first of its runs was never sent."""
    pair = make_pair(groups=2)
    stranger = RawConsumer(pair.endpoint, offers=("shm",))
    try:
        pair.p.open(KEY, 2)
        stranger.subscribe(KEY, 1, 1, wants=(wire.Want(0, 0, 1), wire.Want(0, 1, 1)))
        assert stranger.expect(wire.Refused) == wire.Refused(1, "bad_blocks")
    finally:
        stranger.close()


@pytest.mark.parametrize("deadline_s", [float("nan"), float("inf"), float("-inf"), -1.0, 601.0])
def test_a_deadline_out_of_range_is_refused_and_holds_no_memory(
    pair: Pair, stranger: RawConsumer, deadline_s: float
) -> None:
    pair.p.open(KEY, 1)
    stranger.subscribe(KEY, 1, 1, deadline_s=deadline_s)
    assert stranger.expect(wire.Refused) == wire.Refused(1, "bad_deadline")
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    pair.p.settle()


def test_early_subscriptions_are_bounded_and_do_not_shut_out_an_open_lease(
    pair: Pair, stranger: RawConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.producer.MAX_EARLY", 3)
    for n in range(100, 104):
        stranger.subscribe(make_key(n), n, 1)
    assert stranger.expect(wire.Refused) == wire.Refused(103, "overloaded")
    assert len(pair.p.end.table.early) == 3
    _transfer_works(pair, make_key(7))


def test_a_silent_consumer_is_looked_after_once_a_second(pair: Pair, stranger: RawConsumer) -> None:
    """Four times a second: what is sent to one that is stopped waits in memory."""
    stranger.subscribe(make_key(9), 1, 1)
    assert 1 <= stranger.signs_of_life(3.0) <= 3
    stranger.say(wire.Drop(make_key(9), 1))


def test_an_oversized_message_costs_the_stranger_its_connection(pair: Pair, stranger: RawConsumer) -> None:
    stranger.say_raw(bytes(wire.MAX_MESSAGE + SEALED_BYTES + 1))
    _transfer_works(pair, make_key(7))


def _pass_through(d: ConsumerEnd, raw: RawProducer) -> None:
    """Another load on the connection: what was said before it has been heard before it ends."""
    key = make_key(50)
    d.load(key, raw.endpoint, (8,), tokens=4)
    sub = raw.expect(wire.Subscribe).sub
    raw.say(manifest(sub, tokens=4))
    raw.say(blocks(sub, 0, 1), b"z" * BLOCK_BYTES)
    d.events.expect(wire.Loaded, key)
