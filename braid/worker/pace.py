"""How long a decode step takes by the width of its batch, from the durations of samples."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from braid import wire

LEAST_TOKENS = 8
"""Shorter samples tell more of their start than of steps."""
KEEP = 0.98
"""Weight of a sample in the fit once another has ended."""
SEQ_SHARE = 0.015
"""A sequence's share of a step of one, while the widths seen are too much alike to tell."""


class Pace:
    """Seconds of a step ~ base + seq x width: a line fitted by weighted least squares to the samples that
    ended last.

    A sample's mean step is its duration over its tokens, its width the mean number of samples that ran
    meanwhile. Call :meth:`begin` when a sample goes to the engine and :meth:`end` when it has ended; who sees
    the steps themselves calls :meth:`note`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._area = 0.0  # running samples x seconds so far
        self._at = clock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def begin(self) -> tuple[float, float]:
        """A sample begins; what is returned goes to :meth:`end`."""
        self._turn(1)
        return self._at, self._area

    def end(self, began: tuple[float, float], tokens: int) -> None:
        """It has ended, with ``tokens`` tokens generated."""
        self._turn(-1)
        at, area = began
        seconds = self._at - at
        if tokens < LEAST_TOKENS or seconds <= 0:
            return
        self.note((self._area - area) / seconds, seconds / tokens)

    def note(self, x: float, y: float) -> None:
        """A step of ``x`` samples took ``y`` seconds."""
        self._weight = KEEP * self._weight + 1
        self._x, self._y = KEEP * self._x + x, KEEP * self._y + y
        self._xx, self._xy = KEEP * self._xx + x * x, KEEP * self._xy + x * y

    def fit(self) -> tuple[float, float] | None:
        """(base, seq) in seconds, both at least 0; None before the first sample has ended."""
        if not self._weight:
            return None
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread < 0.05 * x * x:
            base = y / (1 + SEQ_SHARE * x)
            return base, SEQ_SHARE * base
        seq = max(0.0, (self._xy / self._weight - x * y) / spread)
        seq = min(seq, y / x)  # base is not below 0
        return y - seq * x, seq

    def tell(self, beat: wire.Beat) -> wire.Beat:
        """``beat`` with what is known of steps."""
        fit = self.fit()
        return beat if fit is None else replace(beat, step_base_s=fit[0], step_seq_s=fit[1])

    def _turn(self, more: int) -> None:
        now = self._clock()
        self._area += self._running * (now - self._at)
        self._at = now
        self._running += more
