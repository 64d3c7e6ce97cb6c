"""What does not fit together is refused with its reason, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvtransfer import wire
from tests.kvtransfer.ends import BLOCKS, EPOCH, Pair, contents, make_key, same

KEY = make_key()


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


def test_blocks_of_another_size_are_refused(pair: Pair) -> None:
    pair.d = pair.consumer(layers=3)
    assert refused(pair) == "layout"


def test_a_refused_consumer_ends_its_part_of_the_lease(pair: Pair) -> None:
    refused(pair, chain=b"other")
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


@pytest.mark.parametrize("blocks", [(0,), (-1,), (BLOCKS,), (1, 2, 10**12)])
def test_blocks_outside_of_the_cache_are_refused(pair: Pair, blocks: tuple[int, ...]) -> None:
    pair.d.load(KEY, pair.endpoint, blocks)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "bad_blocks"


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
    assert pair.p.call(pair.p.end.stats) == wire.Stats()


def test_the_reason_of_a_closed_lease_reaches_its_consumers(pair: Pair) -> None:
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.p.open(KEY, 2)
    pair.p.publish(KEY, 0, [1])
    pair.p.until(lambda: bool(pair.p.end.table.held[KEY].subscribers))
    pair.p.call(lambda: pair.p.end.close(KEY, "prefill_500"))
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
    pair.p.close()
    assert pair.d.events.expect(wire.Failed, KEY).reason == "disconnected"


def test_unload_is_always_answered(pair: Pair) -> None:
    pair.d.unload(KEY)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "cancelled"


def test_after_unload_nothing_is_written_though_the_producer_goes_on(pair: Pair) -> None:
    pair.p.open(KEY, 3, subscribers=2)
    pair.p.publish(KEY, 0, [4])
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.d.until(lambda: bool(contents(pair.d.cache)[:, 1].any()))
    pair.d.unload(KEY)
    pair.d.events.expect(wire.Failed, KEY)
    after = contents(pair.d.cache)
    table = pair.p.end.table
    pair.p.until(lambda: all(s.done for s in table.held[KEY].subscribers.values()))
    for subscriber in table.held[KEY].subscribers.values():
        subscriber.done = False  # a producer that has not read the Drop yet
    pair.p.publish(KEY, 1, [5, 6])
    _pass_through(pair)
    assert torch.equal(contents(pair.d.cache), after)


def _pass_through(pair: Pair) -> None:
    """Another load on the same connection: what was sent before it has been received before it."""
    key = make_key(99)
    pair.p.open(key, 1)
    pair.d.load(key, pair.endpoint, (), first=1, tokens=4)
    pair.d.events.expect(wire.Loaded, key)
