"""The confidence of simulated samples, as ``wire.Watch`` says, from their made-up log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator

from braid import wire
from braid.sim.draws import Draw


def groups(said: Draw, watch: wire.Watch, count: int) -> Iterator[float]:
    """Confidence of each whole group of ``window`` tokens among the first ``count``, as it is completed."""
    told = [_token(said, i, watch.top) for i in range(count)]
    total = sum(told[: watch.window])
    for end in range(watch.window, count + 1):
        if end > watch.window:
            total += told[end - 1] - told[end - 1 - watch.window]
        yield total / watch.window


def lowest(said: Draw, watch: wire.Watch, count: int) -> float | None:
    """The least confident group's; of all tokens while there is no whole group, None without tokens."""
    if not count:
        return None
    if count < watch.window:
        return sum(_token(said, i, watch.top) for i in range(count)) / count
    return min(groups(said, watch, count))


def watched(said: Draw, watch: wire.Watch) -> Draw:
    """A sample that ends where a group's confidence falls below ``watch.least``, if one does."""
    if watch.least is None:
        return said
    for end, confidence in enumerate(groups(said, watch, said.tokens), watch.window):
        if confidence < watch.least and end < said.tokens:
            return said.ended_at(end)
    return said


def _token(said: Draw, i: int, top: int) -> float:
    return -sum(logprob for _, logprob in said.top(i, top)) / top
