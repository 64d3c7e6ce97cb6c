"""Payloads by NIXL; run only where the package is installed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from kvtransfer import wire
from kvtransfer.transport import Unavailable
from kvtransfer.transport import nixl as transport
from kvtransfer.transport.nixl import Agent, NixlConsumer, NixlProducer, runs_of
from tests.kvtransfer.ends import BLOCK_BYTES, ConsumerEnd, Pair, ProducerEnd, make_key, same
from tests.kvtransfer.transport.contract import InOneProcess, InTwoProcesses
from tests.system.processes import cpu_seconds

KEY = make_key()
NAMES = ("nixl", "zmq")
LINKS = ("tcp,self", "sm,self", "tcp,cma,self")
T = TypeVar("T")


def needs_nixl(test: T) -> T:
    """Run over each kind of link, where there is NIXL."""
    for mark in (
        pytest.mark.skipif(find_spec("nixl") is None, reason="the package nixl is not installed"),
        pytest.mark.usefixtures("links"),
    ):
        mark(test)  # type: ignore[arg-type, call-overload]
    return test


@pytest.fixture(params=LINKS)
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX may use; of loopback."""
    monkeypatch.setenv("UCX_TLS", request.param)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return str(request.param)


@needs_nixl
class TestInOneProcess(InOneProcess):
    names = NAMES


@needs_nixl
class TestInTwoProcesses(InTwoProcesses):
    names = NAMES
    close_s = transport.GRACE_S + 2.0  # a read can't be stopped, only waited for


def busy(end: ProducerEnd | ConsumerEnd) -> bool:
    return end.call(lambda: end.loop._busy)


@needs_nixl
def test_ends_without_transfers_use_no_processor(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(transports=NAMES, piece_bytes=BLOCK_BYTES)
    pair.p.open(KEY, 8)
    pair.d.load(KEY, pair.endpoint, tuple(range(1, 9)))
    pair.p.publish(KEY, 0, [1, 2, 3])
    pair.d.until(lambda: same(pair.p.cache, [1, 2, 3], pair.d.cache, [1, 2, 3]))
    for end in (pair.p, pair.d):  # a load in flight for which nothing comes is idle, too
        give_up = time.monotonic() + 5
        while busy(end):
            assert time.monotonic() < give_up
            time.sleep(0.01)
    before = cpu_seconds(os.getpid())
    time.sleep(1.0)  # it is what is used meanwhile that is looked at
    assert cpu_seconds(os.getpid()) - before <= 0.05
    pair.p.publish(KEY, 3, [4, 5, 6, 7, 8])
    assert pair.d.events.expect(wire.Loaded, KEY).transport == "nixl"


@needs_nixl
def test_the_producer_is_told_of_parcels_that_nobody_wants(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(transports=NAMES, piece_bytes=BLOCK_BYTES)
    for number in range(1, 21):
        key = make_key(number)
        pair.p.open(key, 10)
        pair.d.load(key, pair.endpoint, tuple(range(1, 11)))
        pair.p.events.expect(wire.Opened, key)
        pair.p.publish(key, 0, list(range(1, 10)))
        pair.d.unload(key)
        pair.d.events.expect(wire.Failed, key)
    nixl = pair.p.end._transports["nixl"]
    assert isinstance(nixl, NixlProducer)
    pair.p.until(lambda: all(sender.unread == 0 for sender in nixl._senders.values()))


@needs_nixl
def test_buffers_of_a_session_that_ended_come_back_with_its_reads(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(transports=NAMES, piece_bytes=BLOCK_BYTES)
    nixl = pair.d.end._transports["nixl"]
    assert isinstance(nixl, NixlConsumer)
    pair.p.open(KEY, 10)
    pair.d.load(KEY, pair.endpoint, tuple(range(1, 11)))
    pair.p.events.expect(wire.Opened, KEY)

    ended: list[bool] = []

    def end_session() -> bool:
        """As soon as something is being read."""
        if nixl.transfers and not ended:
            ended.append(True)
            pair.d.end._greet(next(iter(pair.d.end._peers.values())))
        return False

    pair.d.loop.every_turn(end_session)
    pair.p.publish(KEY, 0, list(range(1, 11)))
    assert pair.d.events.expect(wire.Loaded, KEY).retries == len(ended)
    pair.d.until(lambda: not nixl.transfers and nixl.pool.lent == 0)
    assert same(pair.p.cache, range(1, 11), pair.d.cache, range(1, 11))


def test_without_the_package_a_load_goes_another_way(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'nixl'")

    monkeypatch.setattr(transport, "_make_agent", missing)
    with pytest.raises(Unavailable, match="pip install nixl"):
        Agent(memoryview(bytearray(8))).check()
    pair = make_pair(transports=NAMES)
    pair.p.open(KEY, 2)
    pair.d.load(KEY, pair.endpoint, (1, 2))
    pair.p.publish(KEY, 0, [4, 5])
    assert pair.d.events.expect(wire.Loaded, KEY).transport == "zmq"
    pair.p.settle()
    for _ in range(2):
        pair.p.call(pair.p.arena.age)
    assert pair.p.call(lambda: pair.p.arena.give_back(1 << 30)) > 0, "only registered pages are held"


SHAPE = wire.Shape(3, 4, 8)


@pytest.mark.parametrize("heads", [(0, 4), (1, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_runs_are_the_rows_in_their_order(skip: int, heads: tuple[int, int]) -> None:
    memory = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    at, blocks = 100, 5
    count, width = blocks - skip, heads[1] - heads[0]
    rows = memory[at : at + 3 * blocks * 4 * 8].view(3, blocks, 4, 8)[:, skip:, heads[0] : heads[1]]
    message = wire.Blocks(
        1, 0, skip, count, 3 * count * width * 8, at=at, skip=skip, of=skip + count, heads=4
    )
    runs = runs_of(len(memory), message, SHAPE, heads)
    found = np.concatenate([memory.numpy()[a : a + runs.nbytes] for a in runs.at])
    assert np.array_equal(found, rows.contiguous().view(-1).numpy())
    if width == 4:
        assert len(runs.at) == (1 if skip == 0 else 3), "as few as can be"


@pytest.mark.parametrize(
    "changes",
    [
        {"at": -1},
        {"at": 4900},
        {"at": 2**62},
        {"skip": -1},
        {"skip": 2**40},
        {"heads": 3},
        {"count": 0},
        {"nbytes": 95},
        {"nbytes": 0},
    ],
    ids=str,
)
def test_runs_outside_of_staging_are_refused(changes: dict[str, int]) -> None:
    fields = {"count": 2, "nbytes": 2 * SHAPE.block_bytes, "at": 0, "heads": 4} | changes
    with pytest.raises(wire.KvWireError):
        runs_of(5000, wire.Blocks(1, 0, 0, **fields), SHAPE, (0, 4))
