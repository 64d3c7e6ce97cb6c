"""Payloads through the producer's own memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvtransfer import arena, wire
from kvtransfer.arena import Arena, ArenaRef, open_arena
from kvtransfer.transport.shm import Process, ShmConsumer
from tests.kvtransfer.ends import EPOCH, ConsumerEnd, Pair, contents, make_key, same
from tests.kvtransfer.raw import ONE_LANE, SHAPES, RawProducer
from tests.kvtransfer.transport.contract import InOneProcess, InTwoProcesses
from tests.kvtransfer.transport.peer import Peer, consumer

KEY = make_key()
NAMES = ("shm", "zmq")


class TestInOneProcess(InOneProcess):
    names = NAMES


class TestInTwoProcesses(InTwoProcesses):
    names = NAMES


@pytest.fixture
def raw() -> Iterator[RawProducer]:
    raw = RawProducer()
    yield raw
    raw.close()


@pytest.fixture
def d() -> Iterator[ConsumerEnd]:
    d = ConsumerEnd(transports=NAMES)
    yield d
    d.close()


@pytest.fixture
def memory() -> Iterator[Arena]:
    memory = Arena(1 << 16)
    yield memory
    memory.close()


def _other(**changes: object) -> Callable[[ArenaRef], ArenaRef]:
    return lambda ref: msgspec.structs.replace(ref, **changes)


WRONG = {
    "nonce": _other(nonce=b"another's number"),
    "process": _other(pid=1),
    "no process": _other(pid=2**30),
    "no process at all": _other(pid=-1),
    "size": lambda ref: msgspec.structs.replace(ref, nbytes=ref.nbytes + 4096),
    "no size": _other(nbytes=0),
    "file": _other(fd=0),
    "no file": _other(fd=2**20),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_another_arena_than_was_announced_is_not_opened(
    memory: Arena, wrong: Callable[[ArenaRef], ArenaRef]
) -> None:
    assert open_arena(memory.ref)[:16] == memory.ref.nonce
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):  # noqa: PT011 -- each has another message
        open_arena(wrong(memory.ref))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_peers_arena_can_not_be_written(memory: Arena) -> None:
    mapped = open_arena(memory.ref)
    assert mapped.readonly


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_without_the_arena_the_consumer_greets_again_without_shm(
    d: ConsumerEnd, raw: RawProducer, memory: Arena, wrong: Callable[[ArenaRef], ArenaRef]
) -> None:
    d.load(KEY, raw.endpoint, (1, 2))
    hello = raw.welcome("shm", msgspec.msgpack.encode(wrong(memory.ref)))
    assert [name for name, _ in hello.offers] == ["shm", "zmq"]
    again = raw.expect(wire.Hello)
    assert [name for name, _ in again.offers] == ["zmq"]
    assert again.session > hello.session
    raw.say(wire.Welcome(again.session, "zmq", ONE_LANE))
    raw.expect(wire.Subscribe)
    d.unload(KEY)


def test_a_load_goes_by_zmq_where_the_arena_can_not_be_opened(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ref: ArenaRef) -> memoryview:
        raise PermissionError("another user's")

    monkeypatch.setattr("kvtransfer.transport.shm.open_arena", refuse)
    pair = make_pair(transports=NAMES)
    pair.d.load(KEY, pair.endpoint, (1, 2, 3))
    pair.p.open(KEY, 3)
    pair.p.publish(KEY, 0, [4, 5, 6])
    loaded = pair.d.events.expect(wire.Loaded, KEY)
    assert (loaded.transport, loaded.retries) == ("zmq", 0)
    assert same(pair.p.cache, [4, 5, 6], pair.d.cache, [1, 2, 3])


@pytest.mark.parametrize(
    "changes",
    [
        {"at": -4096},
        {"at": 1 << 17},
        {"at": 2**62},
        {"at": (1 << 16) + arena.ALIGN - 2 * SHAPES[0].block_bytes + 1},
        {"skip": 2**40, "at": 0},
        {"skip": -1},
        {"skip": 1},
        {"of": 1},
        {"of": 2**40},
        {"heads": 1},
        {"heads": 0},
        {"nbytes": 0},
        {"nbytes": -2 * SHAPES[0].block_bytes},
        {"nbytes": 2**64 - 1},
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_the_arena_end_the_load_and_write_nothing(
    d: ConsumerEnd, raw: RawProducer, memory: Arena, changes: dict[str, int]
) -> None:
    before = contents(d.cache)
    d.load(KEY, raw.endpoint, (1, 2))
    raw.welcome("shm", msgspec.msgpack.encode(memory.ref))
    sub = raw.expect(wire.Subscribe).sub
    raw.say(wire.Manifest(sub, EPOCH, 8, b"chain", "fp", SHAPES))
    honest = wire.Blocks(sub, 0, 0, 2, 2 * SHAPES[0].block_bytes, at=4096, of=2, heads=SHAPES[0].heads)
    raw.say(msgspec.structs.replace(honest, **changes))
    assert d.events.expect(wire.Failed, KEY).reason == "wrong_length"
    assert (contents(d.cache) == before).all()


def test_the_memory_of_a_killed_producer_goes_with_its_process() -> None:
    """It has no name that could be left behind, and a consumer that mapped it lets go of it and lives on:
    a decode worker kept all staging of each prefill worker that it had outlived."""
    named = _named()
    far, d = Peer("producer", list(NAMES)), consumer(list(NAMES))
    try:
        (inode,) = {fd.stat().st_ino for fd in _descriptors(far.pid)}
        d.load(KEY, far.endpoint, (1, 2, 3))
        far.call("open", 1, 3)
        far.call("publish", 1, 0, [1, 2, 3])
        assert d.events.expect(wire.Loaded, KEY).transport == "shm"
        assert inode in _mapped()
    finally:
        far.signal(signal.SIGKILL)
        far.close()
        try:
            d.until(lambda: inode not in _mapped())
        finally:
            d.close()
    assert _named() == named


def test_a_session_that_has_ended_maps_nothing() -> None:
    transport, memory = ShmConsumer(), Arena(4096)
    before = _mapped()
    welcome = wire.Welcome(1, "shm", msgspec.msgpack.encode(memory.ref))
    for _ in range(3):
        receiver = transport.open(welcome, "tcp://p", lambda message, rows: None, lambda reason: None)
        assert len(_mapped()) == len(before) + 1
        receiver.close()
        assert _mapped() == before
    memory.close()


def test_a_process_is_watched_whatever_the_number_of_its_descriptor() -> None:
    """`select` takes none over 1023: a producer with many connections began no session any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with subprocess.Popen(["sleep", "60"]) as child:
            process = Process(child.pid)
            assert process.alive
            child.kill()
            child.wait()
            assert not process.alive
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _descriptors(pid: int) -> list[Path]:
    """Those of arenas that a process holds."""
    return [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "memfd:braid-kv" in os.readlink(fd)]


def _named() -> set[str]:
    """Shared memory of ours that has a name; others may make and remove theirs meanwhile."""
    return {name for name in os.listdir("/dev/shm") if "braid" in name}


def _mapped() -> list[int]:
    """Inodes of the arenas this process maps, one a mapping."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(int(line.split()[4]) for line in lines if "memfd:braid-kv" in line)
