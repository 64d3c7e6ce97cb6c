"""A producer and its consumers over loopback TCP: bytes arrive, and everything is given back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from braid.keys import make_keys
from kvtransfer import wire
from tests.kvtransfer.ends import Pair, ProducerEnd, contents, make_key, same

MakePair = Callable[..., Pair]
KEY = make_key()


def settled(end: ProducerEnd) -> bool:
    return end.call(end.end.stats) == wire.Stats()


def test_blocks_arrive_as_they_were_and_nothing_else_is_written(pair: Pair) -> None:
    before = contents(pair.d.cache)
    pair.p.open(KEY, 3)
    pair.p.events.expect(wire.Opened, KEY)
    pair.p.publish(KEY, 0, [5, 2, 9])
    pair.d.load(KEY, pair.endpoint, (4, 7, 1))
    loaded = pair.d.events.expect(wire.Loaded, KEY)
    assert (loaded.blocks, loaded.nbytes) == (3, 3 * pair.d.cache.block_bytes)
    assert same(pair.p.cache, [5, 2, 9], pair.d.cache, [4, 7, 1])
    others = [b for b in range(pair.d.cache.blocks) if b not in (4, 7, 1)]
    assert torch.equal(contents(pair.d.cache)[:, others], before[:, others])
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"
    assert settled(pair.p)


def test_blocks_stream_to_a_consumer_that_came_before_the_lease(pair: Pair) -> None:
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.p.until(lambda: KEY in pair.p.end.table.early)
    pair.p.open(KEY, 3)
    for first, block in enumerate((4, 5, 6)):
        pair.p.publish(KEY, first, [block])
        pair.d.until(lambda first=first: _written(pair, KEY) == first + 1)  # type: ignore[misc]
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [4, 5, 6], pair.d.cache, [1, 2, 3])


def test_a_consumer_that_comes_amid_the_stream_gets_all_of_it(pair: Pair) -> None:
    pair.p.open(KEY, 3)
    pair.p.publish(KEY, 0, [4, 5])
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.d.until(lambda: _written(pair, KEY) == 2)
    pair.p.publish(KEY, 2, [6])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [4, 5, 6], pair.d.cache, [1, 2, 3])


@pytest.mark.parametrize("have", [1, 2, 3])
def test_blocks_that_the_consumer_has_are_not_sent(pair: Pair, have: int) -> None:
    pair.p.open(KEY, 4)
    pair.p.publish(KEY, 0, [4, 5, 6])
    pair.p.publish(KEY, 3, [7])
    wanted = (1, 2, 3, 8)[have:]
    pair.d.load(KEY, pair.endpoint, wanted, first=have)
    assert pair.d.events.expect(wire.Loaded, KEY).nbytes == len(wanted) * pair.d.cache.block_bytes
    assert same(pair.p.cache, [4, 5, 6, 7][have:], pair.d.cache, list(wanted))


def test_a_consumer_that_has_every_block_only_checks_the_manifest(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    pair.d.load(KEY, pair.endpoint, (), first=2)
    loaded = pair.d.events.expect(wire.Loaded, KEY)
    assert (loaded.nbytes, loaded.blocks) == (0, 0)
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


def test_two_consumers_share_one_staging(pair: Pair) -> None:
    other = pair.consumer()
    pair.p.open(KEY, 2, subscribers=2)
    pair.p.publish(KEY, 0, [4, 5])
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.d.events.expect(wire.Loaded, KEY)
    staged = pair.p.call(pair.p.end.stats)
    assert (staged.leases, staged.staging_bytes) == (1, 2 * pair.p.cache.block_bytes)
    assert pair.p.events.count(wire.Closed) == 0, "the second has not come yet"
    other.load(KEY, pair.endpoint, (8, 9))
    other.events.expect(wire.Loaded, KEY)
    pair.p.events.expect(wire.Closed, KEY)
    assert same(pair.p.cache, [4, 5], other.cache, [8, 9])
    assert settled(pair.p)


def test_several_prompts_share_a_connection(pair: Pair) -> None:
    keys = [make_key(n) for n in range(4)]
    for n, key in enumerate(keys):
        pair.d.load(key, pair.endpoint, (1 + n, 5 + n))
        pair.p.open(key, 2)
        pair.p.publish(key, 0, [n])
    for n, key in enumerate(keys):
        pair.p.publish(key, 1, [n + 4])
        pair.d.events.expect(wire.Loaded, key)
        assert same(pair.p.cache, [n, n + 4], pair.d.cache, [1 + n, 5 + n])


def test_staging_stays_in_its_bound_and_waiting_leases_get_room_in_turn(make_pair: MakePair) -> None:
    block = make_pair().p.cache.block_bytes
    pair = make_pair(capacity=3 * block)
    first, second, third = (make_key(n) for n in range(3))
    pair.p.open(first, 2)
    pair.p.open(second, 2)
    pair.p.open(third, 1)
    stats = pair.p.call(pair.p.end.stats)
    assert (stats.staging_bytes, stats.leases, stats.pending) == (2 * block, 1, 2)
    pair.p.call(lambda: pair.p.end.close(first, "cancelled"))
    for key in (second, third):
        pair.p.events.expect(wire.Opened, key)
    opened = [e.key for e in pair.p.events.seen if isinstance(e, wire.Opened)]
    assert opened == [first, second, third]


def test_a_prompt_that_can_never_fit_is_refused(make_pair: MakePair) -> None:
    pair = make_pair(capacity=1000)
    pair.p.open(KEY, 2)
    assert "over the staging bound" in pair.p.events.expect(wire.Closed, KEY).reason
    assert settled(pair.p)


def test_closing_a_lease_twice_ends_it_once(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    for _ in range(2):
        pair.p.call(lambda: pair.p.end.close(KEY, "cancelled"))
    assert pair.p.events.count(wire.Closed) == 1


def test_a_piece_that_comes_after_the_lease_is_dropped(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    pair.p.call(lambda: pair.p.end.close(KEY, "cancelled"))
    pair.p.publish(KEY, 0, [1, 2])
    assert settled(pair.p)


def test_a_lease_that_nobody_fetches_expires(make_pair: MakePair) -> None:
    pair = make_pair(lease_s=0.1)
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    assert pair.p.events.expect(wire.Closed, KEY).reason == "expired"
    assert settled(pair.p)


def test_a_transfer_needs_the_clusters_keys(make_pair: MakePair, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        make_keys(folder)
    pair = make_pair(keys_dir=ours)
    pair.keys_dir = theirs
    stranger = pair.consumer()
    pair.keys_dir = None
    naked = pair.consumer()
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    for outsider in (stranger, naked):
        outsider.load(KEY, pair.endpoint, (1,), deadline_s=0.5)
    for outsider in (stranger, naked):
        assert outsider.events.expect(wire.Failed, KEY).reason in ("timeout", "disconnected")
        assert not contents(outsider.cache).any()
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [1], pair.d.cache, [1])


def test_only_the_producer_listens_and_only_where_it_is_told(make_pair: MakePair) -> None:
    before = listening()
    pair = make_pair()
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.events.expect(wire.Loaded, KEY)
    port = int(pair.endpoint.rpartition(":")[2])
    assert listening() - before == {("127.0.0.1", port)}


def test_no_descriptor_is_left_behind() -> None:
    def once() -> None:
        pair = Pair()
        pair.p.open(KEY, 1)
        pair.p.publish(KEY, 0, [1])
        pair.d.load(KEY, pair.endpoint, (1,))
        pair.d.events.expect(wire.Loaded, KEY)
        pair.close()

    once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        once()
    assert len(os.listdir("/proc/self/fd")) == before


def listening() -> set[tuple[str, int]]:
    """Addresses on which this process listens (Linux)."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                octets = reversed(bytes.fromhex(address))
                found.add((".".join(map(str, octets)), int(port, 16)))
    return found


def _written(pair: Pair, key: wire.Key) -> int:
    """Blocks of a load that have come so far; runs on the consumer's loop."""
    load = pair.d.end._loads.get(key)
    return load.next if load is not None else sum(isinstance(e, wire.Loaded) for e in pair.d.events.seen) * 3
