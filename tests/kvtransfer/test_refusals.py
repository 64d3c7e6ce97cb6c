"""What does not fit together is refused with its reason, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from kvtransfer import wire
from tests.kvtransfer.ends import (
    BLOCK_BYTES,
    BLOCKS,
    EPOCH,
    HEADS,
    ROW_BYTES,
    Pair,
    contents,
    make_cache,
    make_key,
    same,
)

KEY = make_key()


@pytest.fixture(params=["shm", "zmq"])
def pair(make_pair: Callable[..., Pair], request: pytest.FixtureRequest) -> Pair:
    return make_pair(transports=[request.param], piece_bytes=BLOCK_BYTES)


def refused(pair: Pair, **changes: object) -> str:
    """The reason for which a load of two published blocks fails."""
    before = contents(pair.d.cache)
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1, 2])
    pair.d.load(KEY, pair.endpoint, (3, 4), **changes)
    reason = pair.d.events.expect(wire.Failed, KEY).reason
    assert torch.equal(contents(pair.d.cache), before)
    return reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": EPOCH + 1}, "stale_epoch"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"chain": b"other"}, "prompt_mismatch"),
        ({"tokens": 7}, "prompt_mismatch"),
    ],
)
def test_a_load_that_expects_something_else_is_refused(
    pair: Pair, changes: dict[str, object], reason: str
) -> None:
    assert refused(pair, **changes) == reason


@pytest.mark.parametrize(
    "ours",
    [
        {"layers": 3},
        {"row_bytes": ROW_BYTES // 2},
        {"row_bytes": ROW_BYTES * 2},
        {"groups": 2},
        {"heads": HEADS + 1},
    ],
)
def test_a_cache_of_another_shape_is_refused(pair: Pair, ours: dict[str, int]) -> None:
    pair.d = pair.consumer(cache=make_cache(fill=False, **ours))
    assert refused(pair) in ("layout", "bad_blocks")


def test_a_refused_consumer_ends_its_part_of_the_lease(pair: Pair) -> None:
    refused(pair, chain=b"other")
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


@pytest.mark.parametrize("blocks", [(0,), (-1,), (BLOCKS,), (1, 2, 10**12)])
def test_blocks_outside_of_the_cache_are_refused(pair: Pair, blocks: tuple[int, ...]) -> None:
    pair.d.load(KEY, pair.endpoint, blocks)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "bad_blocks"


@pytest.mark.parametrize(("first", "last", "put"), [(0, 0, 0), (-1, 1, 0), (0, 1, -1), (0, 1, 2), (0, 3, 0)])
def test_heads_outside_of_the_cache_are_refused(pair: Pair, first: int, last: int, put: int) -> None:
    pair.d.load(KEY, "", (1,), sources=(wire.Source(pair.endpoint, EPOCH, first, last, put),))
    assert pair.d.events.expect(wire.Failed, KEY).reason == "bad_blocks"


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": ()},
        {"spans": (wire.Span(1, 0, (1,)),)},
        {"spans": (wire.Span(0, 0, (1,)), wire.Span(0, 1, (2,)))},
    ],
)
def test_a_load_from_nowhere_of_another_group_or_of_a_group_twice_is_refused(
    pair: Pair, changes: dict[str, object]
) -> None:
    pair.d.load(KEY, pair.endpoint, (1,), **changes)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "bad_blocks"


def test_blocks_that_the_lease_lacks_are_refused(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1, 2])
    pair.d.load(KEY, pair.endpoint, (3, 4, 5), tokens=8)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "bad_blocks"
    assert not contents(pair.d.cache).any()


@pytest.mark.parametrize("part", [wire.Key(KEY.id, 2), wire.Key(KEY.id, 1, 1), make_key(2)])
def test_another_attempt_or_part_of_a_ticket_is_another_key(pair: Pair, part: wire.Key) -> None:
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(part, pair.endpoint, (1,), deadline_s=0.2)
    assert pair.d.events.expect(wire.Failed, part).reason == "timeout"
    assert not contents(pair.d.cache).any()


def test_a_second_load_of_a_key_is_refused_and_the_first_goes_on(pair: Pair) -> None:
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.load(KEY, pair.endpoint, (2,))
    assert pair.d.events.expect(wire.Failed, KEY).reason == "duplicate"
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [5])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [5], pair.d.cache, [1])
    assert not contents(pair.d.cache)[:, 2].any()


def test_a_ticket_that_the_producer_never_opens_is_refused(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(lease_s=0.1)
    pair.d.load(KEY, pair.endpoint, (1,))
    assert pair.d.events.expect(wire.Failed, KEY).reason == "unknown_ticket"
    pair.p.settle()


def test_the_reason_of_a_closed_lease_reaches_its_consumers(pair: Pair) -> None:
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    pair.p.until(lambda: bool(pair.p.end.table.held[KEY].subscribers))
    pair.p.call(lambda: pair.p.end.end(KEY, "prefill_500"))
    assert pair.d.events.expect(wire.Failed, KEY).reason == "prefill_500"


def test_a_load_ends_at_its_deadline(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, pair.endpoint, (1, 2), deadline_s=0.1)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "timeout"
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


def test_a_producer_that_is_not_there_is_a_timeout(pair: Pair) -> None:
    pair.d.load(KEY, "tcp://127.0.0.1:1", (1,), deadline_s=0.1)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "timeout"


def test_a_lost_producer_fails_the_load(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.p.until(lambda: bool(pair.p.end.table.held[KEY].subscribers))
    pair.p.stop()
    assert pair.d.events.expect(wire.Failed, KEY).reason == "disconnected"


def test_unload_is_always_answered(pair: Pair) -> None:
    pair.d.unload(KEY)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "cancelled"


@pytest.mark.parametrize("phase", ["no producer", "early", "waiting", "open", "streaming", "ended"])
def test_unload_gives_staging_back_at_once_in_every_phase(make_pair: Callable[..., Pair], phase: str) -> None:
    pair = make_pair(capacity=4096, piece_bytes=BLOCK_BYTES)
    p, other = pair.p, make_key(2)
    if phase == "waiting":
        p.open(other, 2)
    if phase not in ("no producer", "early"):
        p.open(KEY, 3)
    if phase in ("streaming", "ended"):
        p.publish(KEY, 0, [4] if phase == "streaming" else [4, 5, 6])
    pair.d.load(KEY, pair.endpoint if phase != "no producer" else "tcp://127.0.0.1:1", (1, 2, 3))
    match phase:
        case "early":
            p.until(lambda: KEY in p.end.table.early)
        case "waiting":
            p.until(lambda: bool(p.end.table.waiting[KEY].subscribers))
        case "open":
            p.until(lambda: bool(p.end.table.held[KEY].subscribers))
        case "streaming":
            pair.d.until(lambda: same(p.cache, [4], pair.d.cache, [1]))
        case "ended":
            pair.d.events.expect(wire.Loaded, KEY)
    began = time.monotonic()
    pair.d.unload(KEY)
    pair.d.events.expect(wire.Failed, KEY)
    if phase == "waiting":
        p.call(lambda: p.end.end(other, "cancelled"))
    p.settle()
    assert time.monotonic() - began < 1


def test_after_unload_nothing_is_written_though_the_producer_goes_on(pair: Pair) -> None:
    pair.p.open(KEY, 3, subscribers=2)
    pair.p.publish(KEY, 0, [4])
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.d.until(lambda: bool(contents(pair.d.cache)[:, 1].any()))
    (subscriber,) = pair.p.end.table.held[KEY].subscribers.values()
    session = pair.p.end._sessions[subscriber.id[0]]
    pair.d.unload(KEY)
    pair.d.events.expect(wire.Failed, KEY)
    after = contents(pair.d.cache)
    pair.p.until(lambda: subscriber.ended)

    def forget_the_drop() -> None:
        """A producer that has not read the Drop yet."""
        subscriber.ended = False
        session.subscriptions[subscriber.id[1]] = KEY

    pair.p.call(forget_the_drop)
    pair.p.publish(KEY, 1, [5, 6])
    _pass_through(pair)
    assert torch.equal(contents(pair.d.cache), after)
    pair.p.call(lambda: pair.p.end._ended(session, KEY, subscriber.id[1]))


def _pass_through(pair: Pair) -> None:
    """Another load on the same connection: what was sent before it has been received before it."""
    key = make_key(99)
    pair.p.open(key, 1)
    pair.d.load(key, pair.endpoint, (), first=1, tokens=4)
    pair.d.events.expect(wire.Loaded, key)
