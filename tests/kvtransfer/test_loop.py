"""The thread that owns the sockets."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from kvtransfer.loop import TICK_S, Loop

DEADLINE_S = 60.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test")
    yield loop
    if loop.ident is None:
        loop.start()
    loop.stop()


def test_calls_keep_their_order_and_run_on_the_loop(loop: Loop) -> None:
    ran: list[int] = []
    on: list[int | None] = []
    done = threading.Event()
    loop.start()
    for i in range(200):
        loop.call_soon(lambda i=i: ran.append(i))  # type: ignore[misc]
    loop.call_soon(lambda: on.append(threading.get_ident()))
    loop.call_soon(done.set)
    assert done.wait(DEADLINE_S)
    assert ran == list(range(200))
    assert on == [loop.ident]


def test_calls_made_before_the_start_are_run(loop: Loop) -> None:
    done = threading.Event()
    loop.call_soon(done.set)
    loop.start()
    assert done.wait(DEADLINE_S)


@pytest.mark.callbacks_may_fail
def test_a_callback_that_raises_does_not_end_the_loop(loop: Loop) -> None:
    done = threading.Event()
    ticks = iter([ZeroDivisionError, None])

    def tick() -> None:
        if (error := next(ticks, None)) is not None:
            raise error
        done.set()

    loop.every_tick(tick)
    loop.call_soon(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    loop.start()
    assert done.wait(DEADLINE_S)


@pytest.mark.callbacks_may_fail
def test_a_handler_that_raises_does_not_end_the_loop(loop: Loop) -> None:
    with zmq.Context() as context:
        inside, outside = _pipe(context)
        got: list[bytes] = []
        done = threading.Event()

        def handler() -> None:
            try:
                got.append(inside.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if len(got) == 1:
                raise RuntimeError("first message")
            done.set()

        loop.add(inside, handler)
        loop.start()
        outside.send(b"1")
        outside.send(b"2")
        assert done.wait(DEADLINE_S)
        assert got == [b"1", b"2"]
        loop.stop()
        outside.close(linger=0)


@pytest.mark.callbacks_may_fail
def test_what_is_polled_is_called_while_it_is_busy_and_may_raise(loop: Loop) -> None:
    turns: list[bool] = []
    done = threading.Event()

    def poll() -> bool:
        turns.append(len(turns) < 50)
        if len(turns) == 20:
            raise RuntimeError("once")
        if not turns[-1]:
            done.set()
        return turns[-1]

    loop.every_turn(lambda: not done.is_set())
    loop.every_turn(poll)
    loop.start()
    assert done.wait(DEADLINE_S)
    loop.stop()


def test_a_call_at_once_runs_where_it_is_made(loop: Loop) -> None:
    loop.start()
    assert _here(loop, lambda: None)


def test_a_call_at_once_waits_for_who_holds_the_loop_and_for_the_calls_before_it(loop: Loop) -> None:
    holds, go_on, done = threading.Event(), threading.Event(), threading.Event()
    ran: list[tuple[str, int]] = []

    def hold() -> None:
        holds.set()
        assert go_on.wait(DEADLINE_S)

    def note(name: str) -> None:
        ran.append((name, threading.get_ident()))
        if name == "third":
            done.set()

    loop.start()
    loop.call_soon(hold)
    assert holds.wait(DEADLINE_S)
    loop.call_soon(lambda: note("first"))
    loop.call_at_once(lambda: note("second"))
    loop.call_soon(lambda: note("third"))
    assert ran == []
    go_on.set()
    assert done.wait(DEADLINE_S)
    assert ran == [(name, loop.ident) for name in ("first", "second", "third")]


def test_a_call_at_once_does_not_overtake_one_that_the_loop_has_not_begun(loop: Loop) -> None:
    wait, awake, done = loop._wait, threading.Event(), threading.Event()
    ran: list[str] = []

    def wait_and_linger(due: float) -> list[int]:
        found = wait(due)
        assert awake.wait(DEADLINE_S)
        return found

    loop._wait = wait_and_linger  # type: ignore[method-assign]
    loop.start()
    assert _here(loop, lambda: None)
    loop.call_soon(lambda: ran.append("first"))
    loop.call_at_once(lambda: ran.append("second"))
    loop.call_soon(done.set)
    assert ran == []
    awake.set()
    assert done.wait(DEADLINE_S)
    assert ran == ["first", "second"]


def test_a_call_at_once_before_the_start_runs_after_it_and_after_the_stop_never(loop: Loop) -> None:
    ran: list[int] = []
    loop.call_at_once(lambda: ran.append(1))
    assert ran == []
    loop.start()
    loop.stop()
    loop.call_at_once(lambda: ran.append(2))
    assert ran == [1]


@pytest.mark.callbacks_may_fail
def test_a_call_at_once_that_raises_lets_go_of_the_loop(loop: Loop) -> None:
    loop.start()
    assert _here(loop, lambda: 1 / 0)
    assert _here(loop, lambda: None)


def test_what_a_call_at_once_finds_readable_is_handled_though_its_descriptor_is_silent(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.loop.TICK_S", DEADLINE_S)
    with zmq.Context() as context:
        inside, outside = _pipe(context)
        got = threading.Event()
        loop.add(inside, _taking(inside, got))
        loop._poller.modify(int(inside.getsockopt(zmq.FD)), 0)
        loop.start()

        def take_the_signal() -> None:
            outside.send(b"1")
            assert inside.poll(int(1000 * DEADLINE_S))

        assert _here(loop, lambda: None)  # it has woken up for the socket, and sleeps
        assert _here(loop, take_the_signal)
        assert got.wait(DEADLINE_S / 2)
        got.clear()
        loop.call_soon(take_the_signal)  # the same on the loop's own thread
        assert got.wait(DEADLINE_S / 2)
        loop.stop()
        outside.close(linger=0)


def test_a_socket_added_by_a_call_at_once_is_waited_for(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.loop.TICK_S", DEADLINE_S)
    with zmq.Context() as context:
        inside, outside = _pipe(context)
        got = threading.Event()
        loop.start()
        assert _here(loop, lambda: loop.add(inside, _taking(inside, got)))
        outside.send(b"1")
        assert got.wait(DEADLINE_S / 2)
        loop.stop()
        outside.close(linger=0)


def test_stop_runs_what_was_queued_and_closes_the_sockets() -> None:
    with zmq.Context() as context:
        loop, ran = Loop("test"), threading.Event()
        inside, outside = _pipe(context)
        loop.add(inside, lambda: None)
        loop.start()
        loop.call_soon(ran.set)
        loop.stop()
        assert ran.is_set()
        assert inside.closed
        assert not loop.is_alive()
        outside.close(linger=0)


def test_a_call_after_the_stop_is_dropped_and_stop_may_be_repeated() -> None:
    loop = Loop("test")
    loop.start()
    loop.stop()
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]  # take the numbers of the closed pipe
    try:
        loop.call_soon(lambda: None)
        loop.stop()
    finally:
        for fd in fds:
            os.close(fd)


def test_no_descriptor_is_left_behind() -> None:
    def once() -> None:
        with zmq.Context() as context:
            loop = Loop("test")
            inside, outside = _pipe(context)
            loop.add(inside, lambda: None)
            loop.start()
            loop.stop()
            outside.close(linger=0)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        once()
    assert len(os.listdir("/proc/self/fd")) == before


def _taking(socket: zmq.Socket[bytes], got: threading.Event) -> Callable[[], None]:
    def take() -> None:
        with contextlib.suppress(zmq.Again):
            socket.recv(zmq.NOBLOCK)
            got.set()

    return take


def _here(loop: Loop, call: Callable[[], object]) -> bool:
    """Make a call at once when the loop has nothing to do, so that it runs on this thread."""
    me = threading.get_ident()
    for _ in range(1000):
        ran: list[int] = []
        settled = threading.Event()

        def run(ran: list[int] = ran, settled: threading.Event = settled) -> None:
            if threading.get_ident() != me:
                settled.set()
                return
            ran.append(me)
            call()

        loop.call_at_once(run)
        if ran:
            return True
        assert settled.wait(DEADLINE_S)
    return False


def _pipe(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    inside, outside = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    port = inside.bind_to_random_port("tcp://127.0.0.1")
    outside.connect(f"tcp://127.0.0.1:{port}")
    return inside, outside


def test_what_a_call_at_once_starts_is_polled_at_once(loop: Loop) -> None:
    """It was with the next tick, a quarter of a second later at most."""
    wanted, polled = threading.Event(), threading.Event()

    def poll() -> bool:
        if wanted.is_set():
            polled.set()
        return False

    loop.every_turn(poll)
    loop.start()
    waits = []
    for _ in range(20):
        here: list[int] = []
        while not here:  # the loop may be in a turn
            wanted.clear()
            polled.clear()
            time.sleep(0.01)
            ran = threading.Event()

            def work(here: list[int] = here, ran: threading.Event = ran) -> None:
                if threading.get_ident() != loop.ident:
                    here.append(1)
                wanted.set()
                ran.set()

            begun = time.monotonic()
            loop.call_at_once(work)
            assert ran.wait(DEADLINE_S)
            assert polled.wait(DEADLINE_S)
        waits.append(time.monotonic() - begun)
    assert sorted(waits)[10] < TICK_S / 5
