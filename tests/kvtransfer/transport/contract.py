"""What every transport has to do, as tests to be inherited; ``names`` says which one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvtransfer.consumer
from kvtransfer import wire
from kvtransfer.cache import Cache
from kvtransfer.fence import Fence
from tests.kvtransfer.ends import (
    BLOCK_BYTES,
    Blocks,
    ConsumerEnd,
    Pair,
    ProducerEnd,
    contents,
    make_cache,
    make_key,
    same,
)
from tests.kvtransfer.transport import peer
from tests.kvtransfer.transport.peer import Peer
from tests.system.processes import listening

MakePair = Callable[..., Pair]
KEY = make_key()
SOON_S = 2.0
"""A lost peer is noticed this soon."""


class LateCache:
    """Writes what it is given only when ``released``, as a device would."""

    def __init__(self, cache: Blocks) -> None:
        self._cache = cache
        self.shapes, self.blocks = cache.shapes, cache.blocks
        self.held = 0
        self.released = threading.Event()

    def gather(self, group: int, block_ids: Any, out: torch.Tensor) -> Fence | None:
        raise NotImplementedError

    def copy(self, group: int, source: int, target: int) -> None:
        raise NotImplementedError

    def scatter(self, group: int, block_ids: Any, rows: torch.Tensor, put: int = 0) -> Fence:
        self.held += 1
        return _Late(self, lambda: self._cache.scatter(group, block_ids, rows, put))


class _Late:
    def __init__(self, cache: LateCache, write: Callable[[], None]) -> None:
        self._cache, self._write = cache, write

    def wait(self) -> None:
        assert self._cache.released.wait(20)
        self._write()


class InOneProcess:
    """Both ends on threads of the test."""

    names: tuple[str, ...]
    lanes = 1

    @pytest.fixture
    def pair(self, make_pair: MakePair) -> Pair:
        return make_pair(transports=self.names, lanes=self.lanes, piece_bytes=4 * BLOCK_BYTES)

    def test_blocks_arrive_as_they_were_and_nothing_else_is_written(self, pair: Pair) -> None:
        before = contents(pair.d.cache)
        pair.p.open(KEY, 6)
        pair.d.load(KEY, pair.endpoint, (4, 7, 1, 2, 9, 8))
        pair.p.events.expect(wire.Opened, KEY)
        pair.p.publish(KEY, 0, [5, 2, 9, 1, 0, 3])
        loaded = pair.d.events.expect(wire.Loaded, KEY)
        assert (loaded.transport, loaded.nbytes, loaded.retries) == (self.names[0], 6 * BLOCK_BYTES, 0)
        assert same(pair.p.cache, [5, 2, 9, 1, 0, 3], pair.d.cache, [4, 7, 1, 2, 9, 8])
        others = [b for b in range(pair.d.cache.blocks) if b not in (4, 7, 1, 2, 9, 8)]
        assert torch.equal(contents(pair.d.cache)[:, others], before[:, others])
        pair.p.settle()

    @pytest.mark.parametrize("have", [1, 2, 3])
    def test_a_piece_is_cut_where_the_consumers_own_blocks_end(self, pair: Pair, have: int) -> None:
        pair.p.open(KEY, 4)
        pair.p.publish(KEY, 0, [4, 5, 6, 7])
        wanted = (1, 2, 3, 8)[have:]
        pair.d.load(KEY, pair.endpoint, wanted, first=have)
        assert pair.d.events.expect(wire.Loaded, KEY).nbytes == len(wanted) * BLOCK_BYTES
        assert same(pair.p.cache, [4, 5, 6, 7][have:], pair.d.cache, wanted)

    @pytest.mark.parametrize("first", [0, 1])
    def test_heads_of_two_producers_come_together_in_one_block(self, make_pair: MakePair, first: int) -> None:
        pairs = [make_pair(transports=self.names, lanes=self.lanes) for _ in range(2)]
        for pair in pairs:
            pair.p.open(KEY, 4)
            pair.p.publish(KEY, 0, [4, 5, 6, 7])
        sources = tuple(wire.Source(p.endpoint, 7, rank, rank + 1, rank) for rank, p in enumerate(pairs))
        d = pairs[0].d
        d.load(KEY, "", (1, 2, 3, 8)[first:], sources=sources, first=first)
        assert d.events.expect(wire.Loaded, KEY).nbytes == (4 - first) * BLOCK_BYTES
        ours = d.cache.take((1, 2, 3, 8)[first:])
        for head, pair in enumerate(pairs):
            assert torch.equal(ours[:, :, head], pair.p.cache.take([4, 5, 6, 7][first:])[:, :, head])

    def test_what_a_load_left_behind_does_not_reach_the_next(self, make_pair: MakePair) -> None:
        """Loads come and go in the middle of their streams; those that stay are right."""
        pair = make_pair(transports=self.names, lanes=self.lanes, piece_bytes=BLOCK_BYTES)
        blocks = list(range(1, 11))
        for number in range(1, 41):
            key = make_key(number)
            pair.d.load(key, pair.endpoint, tuple(blocks), first=0)
            pair.p.open(key, 10)
            pair.p.events.expect(wire.Opened, key)
            rotated = blocks[number % 10 :] + blocks[: number % 10]
            pair.p.publish(key, 0, rotated[:7])
            if number % 3 == 0:
                pair.d.unload(key)
                pair.d.events.expect(wire.Failed, key)
                continue
            pair.p.publish(key, 7, rotated[7:])
            loaded = pair.d.events.expect(wire.Loaded, key)
            assert (loaded.transport, loaded.retries) == (self.names[0], 0)
            assert same(pair.p.cache, rotated, pair.d.cache, blocks)

    def test_payloads_stay_while_a_device_still_copies_them(self, make_pair: MakePair) -> None:
        pair = make_pair(transports=self.names, lanes=self.lanes, piece_bytes=BLOCK_BYTES)
        late: list[LateCache] = []

        def through(cache: Blocks) -> Cache:
            late.append(LateCache(cache))
            return late[0]

        d = pair.consumer(through=through)
        pair.p.open(KEY, 8)
        pair.p.publish(KEY, 0, list(range(8)))
        d.load(KEY, pair.endpoint, tuple(range(1, 9)))
        d.until(lambda: late[0].held == 8)
        late[0].released.set()
        d.events.expect(wire.Loaded, KEY)
        assert same(pair.p.cache, range(8), d.cache, range(1, 9))

    def test_a_connection_that_was_closed_is_made_again(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(1, 4):
            key = make_key(number)
            monkeypatch.setattr(kvtransfer.consumer, "IDLE_S", 300.0)
            pair.d.load(key, pair.endpoint, (1, 2, 3))
            pair.p.open(key, 3)
            pair.p.publish(key, 0, [number, number + 1, number + 2])
            loaded = pair.d.events.expect(wire.Loaded, key)
            assert (loaded.transport, loaded.retries) == (self.names[0], 0)
            assert same(pair.p.cache, range(number, number + 3), pair.d.cache, [1, 2, 3])
            monkeypatch.setattr(kvtransfer.consumer, "IDLE_S", 0.0)
            pair.d.until(lambda: not pair.d.end._peers)


class InTwoProcesses:
    """One end is another process, which may be killed."""

    names: tuple[str, ...]
    close_s = 2.0

    @pytest.fixture
    def far_producer(self) -> Iterator[Peer]:
        far = Peer("producer", list(self.names))
        yield far
        far.close()

    @pytest.fixture
    def d(self) -> Iterator[ConsumerEnd]:
        d = peer.consumer(list(self.names))
        yield d
        d.close()

    @pytest.fixture
    def p(self) -> Iterator[ProducerEnd]:
        p = peer.producer(list(self.names))
        yield p
        p.close()

    def left(self) -> list[str]:
        """Names of this transport's threads in this process."""
        return []

    def until_gone(self) -> None:
        give_up = time.monotonic() + SOON_S
        while self.left():
            assert time.monotonic() < give_up, self.left()
            time.sleep(0.01)  # the kernel tells nobody

    def test_many_loads_at_once_arrive_as_they_were(self, far_producer: Peer, d: ConsumerEnd) -> None:
        ours = make_cache(blocks=peer.BLOCKS, row_bytes=peer.ROW_BYTES, fill=True)
        loads = {n: list(range(1 + 5 * (n - 1), 1 + 5 * n)) for n in range(1, 8)}
        for number, blocks in loads.items():
            d.load(make_key(number), far_producer.endpoint, tuple(blocks))
            far_producer.call("open", number, 5)
        for at in range(5):
            for number, blocks in loads.items():
                far_producer.call("publish", number, at, [blocks[at]])
        for number, blocks in loads.items():
            assert d.events.expect(wire.Loaded, make_key(number)).transport == self.names[0]
            assert same(ours, blocks, d.cache, blocks)
        for pid in (far_producer.pid, os.getpid()):
            assert {a for a in listening([pid]) if not a.startswith("127.0.0.1:")} == set()

    def test_a_killed_producer_fails_the_load_and_leaves_nothing(
        self, far_producer: Peer, d: ConsumerEnd
    ) -> None:
        d.load(KEY, far_producer.endpoint, tuple(range(1, 31)))
        far_producer.call("open", 1, 30)
        far_producer.call("publish", 1, 0, list(range(1, 21)))
        d.until(lambda: len(d.end._loads[KEY].parts[0].missing[0]) <= 26)
        far_producer.signal(signal.SIGKILL)
        killed = time.monotonic()
        assert d.events.expect(wire.Failed, KEY).reason == "disconnected"
        self.until_gone()
        assert time.monotonic() - killed < SOON_S

    def test_a_killed_consumer_leaves_nothing(self, p: ProducerEnd) -> None:
        far = Peer("consumer", list(self.names))
        try:
            p.open(KEY, 30)
            far.call("load", 1, p.end.endpoint, list(range(1, 31)))
            p.publish(KEY, 0, list(range(8)))
            give_up = time.monotonic() + SOON_S
            while far.call("came", 1) < 8:
                assert time.monotonic() < give_up
        finally:
            far.signal(signal.SIGKILL)
            far.close()
        self.until_gone()
        p.until(lambda: not p.end._sessions)

    def test_close_does_not_wait_for_a_peer_that_hangs(self, far_producer: Peer) -> None:
        d = peer.consumer(list(self.names))
        d.load(KEY, far_producer.endpoint, tuple(range(1, 31)))
        far_producer.call("open", 1, 30)
        far_producer.call("publish", 1, 0, list(range(1, 5)))
        d.until(lambda: len(d.end._loads[KEY].parts[0].missing[0]) <= 26)
        far_producer.call("publish", 1, 4, list(range(5, 31)))
        far_producer.signal(signal.SIGSTOP)
        since = time.monotonic()
        d.close()
        assert time.monotonic() - since < self.close_s
        self.until_gone()
        far_producer.signal(signal.SIGCONT)
