"""Copies that fail on a device end one lease or one load, and the waiter goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from kvtransfer.fence import Waiter
from kvtransfer.loop import Loop


class Copies:
    """A fence that passes when told to, well or not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.passed = threading.Event()
        self._error = error

    def wait(self) -> None:
        assert self.passed.wait(10)
        if self._error is not None:
            raise self._error


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test-fence")
    loop.start()
    yield loop
    loop.stop()


def test_calls_come_in_order_with_the_loop_held_and_a_failed_copy_stops_none(loop: Loop) -> None:
    waiter = Waiter(loop, "test-waiter")
    seen: list[tuple[int, bool]] = []
    beside: list[str] = []
    done = threading.Event()
    fences = [Copies(), Copies(RuntimeError("device lost")), Copies()]

    def note(number: int, well: bool) -> None:
        loop.call_at_once(partial(beside.append, f"during {number}"))  # would run now if nobody held the loop
        seen.append((number, well))
        beside.append(f"end of {number}")
        if number == 2:
            done.set()

    for number, fence in enumerate(fences):
        waiter.after(fence, partial(note, number))
    for fence in reversed(fences):
        fence.passed.set()
    assert done.wait(10)
    waiter.stop()
    loop.stop()
    assert seen == [(0, True), (1, False), (2, True)]
    for number in range(3):
        assert beside.index(f"end of {number}") < beside.index(f"during {number}")


def test_where_no_thread_can_be_started_who_copies_waits(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later copy waited for ever, and the waiter could not be stopped."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    waiter = Waiter(loop, "test-waiter")
    seen: list[bool] = []
    passed, failed = Copies(), Copies(RuntimeError("device lost"))
    passed.passed.set()
    failed.passed.set()
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        for fence in (passed, failed):
            waiter.after(fence, seen.append)
    waiter.after(passed, seen.append)
    waiter.stop()
    loop.stop()
    assert seen == [True, False, True]
