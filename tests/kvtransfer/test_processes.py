"""Ends in processes that are killed, stopped and continued amid a transfer, and what they listen on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvtransfer import wire
from tests.kvtransfer.ends import DEADLINE_S, ConsumerEnd, ProducerEnd, contents, make_cache, make_key, same
from tests.kvtransfer.remote import Remote

pytestmark = pytest.mark.slow

KEY, OTHER = make_key(), make_key(2)
THEIRS, OURS = (5, 6, 7, 8), (1, 2, 3, 4)
BLOCK_BYTES = 512
MakeRemote = Callable[..., Remote]


@pytest.fixture
def make_remote() -> Iterator[MakeRemote]:
    remotes: list[Remote] = []

    def make(role: str, **options: object) -> Remote:
        remotes.append(Remote(role, **options))  # type: ignore[arg-type]
        return remotes[-1]

    yield make
    for remote in remotes:
        remote.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed within a second."""
    monkeypatch.setattr("kvtransfer.sockets.HEARTBEAT_S", 0.2)
    monkeypatch.setattr("kvtransfer.sockets.SILENT_S", 0.6)


def half_loaded(remote: Remote, d: ConsumerEnd, deadline_s: float) -> None:
    """Two of four blocks have come."""
    remote.open(KEY, 4)
    d.load(KEY, remote.endpoint, OURS, deadline_s=deadline_s)
    remote.stage(KEY, 0, THEIRS[:2])
    source = make_cache(fill=True)
    d.until(lambda: same(source, THEIRS[:2], d.cache, OURS[:2]))


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_killed_producer_fails_the_load_at_once_with_what_came(
    make_remote: MakeRemote, transport: str
) -> None:
    remote, d = make_remote("producer", transports=(transport,)), ConsumerEnd()
    half_loaded(remote, d, deadline_s=DEADLINE_S)
    remote.kill()
    killed = time.monotonic()
    assert d.events.expect(wire.Failed, KEY).reason == "disconnected"
    assert time.monotonic() - killed < 1.5
    assert same(make_cache(fill=True), THEIRS[:2], d.cache, OURS[:2])
    assert not contents(d.cache)[:, list(OURS[2:])].any()
    assert d.call(d.end.stats) == wire.Stats()
    d.close()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_what_a_stopped_producer_sends_after_the_deadline_is_not_written(
    make_remote: MakeRemote, transport: str
) -> None:
    remote, d = make_remote("producer", transports=(transport,), silent_s=30.0), ConsumerEnd()
    half_loaded(remote, d, deadline_s=1.0)
    remote.stop()
    remote.stage(KEY, 2, THEIRS[2:])  # it will find this when it goes on
    d.events.expect(wire.Failed, KEY)
    remote.go_on()
    remote.open(OTHER, 1)
    remote.stage(OTHER, 0, (9,))
    d.load(OTHER, remote.endpoint, (7,))
    d.events.expect(wire.Loaded, OTHER)
    assert not contents(d.cache)[:, list(OURS[2:])].any()
    assert len(d.events.of(wire.Failed, KEY)) == 1
    d.close()


def test_a_killed_consumer_leaves_nothing_at_the_producer(make_remote: MakeRemote) -> None:
    p, remote = ProducerEnd(transports=["zmq"]), make_remote("consumer", transports=("zmq",))
    p.open(KEY, 4)
    remote.load(KEY, p.end.endpoint, OURS, deadline_s=DEADLINE_S)
    p.until(lambda: bool(p.end.table.held[KEY].subscribers))
    remote.kill()
    p.publish(KEY, 0, list(THEIRS))
    p.until(lambda: not p.end.table.held[KEY].subscribers)
    p.call(lambda: p.end.end(KEY, "cancelled"))
    p.settle()
    p.close()


def overwrite(p: ProducerEnd) -> None:
    """Another prompt's bytes where the first lease lay."""
    p.open(OTHER, 4)
    (at,) = {lease.at for lease in p.end.table.held.values()}
    p.publish(OTHER, 0, [9, 10, 11, 9])
    assert at == 4096, "the lowest place is the one that was free"


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0, 3], ids=["between blocks", "amid a copy"])
def test_a_stopped_consumer_reads_no_memory_that_has_another_owner(
    make_remote: MakeRemote, stop_at: int
) -> None:
    """Over shared memory: the producer keeps a lease's bytes until the deadline of who may read them."""
    p = ProducerEnd(transports=["shm"], piece_bytes=BLOCK_BYTES, check="off")
    remote = make_remote("consumer", transports=("shm",), silent_s=0.6, stop_at=stop_at)
    p.open(KEY, 4)
    began = time.monotonic()
    remote.load(KEY, p.end.endpoint, OURS, deadline_s=5.0)
    p.publish(KEY, 0, list(THEIRS[:2]))
    p.until(lambda: any(s.fed for s in p.end.table.held[KEY].subscribers.values()))
    give_up = time.monotonic() + DEADLINE_S
    while not torch.equal(remote.look(OURS[:2]), p.cache.take(THEIRS[:2])):
        assert time.monotonic() < give_up
    if not stop_at:
        remote.stop()
    p.publish(KEY, 2, list(THEIRS[2:]))
    remote.wait_stopped()
    p.call(lambda: p.end.end(KEY, "cancelled"))
    p.until(lambda: not p.end._sessions)  # its silence has been noticed
    assert time.monotonic() - began < 4.5
    assert p.stats.staging_bytes == 4 * BLOCK_BYTES
    p.until(lambda: p.end.stats().staging_bytes == 0)
    assert time.monotonic() - began > 4.9
    overwrite(p)
    remote.go_on()
    assert remote.events.expect(wire.Failed, KEY).reason in ("timeout", "cancelled", "disconnected")
    assert remote.events.of(wire.Loaded, KEY) == []
    if not stop_at:
        assert not remote.look(OURS[2:]).any()
    p.call(lambda: p.end.end(OTHER, "cancelled"))
    p.settle()
    p.close()


def test_a_producer_listens_on_one_loopback_port_and_a_consumer_on_none(make_remote: MakeRemote) -> None:
    producer, consumer = make_remote("producer"), make_remote("consumer")
    producer.open(KEY, 4)
    producer.stage(KEY, 0, THEIRS)
    consumer.load(KEY, producer.endpoint, OURS, deadline_s=DEADLINE_S)
    consumer.events.expect(wire.Loaded, KEY)
    port = int(producer.endpoint.rpartition(":")[2])
    assert listening(producer.pid) == {("127.0.0.1", port)}
    assert listening(consumer.pid) == set()


def listening(pid: int) -> set[tuple[str, int]]:
    """TCP addresses on which a process listens (Linux)."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                octets = reversed(bytes.fromhex(address))
                found.add((".".join(map(str, octets)), int(port, 16)))
    return found
