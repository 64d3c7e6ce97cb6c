"""Payloads through process groups of torch.distributed (Gloo)."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from kvtransfer import wire
from kvtransfer.loop import Loop
from kvtransfer.transport import Unavailable
from kvtransfer.transport.collective import Terms
from kvtransfer.transport.group import Gloo, Session, backend_of
from tests.kvtransfer.ends import DEADLINE_S, ConsumerEnd, Pair, make_key, same
from tests.kvtransfer.raw import RawProducer
from tests.kvtransfer.transport.contract import InOneProcess, InTwoProcesses

NAMES = ("collective", "zmq")
KEY = make_key()
TERMS = msgspec.msgpack.encode(Terms("gloo", torch.__version__.split("+")[0]))


def collective_threads() -> list[str]:
    """Names of threads of sessions, and of Gloo's own."""
    tasks = [Path("/proc/self/task", task, "comm") for task in os.listdir("/proc/self/task")]
    native = [task.read_text().strip() for task in tasks if task.exists()]
    ours = [thread.name for thread in threading.enumerate() if "collective" in thread.name]
    return [name for name in native if "gloo" in name] + ours


class TestInOneProcess(InOneProcess):
    names = NAMES


class TestInTwoProcesses(InTwoProcesses):
    names = NAMES

    def left(self) -> list[str]:
        return collective_threads()


class Halves:
    """Two sessions on one loop, whose rendezvous the test may hold back."""

    def __init__(self) -> None:
        self.loop = Loop("test-collective")
        self.failed: list[str] = []
        self.changed = threading.Condition()
        self.sessions: list[Session] = []
        self.loop.start()

    def start(self, *, meet: bool = True) -> None:
        begun = threading.Event()

        def begin() -> None:  # on the loop: nothing is told before both are there
            for rank in (0, 1):
                say = self._say(1 - rank) if meet else lambda name, value: None
                self.sessions.append(Session(self.loop, Gloo("127.0.0.1"), rank, say, self._fail))
            begun.set()

        self.loop.call_soon(begin)
        assert begun.wait(DEADLINE_S)

    def _say(self, to: int) -> Callable[[str, bytes], None]:
        return lambda name, value: self.loop.call_soon(lambda: self.sessions[to].told(name, value))

    def _fail(self, reason: str) -> None:
        with self.changed:
            self.failed.append(reason)
            self.changed.notify_all()

    def expect_failures(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.failed) == count, DEADLINE_S), self.failed

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        for session in self.sessions:
            session.join()
        self.loop.stop()


@pytest.fixture
def halves() -> Iterator[Halves]:
    halves = Halves()
    yield halves
    halves.close()
    assert not [t for t in threading.enumerate() if "collective" in t.name]


class _Job:
    """Sends or receives one tensor."""

    nbytes = 1000

    def __init__(self, post: Callable[..., object]) -> None:
        self.post = post
        self.complete = threading.Event()

    def done(self) -> None:
        self.complete.set()


def test_jobs_put_before_the_halves_meet_are_done_in_order(halves: Halves) -> None:
    gloo, sent = Gloo("127.0.0.1"), [torch.full((1000,), n, dtype=torch.uint8) for n in range(20)]
    got = [torch.zeros(1000, dtype=torch.uint8) for _ in sent]
    halves.start()
    for rows in sent:
        halves.sessions[0].put(_Job(lambda group, rows=rows: gloo.send(group, rows)))
    jobs = [_Job(lambda group, to=to: gloo.receive(group, to)) for to in got]
    for job in jobs:
        halves.sessions[1].put(job)
    assert all(job.complete.wait(DEADLINE_S) for job in jobs)
    assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


