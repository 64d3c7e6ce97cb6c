"""The confidence of one sample as it grows, so that log-probabilities needn't leave the worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from heapq import nlargest
from typing import Any

from braid import wire

_FLOOR = -9999.0
"""Log-probabilities are at least this, as in vLLM's replies."""


class Confidence:
    """Measures as :class:`braid.wire.Watch` says.

    ``lowest``: the least confidence of a group of ``window`` tokens; of all tokens while there are fewer;
    None while there is none.
    """

    def __init__(self, watch: wire.Watch) -> None:
        self.lowest: float | None = None
        self._watch = watch
        self._seen = 0
        self._last: deque[float] = deque(maxlen=watch.window)
        self._sum = 0.0

    def falls(self, completion: Any) -> bool:
        """Take in the new tokens of a sample's cumulative output; whether it is to be ended for them."""
        least, below = self._watch.least, False
        logprobs = completion.logprobs or ()
        for position in range(self._seen, len(logprobs)):
            group = self._add(logprobs[position])
            below = below or (least is not None and group is not None and group < least)
        self._seen = len(logprobs)
        return below and completion.finish_reason is None

    def _add(self, top: Mapping[int, Any]) -> float | None:
        """The confidence of the group that this token ends, None if it is not whole."""
        largest = nlargest(self._watch.top, (max(_FLOOR, one.logprob) for one in top.values()))
        token = -sum(largest) / len(largest)
        whole = len(self._last) == self._watch.window
        self._sum += token - (self._last[0] if whole else 0.0)
        self._last.append(token)
        group = self._sum / len(self._last)
        if len(self._last) < self._watch.window:
            self.lowest = group
            return None
        first = not whole
        self.lowest = group if first or self.lowest is None else min(self.lowest, group)
        return group
