"""How long a decode step takes by the width of its batch, from the durations of samples."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from braid import wire

LEAST_TOKENS = 8
"""Shorter samples tell more of their start than of steps."""
KEEP = 0.998
"""Weight of a sample in the fit once another has ended: about the last 500 count."""
SEQ_SHARE = 0.015
"""A sequence's share of a step's base that is assumed before the widths seen tell another."""
BELIEF = 0.25
"""How strongly: as much as widths do that vary by half their mean. Contexts vary as well, and steps over long
ones take longer at any width, so widths that are much alike tell little."""


class Pace:
    """Seconds of a step ~ base + seq x width: a line fitted by weighted least squares to the samples that
    ended last, with a belief in what seq is (ridge).

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
        width = (self._area - area) / seconds
        self.note(width, seconds / tokens, 1 / width)  # the others of its batch tell of the same steps

    def note(self, x: float, y: float, weight: float = 1.0) -> None:
        """A step of ``x`` samples took ``y`` seconds."""
        self._weight = KEEP * self._weight + weight
        self._x, self._y = KEEP * self._x + weight * x, KEEP * self._y + weight * y
        self._xx, self._xy = KEEP * self._xx + weight * x * x, KEEP * self._xy + weight * x * y

    def fit(self) -> tuple[float, float] | None:
        """(base, seq) in seconds, both at least 0; None before the first sample has ended."""
        if not self._weight:
            return None
        x, y = self._x / self._weight, self._y / self._weight
        spread, together = self._xx / self._weight - x * x, self._xy / self._weight - x * y
        assumed, belief = SEQ_SHARE * y / (1 + SEQ_SHARE * x), BELIEF * x * x
        seq = (together + belief * assumed) / (spread + belief)
        seq = min(max(0.0, seq), y / x)  # nor is base below 0
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
