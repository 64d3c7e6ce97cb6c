"""Step times from the durations of samples."""

from __future__ import annotations

import pytest

from braid import wire
from braid.worker.pace import SEQ_SHARE, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def run(
    pace: Pace,
    clock: Clock,
    width: int,
    tokens: int,
    base: float,
    seq: float,
    context: int = 0,
    token: float = 0,
) -> None:
    """``width`` samples of ``tokens`` tokens, side by side."""
    began = [pace.begin(context) for _ in range(width)]
    clock.now += tokens * (base + (seq + token * context) * width)
    for one in began:
        pace.end(one, tokens)


def test_base_and_slope_are_found_from_batches_of_several_widths() -> None:
    clock = Clock()
    pace = Pace(clock)
    for width in (1, 4, 16, 8, 64) * 9:
        run(pace, clock, width, 50, 0.004, 0.0002)
    base, seq, token = pace.fit() or (0.0, 0.0, 0.0)
    assert (base, seq) == pytest.approx((0.004, 0.0002), rel=0.25)
    assert token == 0


def test_what_contexts_cost_is_told_from_what_widths_cost() -> None:
    clock = Clock()
    pace = Pace(clock)
    for context in (64, 1000, 6000):
        for width in (1, 4, 16, 64):
            for _ in range(5):
                run(pace, clock, width, 50, 0.004, 5e-5, context, 3e-8)
    base, seq, token = pace.fit() or (0.0, 0.0, 0.0)
    assert base == pytest.approx(0.004, rel=0.25)
    assert token == pytest.approx(3e-8, rel=0.25)
    assert 2.5e-5 < seq < 1.5e-4


def test_the_width_is_the_mean_over_a_samples_life() -> None:
    clock = Clock()
    pace = Pace(clock)
    first = pace.begin()
    clock.now += 1.0
    second = pace.begin()
    clock.now += 1.0
    pace.end(second, 10)
    pace.end(first, 20)
    base, seq, _ = pace.fit() or (0.0, 0.0, 0.0)
    assert base + 1.71 * seq == pytest.approx(0.1, rel=1e-3)  # widths 1.5 and 2


def test_widths_that_are_alike_tell_the_step_and_not_its_slope() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(3):
        run(pace, clock, 4, 50, 0.005, 0.0)
    base, seq, _ = pace.fit() or (0.0, 0.0, 0.0)
    assert base + 4 * seq == pytest.approx(0.005)
    assert seq == pytest.approx(SEQ_SHARE * base)


def test_old_steps_are_forgotten() -> None:
    clock = Clock()
    pace = Pace(clock)
    for base in (0.1, 0.01):
        for width in (1, 8) * 600:
            run(pace, clock, width, 20, base, 0.0)
    base, seq, _ = pace.fit() or (0.0, 0.0, 0.0)
    assert base == pytest.approx(0.01, rel=0.1)
    assert seq == pytest.approx(0.0, abs=2e-4)


def test_neither_coefficient_is_negative() -> None:
    pace = Pace(Clock())
    for x, y in ((1, 0.02), (30, 0.001)):
        pace.note(x, 0, y)
    base, seq, _ = pace.fit() or (-1.0, -1.0, -1.0)
    assert base == pytest.approx(0.0105, rel=0.02)
    assert seq == 0
    steep = Pace(Clock())
    for x, y in ((1, 0.001), (2, 0.01)):
        steep.note(x, 0, y)
    base, seq, _ = steep.fit() or (-1.0, -1.0, -1.0)
    assert base >= 0
    assert seq > 0


def test_short_samples_and_none_tell_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    run(pace, clock, 4, 3, 0.1, 0.0)
    assert pace.fit() is None
    assert pace.tell(wire.Beat(running=1)) == wire.Beat(running=1)
    run(pace, clock, 1, 30, 0.1, 0.0)
    assert (pace.tell(wire.Beat(running=1)).step_base_s or 0) > 0
