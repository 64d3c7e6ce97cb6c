"""The consumer's receive buffers under NIXL, with an agent whose reads end when the test says so."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvtransfer import wire
from kvtransfer.loop import Loop
from kvtransfer.transport import ConsumerSide, nixl
from kvtransfer.transport.nixl import NixlConsumer, NixlReceiver, Terms, runs_of

LARGE = 16 << 20
"""A quarter of the pool."""
SHAPE = wire.Shape(1, 1, LARGE)


class ScriptedAgent:
    """``standing``: reads that do not end."""

    def __init__(self, memory: memoryview) -> None:
        self.base, self.metadata = 0, b"m"
        self.standing: set[object] = set()
        self.released: list[object] = []
        self.stands = True

    def check(self) -> None: ...
    def add(self, metadata: bytes) -> str:
        return "p"

    def remove(self, name: str) -> None: ...
    def read(self, *read: Any) -> object:
        handle = object()
        if self.stands:
            self.standing.add(handle)
        return handle

    def state(self, handle: object) -> str:
        return "PROC" if handle in self.standing else "DONE"

    def release(self, handle: object) -> None:
        self.released.append(handle)

    def notify(self, peer: str, tag: bytes) -> None: ...
    def notifications(self) -> list[bytes]:
        return []

    def close(self) -> None: ...


class Session:
    """One read of :data:`LARGE` bytes."""

    def __init__(self, consumer: NixlConsumer, number: int) -> None:
        self.delivered: list[wire.Blocks] = []
        self.broken: list[str] = []
        terms = msgspec.msgpack.encode(Terms(b"m", 0, 1 << 30))
        welcome = wire.Welcome(number, "nixl", terms)
        self.receiver: NixlReceiver = consumer.open(
            welcome, "tcp://p", lambda message, rows: self.delivered.append(message), self.broken.append
        )
        self.receiver.receive(wire.Blocks(1, 0, 0, 1, LARGE, of=1, heads=1), SHAPE, (0, 1), [])
        consumer._poll()


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> NixlConsumer:
    monkeypatch.setattr(nixl, "Agent", ScriptedAgent)
    monkeypatch.setattr(nixl, "GRACE_S", -1.0)
    monkeypatch.setattr(nixl, "STUCK_S", 0.0)
    return NixlConsumer(ConsumerSide(Loop("unused"), lambda _: b"c" * 16, None, None))  # type: ignore[arg-type]


def test_buffers_of_reads_that_were_given_up_come_back_when_these_end(consumer: NixlConsumer) -> None:
    """They were lost for good: after four standing peers every load waited to its deadline."""
    agent: Any = consumer.agent
    for number in range(4):
        session = Session(consumer, number)
        session.receiver.close()
        consumer._poll()
    assert (len(consumer.stuck), len(consumer.transfers), consumer.pool.lent) == (4, 0, 4 * LARGE)
    starved = Session(consumer, 5)
    assert starved.broken == ["nixl: reads of peers that stand still hold all buffers"]
    agent.standing.clear()
    agent.stands = False
    consumer._poll()
    del session
    assert (len(consumer.stuck), len(agent.released)) == (0, 4)
    served = Session(consumer, 6)
    assert (len(served.delivered), served.broken) == (1, [])


@pytest.mark.parametrize("at", [2**62, 2**63 + 5])
@pytest.mark.parametrize("heads", [(0, 1), (0, 2)])
def test_an_offset_that_is_no_address_is_refused(at: int, heads: tuple[int, int]) -> None:
    nbytes = 128 * (heads[1] - heads[0])
    with pytest.raises(wire.KvWireError, match="not in the staging"):
        runs_of(
            2**64 - 1, wire.Blocks(1, 0, 0, 1, nbytes, at=at, of=1, heads=2), wire.Shape(1, 2, 128), heads
        )