def test_a_half_whose_other_never_comes_fails(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transport.group.BUILD_S", 0.2)
    halves.start(meet=False)
    halves.expect_failures(2)


def test_a_half_whose_thread_has_ended_keeps_no_job() -> None:
    """A buffer of the pool stayed with it until another session was opened."""

    class Broken(Gloo):
        def build(self, store: Any, rank: int) -> Any:
            raise RuntimeError("no group")

    loop = Loop("test-collective")  # does not run: nothing is told yet of the thread's end
    session = Session(loop, Broken("127.0.0.1"), 1, lambda name, value: None, lambda reason: None)
    session.join()
    job = _Job(lambda group: None)
    put = weakref.ref(job)
    session.put(job)
    del job
    assert put() is None
    session.close()
    loop.start()
    loop.stop()


def test_closing_while_the_halves_meet_does_not_wait(halves: Halves) -> None:
    halves.start(meet=False)
    since = time.monotonic()
    halves.close()
    assert time.monotonic() - since < 1
    assert not halves.failed


def test_the_end_of_one_half_ends_the_other_even_while_idle(halves: Halves) -> None:
    job = _Job(lambda group: Gloo("127.0.0.1").send(group, torch.zeros(1, dtype=torch.uint8)))
    taken = _Job(lambda group: Gloo("127.0.0.1").receive(group, torch.zeros(1, dtype=torch.uint8)))
    halves.start()
    halves.sessions[0].put(job)
    halves.sessions[1].put(taken)
    assert taken.complete.wait(DEADLINE_S)
    halves.loop.call_soon(halves.sessions[1].close)
    halves.expect_failures(1)
    halves.sessions[0].join()
    assert not halves.sessions[0].alive


def test_closing_ends_a_wait_for_bytes_that_never_come(halves: Halves) -> None:
    waiting = _Job(lambda group: Gloo("127.0.0.1").receive(group, torch.zeros(9, dtype=torch.uint8)))
    posted, post = threading.Event(), waiting.post

    def tell(group: object) -> object:
        work = post(group)
        posted.set()
        return work

    waiting.post = tell
    halves.start()
    halves.sessions[1].put(waiting)
    assert posted.wait(DEADLINE_S)
    since = time.monotonic()
    halves.close()
    assert time.monotonic() - since < 1
    assert not waiting.complete.is_set()


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


def test_a_producer_that_does_not_come_to_the_rendezvous_is_used_without(
    d: ConsumerEnd, raw: RawProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.transport.group.BUILD_S", 0.2)
    d.load(KEY, raw.endpoint, (1, 2))
    assert [name for name, _ in raw.welcome("collective", TERMS).offers] == ["collective", "zmq"]
    assert [name for name, _ in raw.expect(wire.Hello).offers] == ["zmq"]
    d.unload(KEY)


@pytest.mark.parametrize("data", [b"", b"\x00", msgspec.msgpack.encode(Terms("nccl", "2.13.0"))])
def test_terms_that_are_not_ours_are_refused(d: ConsumerEnd, raw: RawProducer, data: bytes) -> None:
    d.load(KEY, raw.endpoint, (1, 2))
    raw.welcome("collective", data)
    assert [name for name, _ in raw.expect(wire.Hello).offers] == ["zmq"]
    d.unload(KEY)


def test_payloads_out_of_turn_end_the_session(pair_of: Pair) -> None:
    pair_of.p.open(KEY, 4)
    pair_of.d.load(KEY, pair_of.endpoint, (1, 2, 3, 4))
    pair_of.p.publish(KEY, 0, [1])
    pair_of.d.until(lambda: same(pair_of.p.cache, [1], pair_of.d.cache, [1]))
    sender = next(iter(pair_of.p.end._sessions.values())).sender
    next(sender._turn)  # type: ignore[attr-defined]
    pair_of.p.publish(KEY, 1, [2, 3, 4])
    loaded = pair_of.d.events.expect(wire.Loaded, KEY)
    assert (loaded.transport, loaded.retries) == ("zmq", 1)


@pytest.fixture
def pair_of(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(transports=NAMES)


def test_nccl_is_not_offered_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Unavailable, match="NCCL"):
        backend_of("cuda:0", "").check()


def test_a_half_received_payload_does_not_outlast_its_session() -> None:
    """Gloo wakes nobody who waits for bytes of which some have come."""
    got = torch.zeros(256 << 20, dtype=torch.uint8)
    for _ in range(50):
        if _cut_amid(got):
            return
    pytest.fail("every payload was whole before its session was ended")


def _cut_amid(got: torch.Tensor) -> bool:
    """End a session while it receives into ``got``; whether that was before the end."""
    got.zero_()
    sent = _Job(lambda group: Gloo("127.0.0.1").send(group, torch.ones_like(got)))
    taken = _Job(lambda group: Gloo("127.0.0.1").receive(group, got))
    halves = Halves()
    halves.start()
    halves.sessions[0].put(sent)
    halves.sessions[1].put(taken)
    give_up = time.monotonic() + DEADLINE_S
    while not got[0]:
        assert time.monotonic() < give_up
    halves.close()
    assert not any(session.alive for session in halves.sessions)
    return not taken.complete.is_set()


def test_what_has_been_sent_is_let_go_of(pair_of: Pair) -> None:
    pair_of.p.open(KEY, 10)
    pair_of.d.load(KEY, pair_of.endpoint, tuple(range(1, 11)))
    pair_of.p.publish(KEY, 0, list(range(1, 11)))
    pair_of.d.events.expect(wire.Loaded, KEY)
    session = next(iter(pair_of.p.end._sessions.values())).sender.session  # type: ignore[attr-defined]
    pair_of.p.until(lambda: not session._held and session._held_bytes == 0)
