"""Votes of confident samples: who is confident enough, and what its vote weighs (DeepConf)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from router.strategies.ballots import votes_of
from router.strategies.collect import Run
from router.strategies.confidence import Measure, confidences, percentile, trace_confidence
from router.strategies.scored import Scored, finite
from router.strategies.voting import Votes, confidence


class JudgeOptions(Protocol):
    """The options that a judge goes by."""

    @property
    def n(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def early_stop(self) -> bool: ...
    @property
    def filter(self) -> Literal["low", "high"]: ...
    @property
    def measure(self) -> Measure: ...
    @property
    def window(self) -> int: ...
    @property
    def top(self) -> int: ...


class Judge:
    """Who votes, with what weight: samples at or over the threshold, by their confidence."""

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._known: dict[int, float] = {}

    def of(self, one: Scored) -> float:
        """A sample's confidence, by its worker or by its log-probabilities; 0 if it has neither."""
        options, index = self._options, one.sample.index
        if one.sample.confidence is not None:
            return one.sample.confidence
        if index not in self._known:
            tokens = confidences(one.sample.choice, options.top)
            self._known[index] = trace_confidence(tokens, options.measure, options.window)
        return self._known[index]

    def threshold(self, run: Run) -> float:
        """The percentile of the warm-up's confidences (of all samples in the offline form)."""
        first = self._options.warmup if self._options.early_stop else self._options.n
        of = [self.of(one) for one in run.finished if one.sample.index < first]
        return percentile(of, 90 if self._options.filter == "low" else 10) if of else 0.0

    def votes(self, run: Run) -> list[Votes]:
        """Of the samples that reach the threshold; of all where none of these has an answer."""
        least = self.threshold(run)
        passed = [one for one in run.finished if self.of(one) >= least]
        return self._weighted(passed) or self._weighted(run.finished)

    def consensus(self, run: Run) -> float:
        """The winner's share of the confidence of all samples that have finished with an answer."""
        return confidence(self._weighted(run.finished)) or 0.0

    def _weighted(self, among: Sequence[Scored]) -> list[Votes]:
        most = max((self.of(one) for one in among), default=0.0)
        return votes_of(among, lambda one: self.of(one) / most if most else 1.0)

    def report(self, run: Run) -> dict[str, Any]:
        least, ended = self.threshold(run), [one for one in run.in_order() if one.sample.state != "failed"]
        told = [{"index": one.sample.index, "confidence": finite(self.of(one))} for one in ended]
        filtered = sum(self.of(one) < least for one in run.finished)
        return {"threshold": finite(least), "confidences": told, "filtered": filtered}
