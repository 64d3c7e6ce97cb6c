"""The figures of an evaluation: shares with intervals, costs, and paired comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from braid.evaluate.outcome import Outcome

SOURCES = {
    "accuracy_ci95": "Wilson 1927, score interval (J. Am. Stat. Assoc. 22:209)",
    "difference_ci95": "Newcombe 1998, method 10: paired, from two Wilson intervals (Stat. Med. 17:2635)",
    "mcnemar_p": "McNemar 1947, exact: two-sided binomial test of the discordant pairs",
}
"""Where each formula is from."""


def wilson(successes: int, trials: int, z: float = 1.959964) -> list[float]:
    """The Wilson score interval of a proportion (Wilson 1927), 95 % by default."""
    if trials == 0:
        return [0.0, 1.0]
    p = successes / trials
    centre = p + z * z / (2 * trials)
    reach = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return [max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)]


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p-value that both are right equally often, from the problems that only one of them
    has right: under the null each falls to either with probability 1/2."""
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / (1 << n))


def difference(both: int, first_only: int, second_only: int, neither: int) -> list[float]:
    """The 95 % interval of p1 - p2 of paired proportions (Newcombe 1998, method 10)."""
    n = both + first_only + second_only + neither
    if n == 0:
        return [-1.0, 1.0]
    right1, right2 = both + first_only, both + second_only
    p1, p2 = right1 / n, right2 / n
    (low1, high1), (low2, high2) = wilson(right1, n), wilson(right2, n)
    phi = _phi(both, first_only, second_only, neither)
    below = _root((p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2)
    above = _root((high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2)
    return [max(-1.0, p1 - p2 - below), min(1.0, p1 - p2 + above)]


def _phi(a: int, b: int, c: int, d: int) -> float:
    """The correlation of the table, its numerator moved by n/2 towards 0 where it is positive."""
    scale = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    cross = a * d - b * c
    if scale == 0:
        return 0.0
    return (max(cross - (a + b + c + d) / 2, 0.0) if cross > 0 else cross) / scale


def _root(value: float) -> float:
    return math.sqrt(max(0.0, value))


def summarise(outcomes: Sequence[Outcome], turns: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One method's figures from its outcomes and its turns. A failed request counts as wrong; costs are
    those of the replies."""
    worked = [(turn["problems"], turn["wall_s"]) for turn in turns]
    wall_s = sum(wall for _, wall in worked)
    answered = [outcome for outcome in outcomes if not outcome.error]
    right = sum(outcome.right for outcome in outcomes)
    latencies = sorted(outcome.latency_s for outcome in answered)
    return {
        "problems": len(outcomes),
        "failed": len(outcomes) - len(answered),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "no_answer": sum(outcome.answer is None for outcome in answered),
        "right": right,
        "accuracy": right / len(outcomes) if outcomes else 0.0,
        "accuracy_ci95": wilson(right, len(outcomes)),
        "completion_tokens": _cost([outcome.completion_tokens for outcome in answered]),
        "prompt_tokens": _cost([outcome.prompt_tokens for outcome in answered]),
        "cached_tokens": _cost([outcome.cached_tokens for outcome in answered]),
        "samples": _cost([outcome.samples for outcome in answered]),
        "kv_bytes": _cost([outcome.kv_bytes for outcome in answered]),
        "kv_transfers": _cost([outcome.kv_transfers for outcome in answered]),
        "latency_s": {
            "mean": sum(latencies) / len(latencies) if latencies else None,
            "p50": quantile(latencies, 0.5),
            "p95": quantile(latencies, 0.95),
        },
        "wall_s": wall_s,
        "problems_per_s": sum(asked for asked, _ in worked) / wall_s if wall_s else None,
        "paths": dict(Counter(outcome.path or "unknown" for outcome in answered)),
        "stopped_early": dict(
            Counter(outcome.stopped_early for outcome in answered if outcome.stopped_early)
        ),
        "retried": sum(outcome.attempts > 1 for outcome in outcomes),
    }


def _cost(values: Sequence[int]) -> dict[str, Any]:
    """The sum, and the mean a problem."""
    return {"total": sum(values), "per_problem": sum(values) / len(values) if values else None}


def quantile(ranked: Sequence[float], share: float) -> float | None:
    """The ``share`` quantile of sorted values, linear between the two nearest ranks."""
    if not ranked:
        return None
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def compare(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, Any]:
    """Two methods on the problems that both were asked, the first minus the second.

    ``tokens_ratio`` and ``latency_ratio`` are of the means over the problems that both answered.
    """
    others = {outcome.id: outcome for outcome in second}
    pairs = [(one, others[one.id]) for one in first if one.id in others]
    cells = Counter((one.right, other.right) for one, other in pairs)
    table = (cells[True, True], cells[True, False], cells[False, True], cells[False, False])
    both = [(one, other) for one, other in pairs if not (one.error or other.error)]
    return {
        "problems": len(pairs),
        "only_first_right": table[1],
        "only_second_right": table[2],
        "difference": (table[1] - table[2]) / len(pairs) if pairs else 0.0,
        "difference_ci95": difference(*table),
        "mcnemar_p": mcnemar(table[1], table[2]),
        "tokens_ratio": _ratio([(one.completion_tokens, other.completion_tokens) for one, other in both]),
        "latency_ratio": _ratio([(one.latency_s, other.latency_s) for one, other in both]),
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    below = sum(second for _, second in pairs)
    return sum(first for first, _ in pairs) / below if below else None


def comparisons(outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Every pair of methods, the later one in the order given minus the earlier one."""
    names = list(outcomes)
    return [
        {"first": later, "second": earlier, **compare(outcomes[later], outcomes[earlier])}
        for at, earlier in enumerate(names)
        for later in names[at + 1 :]
    ]
