"""Copies into the cache that are still running when something happens to their load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
import torch

from kvtransfer import wire
from kvtransfer.fence import Fence
from tests.kvtransfer.ends import (
    BLOCK_BYTES,
    DEADLINE_S,
    EPOCH,
    Blocks,
    ConsumerEnd,
    contents,
    make_key,
)
from tests.kvtransfer.raw import SHAPES, RawProducer

KEY, OTHER = make_key(), make_key(2)
OURS = (3, 4, 5)


class Gate(Fence):
    """A copy that is made when it is let through."""

    def __init__(self, copy: Callable[[], None], permits: threading.Semaphore) -> None:
        self._copy = copy
        self._permits = permits

    def wait(self) -> None:
        assert self._permits.acquire(timeout=DEADLINE_S)
        self._copy()


class GatedCache:
    """A device's cache: copies end only when the test lets them."""

    def __init__(self, cache: Blocks) -> None:
        self._cache = cache
        self.shapes, self.blocks = cache.shapes, cache.blocks
        self.permits = threading.Semaphore(0)
        self.copy, self.gather = cache.copy, cache.gather

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> Fence:
        return Gate(lambda: self._cache.scatter(group, block_ids, rows, put), self.permits)


class Gated:
    """A consumer with a gated cache, and a producer by hand."""

    def __init__(self) -> None:
        self.raw = RawProducer()
        caches: list[GatedCache] = []

        def through(cache: Blocks) -> GatedCache:
            caches.append(GatedCache(cache))
            return caches[0]

        self.d = ConsumerEnd(through=through)
        self.permits = caches[0].permits

    def start(self) -> int:
        self.d.load(KEY, self.raw.endpoint, OURS)
        self.raw.welcome()
        return self.subscribed(KEY)

    def subscribed(self, key: wire.Key) -> int:
        """The manifest is attested to the next subscription, which is the key's."""
        subscribe = self.raw.expect(wire.Subscribe)
        assert subscribe.key == key
        self.raw.say(wire.Manifest(subscribe.sub, EPOCH, 12, b"chain", "fp", SHAPES))
        return subscribe.sub

    def send(self, sub: int, first: int, count: int, byte: bytes) -> None:
        nbytes = count * BLOCK_BYTES
        self.raw.say(wire.Blocks(sub, 0, first, count, nbytes), byte * nbytes)

    def copying(self, count: int, key: wire.Key = KEY) -> None:
        """Wait until so many copies of a load run."""
        self.d.until(lambda: self.d.end._loads[key].writing == count)

    def new_session(self) -> None:
        self.raw.say(wire.Refused(0, "no_session"))
        self.raw.welcome()

    def close(self) -> None:
        self.permits.release(100)
        self.d.settle()
        self.d.call(self.d.end.check_integrity)
        self.d.close()
        self.raw.close()


@pytest.fixture
def gated() -> Iterator[Gated]:
    gated = Gated()
    yield gated
    gated.close()


def test_a_load_has_ended_when_its_last_copy_has(gated: Gated) -> None:
    sub = gated.start()
    gated.send(sub, 0, 2, b"a")
    gated.send(sub, 2, 1, b"b")
    gated.copying(2)
    gated.permits.release()
    gated.copying(1)
    assert not gated.d.events.seen
    gated.permits.release()
    gated.d.events.expect(wire.Loaded, KEY)
    assert contents(gated.d.cache)[:, list(OURS)].all()


def test_an_unloaded_load_fails_when_nothing_writes_its_blocks_any_more(gated: Gated) -> None:
    sub = gated.start()
    gated.send(sub, 0, 1, b"a")
    gated.copying(1)
    gated.d.unload(KEY)
    gated.raw.expect(wire.Drop)
    assert not gated.d.events.seen
    gated.permits.release()
    gated.d.events.expect(wire.Failed, KEY)


def test_a_load_that_has_failed_is_not_resumed(gated: Gated) -> None:
    """Its connection is lost while the last copy runs."""
    sub = gated.start()
    gated.send(sub, 0, 1, b"a")
    gated.copying(1)
    gated.raw.say(wire.Refused(0, "no_session"))
    hello = gated.raw.expect(wire.Hello)
    gated.d.unload(KEY)
    gated.raw.say(wire.Welcome(hello.session, "zmq", msgspec.msgpack.encode({"lanes": 1})))
    gated.d.load(OTHER, gated.raw.endpoint, (7, 8, 9))
    gated.subscribed(OTHER)
    gated.permits.release()
    gated.d.events.expect(wire.Failed, KEY)
    gated.d.unload(OTHER)


def test_blocks_that_were_being_written_when_the_connection_broke_may_come_again(gated: Gated) -> None:
    old = gated.start()
    gated.send(old, 0, 1, b"a")
    gated.copying(1)
    gated.new_session()
    new = gated.subscribed(KEY)
    gated.permits.release()
    gated.copying(0)
    gated.send(new, 0, 1, b"a")
    gated.send(new, 1, 2, b"b")
    gated.permits.release(2)
    assert gated.d.events.expect(wire.Loaded, KEY).retries == 1


def test_a_load_does_not_end_while_a_block_is_written_a_second_time(gated: Gated) -> None:
    old = gated.start()
    gated.send(old, 0, 3, b"a")
    gated.copying(1)
    gated.new_session()
    new = gated.subscribed(KEY)
    gated.send(new, 0, 3, b"a")
    gated.copying(2)
    gated.permits.release()
    gated.copying(1)
    assert not gated.d.events.seen
    gated.permits.release()
    gated.d.events.expect(wire.Loaded, KEY)


def test_a_copy_that_ends_after_the_deadline_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer may have used the memory again while it ran. No timer helps here."""
    monkeypatch.setattr("kvtransfer.loop.TICK_S", 1000.0)
    gated = Gated()
    sub = gated.start()
    gated.send(sub, 0, 3, b"a")
    gated.copying(1)
    gated.d.call(lambda: setattr(gated.d.end._loads[KEY], "deadline", 0.0))
    gated.permits.release()
    assert gated.d.events.expect(wire.Failed, KEY).reason == "timeout"
    gated.close()
