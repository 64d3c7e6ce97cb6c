"""How long a decode step takes by its batch and contexts, from the durations of samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from braid import wire

LEAST_TOKENS = 8
"""Shorter samples tell more of their start than of steps."""
KEEP = 0.998
"""Weight of a sample in the fit once another has ended: about the last 500 count."""
SEQ_SHARE = 0.015
"""A sequence's share of a step's base that is assumed before the widths seen tell another."""
BELIEF_SEQ, BELIEF_TOKEN = 0.25, 0.02
"""How strongly that is assumed, and that contexts cost nothing: as much as the square of a mean's share of it
would tell in variance."""


@dataclass(frozen=True, slots=True)
class Began:
    """When a sample began, and what had been added up by then."""

    at: float
    width: float
    tokens: float
    context: int


class Pace:
    """Seconds of a step ~ base + seq x width + token x attended tokens: weighted least squares over the
    samples that ended last, with a belief in seq and token (ridge).

    A sample's mean step is its duration over its tokens; width and attended tokens are means over its life, a
    sample attending to its prompt. Call :meth:`begin` when a sample goes to the engine and :meth:`end` when
    it has ended; who sees the steps themselves calls :meth:`note`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = self._context = 0
        self._width = self._tokens = 0.0  # running samples, and their context, times seconds so far
        self._at = clock()
        self._sums = [0.0] * 9  # of 1, x, z, y, xx, xz, zz, xy, zy

    def begin(self, context: int = 0) -> Began:
        """A sample with ``context`` tokens of prompt begins; what is returned goes to :meth:`end`."""
        self._turn(1, context)
        return Began(self._at, self._width, self._tokens, context)

    def end(self, began: Began, tokens: int) -> None:
        """It has ended, with ``tokens`` tokens generated."""
        self._turn(-1, -began.context)
        seconds = self._at - began.at
        if tokens < LEAST_TOKENS or seconds <= 0:
            return
        width = (self._width - began.width) / seconds
        attended = (self._tokens - began.tokens) / seconds
        self.note(
            width, attended, seconds / tokens, 1 / width
        )  # the others of its batch tell of the same steps

    def note(self, x: float, z: float, y: float, weight: float = 1.0) -> None:
        """A step of ``x`` samples that attend to ``z`` tokens took ``y`` seconds."""
        terms = (1.0, x, z, y, x * x, x * z, z * z, x * y, z * y)
        self._sums = [KEEP * old + weight * new for old, new in zip(self._sums, terms, strict=True)]

    def fit(self) -> tuple[float, float, float] | None:
        """(base, seq, token) in seconds, each at least 0; None before the first sample has ended."""
        weight = self._sums[0]
        if not weight:
            return None
        x, z, y, xx, xz, zz, xy, zy = (value / weight for value in self._sums[1:])
        assumed = SEQ_SHARE * y / (1 + SEQ_SHARE * x)
        a, b, d = xx - x * x + BELIEF_SEQ * x * x, xz - x * z, zz - z * z + BELIEF_TOKEN * z * z
        p, q = xy - x * y + BELIEF_SEQ * x * x * assumed, zy - z * y
        token = max(0.0, (a * q - b * p) / (a * d - b * b)) if z > 0 else 0.0
        seq = max(0.0, (p - b * token) / a)
        token = max(0.0, (q - b * seq) / d) if z > 0 else 0.0
        over = (seq * x + token * z) / y
        if over > 1:  # base is not below 0
            seq, token = seq / over, token / over
        return max(0.0, y - seq * x - token * z), seq, token

    def tell(self, beat: wire.Beat) -> wire.Beat:
        """``beat`` with what is known of steps."""
        fit = self.fit()
        if fit is None:
            return beat
        return replace(beat, step_base_s=fit[0], step_seq_s=fit[1], step_token_s=fit[2])

    def _turn(self, more: int, context: int) -> None:
        now = self._clock()
        self._width += self._running * (now - self._at)
        self._tokens += self._context * (now - self._at)
        self._at = now
        self._running += more
        self._context += context
