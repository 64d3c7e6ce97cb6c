"""What a loop does for things that can only be polled."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kvtransfer.loop import TICK_S, Loop

DEADLINE_S = 10.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test-polling")
    yield loop
    loop.stop()


def test_while_a_poll_is_busy_turns_follow_one_another(loop: Loop) -> None:
    left, done = [1000], threading.Event()

    def poll() -> bool:
        left[0] -= 1
        if left[0] == 0:
            done.set()
        return left[0] > 0

    loop.every_turn(poll)
    since = time.monotonic()
    loop.start()
    assert done.wait(DEADLINE_S)
    assert time.monotonic() - since < 1000 * TICK_S / 10


def test_a_poll_that_is_not_busy_costs_nothing(loop: Loop) -> None:
    turns = [0]

    def poll() -> bool:
        turns[0] += 1
        return False

    loop.every_turn(poll)
    loop.start()
    time.sleep(4 * TICK_S)  # it is the absence of turns that is looked at
    assert turns[0] <= 8


def test_a_loop_that_is_busy_still_does_the_rest_and_stops(loop: Loop) -> None:
    ran, ticked = threading.Event(), threading.Event()
    loop.every_turn(lambda: True)
    loop.every_tick(ticked.set)
    loop.start()
    loop.call_soon(ran.set)
    assert ran.wait(DEADLINE_S)
    assert ticked.wait(DEADLINE_S)
    loop.stop()
    assert not loop.is_alive()


@pytest.mark.callbacks_may_fail
def test_a_poll_that_raises_is_not_busy_and_does_not_end_the_loop(loop: Loop) -> None:
    turns, ran = [0], threading.Event()

    def poll() -> bool:
        turns[0] += 1
        raise ZeroDivisionError

    loop.every_turn(poll)
    loop.start()
    time.sleep(2 * TICK_S)
    loop.call_soon(ran.set)
    assert ran.wait(DEADLINE_S)
    assert turns[0] <= 8
