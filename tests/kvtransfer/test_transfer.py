"""A producer and its consumers over loopback: bytes arrive, and everything is given back."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from braid.keys import make_keys
from kvtransfer import wire
from kvtransfer.producer import Producer
from tests.kvtransfer.ends import BLOCK_BYTES, EPOCH, Pair, contents, make_key, same

MakePair = Callable[..., Pair]
KEY = make_key()
TRANSPORTS = [("shm", 1), ("zmq", 1), ("zmq", 3)]


@pytest.fixture(params=TRANSPORTS, ids=lambda value: f"{value[0]}{value[1]}")
def pair(make_pair: MakePair, request: pytest.FixtureRequest) -> Pair:
    name, lanes = request.param
    return make_pair(transports=[name], lanes=lanes, piece_bytes=BLOCK_BYTES)


def test_blocks_arrive_as_they_were_and_nothing_else_is_written(pair: Pair) -> None:
    before = contents(pair.d.cache)
    pair.p.open(KEY, 3)
    pair.p.events.expect(wire.Opened, KEY)
    pair.p.publish(KEY, 0, [5, 2, 9])
    pair.d.load(KEY, pair.endpoint, (4, 7, 1))
    loaded = pair.d.events.expect(wire.Loaded, KEY)
    assert (loaded.blocks, loaded.nbytes, loaded.retries) == (3, 3 * BLOCK_BYTES, 0)
    assert same(pair.p.cache, [5, 2, 9], pair.d.cache, [4, 7, 1])
    others = [b for b in range(pair.d.cache.blocks) if b not in (4, 7, 1)]
    assert torch.equal(contents(pair.d.cache)[:, others], before[:, others])
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"
    pair.p.settle()


def test_blocks_stream_to_a_consumer_that_came_before_the_lease(pair: Pair) -> None:
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.p.until(lambda: KEY in pair.p.end.table.early)
    pair.p.open(KEY, 3)
    for first, block in enumerate((4, 5)):
        pair.p.publish(KEY, first, [block])
        pair.d.until(lambda block=block, to=first + 1: same(pair.p.cache, [block], pair.d.cache, [to]))  # type: ignore[misc]
    assert not pair.d.events.count(wire.Loaded)
    pair.p.publish(KEY, 2, [6])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [4, 5, 6], pair.d.cache, [1, 2, 3])


def test_a_consumer_that_comes_amid_the_stream_gets_all_of_it(pair: Pair) -> None:
    pair.p.open(KEY, 3)
    pair.p.publish(KEY, 0, [4, 5])
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.d.until(lambda: same(pair.p.cache, [4, 5], pair.d.cache, [1, 2]))
    pair.p.publish(KEY, 2, [6])
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [4, 5, 6], pair.d.cache, [1, 2, 3])


@pytest.mark.stretched
@pytest.mark.parametrize(("name", "consumers", "pieces"), [("shm", 1, 3), ("shm", 2, 6), ("zmq", 1, 6)])
def test_pieces_are_larger_for_a_single_consumer_that_reads_staging(
    make_pair: MakePair, name: str, consumers: int, pieces: int
) -> None:
    pair = make_pair(transports=[name], piece_bytes=BLOCK_BYTES)
    ends = [pair.d, *(pair.consumer() for _ in range(consumers - 1))]
    pair.p.open(KEY, 6, subscribers=consumers)
    pair.p.publish(KEY, 0, [4])
    for d in ends:
        d.load(KEY, pair.endpoint, (1, 2, 3, 4, 5, 6))
    pair.p.until(lambda: len(pair.p.end.table.held[KEY].subscribers) == consumers)
    pair.p.publish(KEY, 1, [5, 6, 7, 8])
    lease = pair.p.end.table.held[KEY]
    pair.p.publish(KEY, 5, [9])
    for d in ends:
        d.events.expect(wire.Loaded, KEY)
        assert same(pair.p.cache, [4, 5, 6, 7, 8, 9], d.cache, [1, 2, 3, 4, 5, 6])
    assert len(lease.pieces[0]) == pieces


@pytest.mark.parametrize("have", [1, 2, 3])
def test_blocks_that_the_consumer_has_are_not_sent(pair: Pair, have: int) -> None:
    pair.p.open(KEY, 4)
    pair.p.publish(KEY, 0, [4, 5, 6])
    pair.p.publish(KEY, 3, [7])
    wanted = (1, 2, 3, 8)[have:]
    pair.d.load(KEY, pair.endpoint, wanted, first=have)
    assert pair.d.events.expect(wire.Loaded, KEY).nbytes == len(wanted) * BLOCK_BYTES
    assert same(pair.p.cache, [4, 5, 6, 7][have:], pair.d.cache, wanted)


@pytest.mark.parametrize("name", ["shm", "zmq"])
@pytest.mark.parametrize("have", [1, 2, 3])
def test_a_piece_is_cut_where_the_consumers_own_blocks_end(make_pair: MakePair, name: str, have: int) -> None:
    pair = make_pair(transports=[name], piece_bytes=4 * BLOCK_BYTES)
    pair.p.open(KEY, 4)
    pair.p.publish(KEY, 0, [4, 5, 6, 7])
    wanted = (1, 2, 3, 8)[have:]
    pair.d.load(KEY, pair.endpoint, wanted, first=have)
    assert pair.d.events.expect(wire.Loaded, KEY).nbytes == len(wanted) * BLOCK_BYTES
    assert same(pair.p.cache, [4, 5, 6, 7][have:], pair.d.cache, wanted)


@pytest.mark.parametrize("spans", [(), (wire.Span(0, 2, ()),)])
def test_a_consumer_that_has_every_block_only_checks_the_manifest(
    pair: Pair, spans: tuple[wire.Span, ...]
) -> None:
    pair.p.open(KEY, 2)
    pair.d.load(KEY, pair.endpoint, (), first=2, spans=spans)
    loaded = pair.d.events.expect(wire.Loaded, KEY)
    assert (loaded.nbytes, loaded.blocks) == (0, 0)
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_groups_have_their_own_blocks_and_order(make_pair: MakePair, name: str) -> None:
    pair = make_pair(transports=[name], groups=2, piece_bytes=BLOCK_BYTES)
    pair.p.open(KEY, 4, spans=(wire.Want(0, 0, 4), wire.Want(1, 2, 2)))
    pair.p.publish(KEY, 2, [3, 4], group=1)
    pair.p.publish(KEY, 0, [5, 6, 7, 8])
    spans = (wire.Span(0, 1, (1, 2, 3)), wire.Span(1, 2, (9, 10)))
    pair.d.load(KEY, pair.endpoint, (), tokens=16, spans=spans)
    assert pair.d.events.expect(wire.Loaded, KEY).blocks == 5
    assert same(pair.p.cache, [6, 7, 8], pair.d.cache, [1, 2, 3])
    assert same(pair.p.cache, [3, 4], pair.d.cache, [9, 10], group=1)


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_heads_of_two_producers_come_together_in_one_block(make_pair: MakePair, name: str) -> None:
    first, second = make_pair(transports=[name]), make_pair(transports=[name])
    for pair in (first, second):
        pair.p.open(KEY, 2)
        pair.p.publish(KEY, 0, [4, 5])
    sources = tuple(
        wire.Source(pair.endpoint, 7, rank, rank + 1, rank) for rank, pair in enumerate((first, second))
    )
    first.d.load(KEY, "", (1, 2), sources=sources)
    loaded = first.d.events.expect(wire.Loaded, KEY)
    assert (loaded.blocks, loaded.nbytes) == (2, 2 * BLOCK_BYTES)
    ours = first.d.cache.take([1, 2])
    assert torch.equal(ours[:, :, 0], first.p.cache.take([4, 5])[:, :, 0])
    assert torch.equal(ours[:, :, 1], second.p.cache.take([4, 5])[:, :, 1])
    for pair in (first, second):
        assert pair.p.events.expect(wire.Closed, KEY).reason == "done"


def test_two_consumers_share_one_staging(pair: Pair) -> None:
    other = pair.consumer()
    pair.p.open(KEY, 2, subscribers=2)
    pair.p.publish(KEY, 0, [4, 5])
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.d.events.expect(wire.Loaded, KEY)
    staged = pair.p.stats
    assert (staged.leases, staged.staging_bytes) == (1, 2 * BLOCK_BYTES)
    assert pair.p.events.count(wire.Closed) == 0, "the second has not come yet"
    other.load(KEY, pair.endpoint, (8, 9))
    other.events.expect(wire.Loaded, KEY)
    pair.p.events.expect(wire.Closed, KEY)
    assert same(pair.p.cache, [4, 5], other.cache, [8, 9])
    pair.p.settle()


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_sixteen_consumers_cost_one_gather_a_piece(make_pair: MakePair, name: str) -> None:
    pair = make_pair(transports=[name], piece_bytes=2 * BLOCK_BYTES)
    consumers = [pair.d, *(pair.consumer() for _ in range(15))]
    for early in consumers[:8]:
        early.load(KEY, pair.endpoint, (1, 2, 3, 4))
    pair.p.open(KEY, 4, subscribers=16)
    pair.p.publish(KEY, 0, [5, 6, 7, 8])
    for late in consumers[8:]:
        late.load(KEY, pair.endpoint, (1, 2, 3, 4))
    for consumer in consumers:
        consumer.events.expect(wire.Loaded, KEY)
        assert same(pair.p.cache, [5, 6, 7, 8], consumer.cache, [1, 2, 3, 4])
    assert next(pair.p.gathers) == 2
    assert pair.p.events.expect(wire.Closed, KEY).reason == "done"
    pair.p.settle()


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
    pair = make_pair(capacity=3 * 4096, row_bytes=2048)  # a block is two pages
    first, second, third = (make_key(n) for n in range(3))
    for key in (first, second, third):
        pair.p.open(key, 1)
    stats = pair.p.stats
    assert (stats.staging_bytes, stats.leases, stats.pending) == (8192, 1, 2)
    assert not pair.p.publish(second, 0, [1]), "it has no room yet"
    pair.p.call(lambda: pair.p.end.end(first, "cancelled"))
    pair.p.events.expect(wire.Opened, second)
    assert pair.p.events.of(wire.Opened, third) == []
    pair.p.call(lambda: pair.p.end.end(second, "cancelled"))
    pair.p.events.expect(wire.Opened, third)


def test_a_prompt_that_can_never_fit_is_refused(make_pair: MakePair) -> None:
    pair = make_pair(capacity=4096)
    pair.p.open(KEY, 9)
    assert "over the staging bound" in pair.p.events.expect(wire.Closed, KEY).reason
    pair.p.settle()


@pytest.mark.parametrize(
    "spans",
    [
        (wire.Want(1, 0, 1),),
        (wire.Want(-1, 0, 1),),
        (wire.Want(0, 0, -1),),
        (wire.Want(0, -1, 1),),
        (wire.Want(0, 0, 1), wire.Want(0, 2, 1)),
    ],
)
def test_a_lease_of_blocks_that_can_not_be_is_refused(
    make_pair: MakePair, spans: tuple[wire.Want, ...]
) -> None:
    pair = make_pair()
    pair.p.open(KEY, 1, spans=spans)
    pair.p.events.expect(wire.Closed, KEY)
    pair.p.settle()


def test_closing_a_lease_twice_ends_it_once(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    for _ in range(2):
        pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    assert pair.p.events.count(wire.Closed) == 1


def test_a_piece_that_comes_after_the_lease_is_dropped(pair: Pair) -> None:
    pair.p.open(KEY, 2)
    pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
    assert not pair.p.publish(KEY, 0, [1, 2])
    assert next(pair.p.gathers) == 0
    pair.p.settle()


def test_a_piece_of_a_lease_before_is_not_the_next_ones(pair: Pair) -> None:
    """The key is opened again while a piece of its first lease is on its way to the loop."""

    def fill(run: range, out: torch.Tensor) -> None:
        pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
        pair.p.open(KEY, 1)
        pair.p.cache.gather(0, [9], out)

    pair.p.open(KEY, 1)
    assert pair.p.end.stage(KEY, 0, 0, 1, fill)
    pair.p.publish(KEY, 0, [4])
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [4], pair.d.cache, [1])


def test_memory_that_is_being_filled_is_not_given_away(pair: Pair) -> None:
    def fill(run: range, out: torch.Tensor) -> None:
        pair.p.call(lambda: pair.p.end.end(KEY, "cancelled"))
        assert pair.p.stats.staging_bytes == BLOCK_BYTES
        pair.p.cache.gather(0, [1], out)

    pair.p.open(KEY, 1)
    assert pair.p.end.stage(KEY, 0, 0, 1, fill)
    pair.p.settle()


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (2, 1), (0, 3)])
def test_blocks_that_the_lease_lacks_can_not_be_staged(pair: Pair, first: int, count: int) -> None:
    pair.p.open(KEY, 2)
    with pytest.raises(ValueError, match="not in the lease"):
        pair.p.end.stage(KEY, 0, first, count, lambda run, out: None)
    assert pair.p.events.expect(wire.Closed, KEY).reason == "copy_failed"
    pair.p.settle()


@pytest.mark.parametrize("again", [(0, 1), (0, 2), (2, 1)])
def test_blocks_are_staged_once_and_in_order(pair: Pair, again: tuple[int, int]) -> None:
    """Staged twice they overwrote what a consumer read; after a gap the load waited for its deadline."""
    pair.p.open(KEY, 3)
    pair.p.publish(KEY, 0, [1])
    written = []
    with pytest.raises(ValueError, match="does not follow"):
        pair.p.end.stage(KEY, 0, *again, lambda run, out: written.append(run))
    assert not written
    assert pair.p.events.expect(wire.Closed, KEY).reason == "copy_failed"
    pair.p.settle()


def test_a_block_that_no_payload_may_hold_is_refused_at_the_start() -> None:
    """A consumer's socket took it for an attack, and every transfer ended as disconnected."""
    unused: Any = None
    with pytest.raises(ValueError, match="smaller block size"):
        Producer(
            unused,
            unused,
            bind="tcp://127.0.0.1:*",
            epoch=EPOCH,
            shapes=(wire.Shape(2, 1, wire.MAX_PAYLOAD // 2 + 1),),
            arena=unused,
            lease_s=1.0,
            emit=unused,
            transports=unused,
            piece_bytes=1,
            digests=unused,
        )


def test_one_producer_by_two_names_serves_both(make_pair: MakePair) -> None:
    """Each name's session made the other's void, until their loads had been resumed too often."""
    pair, other = make_pair(), make_key(2)
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.load(other, pair.endpoint.replace("127.0.0.1", "localhost"), (2,))
    pair.p.until(lambda: pair.p.end.table.early_subscribers == 2)
    for key, block in ((KEY, 5), (other, 6)):
        pair.p.open(key, 1)
        pair.p.publish(key, 0, [block])
    assert [pair.d.events.expect(wire.Loaded, key).retries for key in (KEY, other)] == [0, 0]
    assert same(pair.p.cache, [5, 6], pair.d.cache, [1, 2])


def test_a_copy_that_raises_ends_its_lease_and_who_waits_is_told(pair: Pair) -> None:
    """What followed had a gap before it, and consumers waited for it to their deadline."""

    def fill(run: range, out: torch.Tensor) -> None:
        raise MemoryError("no room for the copy")

    pair.p.open(KEY, 3)
    pair.p.publish(KEY, 0, [1])
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.p.until(lambda: bool(pair.p.end.table.held[KEY].subscribers))
    with pytest.raises(MemoryError):
        pair.p.end.stage(KEY, 0, 1, 1, fill)
    assert pair.d.events.expect(wire.Failed, KEY).reason == "copy_failed"
    assert pair.p.events.expect(wire.Closed, KEY).reason == "copy_failed"
    assert not pair.p.publish(KEY, 2, [3])
    pair.p.settle()


@pytest.mark.stretched
@pytest.mark.parametrize(("name", "lanes"), TRANSPORTS)
@pytest.mark.parametrize(("first", "count"), [(0, 3), (2, 3), (5, 3), (3, 1)])
def test_a_load_of_some_blocks_takes_those_out_of_the_pieces_they_are_in(
    make_pair: MakePair, name: str, lanes: int, first: int, count: int
) -> None:
    """One that did not want a piece's last blocks was refused; a resumed load may not."""
    pair = make_pair(transports=[name], lanes=lanes, piece_bytes=4 * BLOCK_BYTES)
    pair.p.open(KEY, 8)
    pair.p.publish(KEY, 0, [1, 2, 3, 4, 5, 6, 7, 8])
    ours = tuple(range(1, 1 + count))
    pair.d.load(KEY, pair.endpoint, ours, first=first, tokens=32)
    assert pair.d.events.expect(wire.Loaded, KEY).nbytes == count * BLOCK_BYTES
    theirs = list(range(1 + first, 1 + first + count))
    assert same(pair.p.cache, theirs, pair.d.cache, list(ours))
    assert not contents(pair.d.cache)[:, count + 1 :].any()


def test_a_lease_that_nobody_fetches_expires(make_pair: MakePair) -> None:
    pair = make_pair(lease_s=0.1)
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    assert pair.p.events.expect(wire.Closed, KEY).reason == "expired"
    pair.p.settle()


def test_a_subscriber_within_the_lease_is_served_however_late(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    clock = [pair.p.end.table._clock()]
    pair.p.end.table._clock = lambda: clock[0]
    clock[0] += pair.p.end.table.lease_s - 1
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.events.expect(wire.Loaded, KEY)


def test_a_transfer_needs_the_clusters_keys(make_pair: MakePair, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        make_keys(folder)
    pair = make_pair(keys_dir=ours)
    stranger, naked = pair.consumer(keys_dir=theirs), pair.consumer(keys_dir=None)
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    for outsider in (stranger, naked):
        outsider.load(KEY, pair.endpoint, (1,), deadline_s=0.5)
    for outsider in (stranger, naked):
        assert outsider.events.expect(wire.Failed, KEY).reason == "timeout"
        assert not contents(outsider.cache).any()
    pair.d.load(KEY, pair.endpoint, (1,))
    pair.d.events.expect(wire.Loaded, KEY)
    assert same(pair.p.cache, [1], pair.d.cache, [1])


def test_an_idle_connection_is_closed_and_opened_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        key = make_key(number)
        pair.p.open(key, 1)
        pair.p.publish(key, 0, [number])
        pair.d.load(key, pair.endpoint, (number,))
        pair.d.events.expect(wire.Loaded, key)
        monkeypatch.setattr("kvtransfer.consumer.IDLE_S", 0.0)
        pair.d.until(lambda: not pair.d.end._peers)
    assert same(pair.p.cache, [1, 2], pair.d.cache, [1, 2])


def test_a_consumer_that_has_left_is_forgotten(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.producer.IDLE_S", 0.0)
    leaver = pair.consumer()
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [1])
    leaver.load(KEY, pair.endpoint, (1,))
    leaver.events.expect(wire.Loaded, KEY)
    assert len(pair.p.end._sessions) == 1
    leaver.stop()
    pair.p.until(lambda: not pair.p.end._sessions)


def test_no_descriptor_is_left_behind() -> None:
    def once() -> None:
        pair = Pair(lanes=2)
        other = pair.consumer(transports=["zmq"])
        pair.p.open(KEY, 1, subscribers=2)
        pair.p.publish(KEY, 0, [1])
        for consumer in (pair.d, other):
            consumer.load(KEY, pair.endpoint, (1,))
            consumer.events.expect(wire.Loaded, KEY)
        pair.close()

    open_after = []
    for _ in range(4):
        once()
        gc.collect()  # a mapping ends with its last view
        open_after.append(len(os.listdir("/proc/self/fd")))
    assert any(after <= before for before, after in pairwise(open_after)), "each transfer leaves some open"


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_staging_that_a_burst_used_goes_back_to_the_kernel(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A worker's staging kept the most it ever held; what comes after is whole all the same."""
    monkeypatch.setattr("kvtransfer.producer.GIVE_BACK_S", 0.0)
    pair = make_pair(transports=[name], row_bytes=1 << 16, capacity=1 << 23)

    def staged() -> int:
        return os.fstat(pair.p.arena.ref.fd).st_blocks * 512

    for number in (1, 2):
        key = make_key(number)
        pair.p.open(key, 11)
        pair.p.publish(key, 0, list(range(1, 12)))
        assert staged() > 2 << 20
        pair.d.load(key, pair.endpoint, tuple(range(1, 12)))
        pair.d.events.expect(wire.Loaded, key)
        assert same(pair.p.cache, list(range(1, 12)), pair.d.cache, list(range(1, 12)))
        pair.p.settle()
        pair.p.until(lambda: staged() < 1 << 18)
        for layer in pair.d.cache.tensors[0]:
            layer.zero_()


def test_staging_that_the_kernel_does_not_take_stays(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.producer.GIVE_BACK_S", 0.0)
    pair = make_pair(capacity=1 << 20)
    tried = []

    def refuse(most: int) -> int:
        tried.append(most)
        raise OSError("locked")

    monkeypatch.setattr(pair.p.arena, "give_back", refuse)
    pair.p.until(lambda: pair.p.arena._held)
    assert tried
