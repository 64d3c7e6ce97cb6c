"""Percentiles, spread and a confidence interval of small samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Count, min, quartiles, p95, max and a 95 % interval of the median, in the unit of `values`.

    `iqr` is p75 - p25, the spread that a few outliers do not move. An empty sample has None for every figure.
    """
    if not values:
        return {"count": 0} | dict.fromkeys(("min", "p25", "p50", "p75", "p95", "max", "iqr", "p50_ci95"))
    ranked = sorted(values)
    p25, p50, p75, p95 = (percentile(ranked, share) for share in (0.25, 0.5, 0.75, 0.95))
    return {
        "count": len(ranked),
        "min": ranked[0],
        "p25": p25,
        "p50": p50,
        "p75": p75,
        "p95": p95,
        "max": ranked[-1],
        "iqr": p75 - p25,
        "p50_ci95": median_interval(ranked),
    }


def percentile(ranked: Sequence[float], share: float) -> float:
    """The `share` quantile of sorted values, linear between the two nearest ranks."""
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def median_interval(ranked: Sequence[float]) -> list[float]:
    """A 95 % interval of the median of sorted values from the binomial of their ranks (normal approximation).

    It assumes independent draws and nothing of their distribution; under six values it is their range.
    """
    reach = 1.96 * math.sqrt(len(ranked)) / 2
    low = max(0, math.floor(len(ranked) / 2 - reach))
    high = min(len(ranked) - 1, math.ceil(len(ranked) / 2 + reach))
    return [ranked[low], ranked[high]]
