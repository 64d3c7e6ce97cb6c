"""Percentiles, spread and a confidence interval of small samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Count, min, quartiles, p95, max and a 95 % bootstrap interval of the median, in the unit of `values`.

    `iqr` is p75 - p25, the spread that a few outliers do not move. None for every figure of an empty sample.
    """
    if not values:
        return {"count": 0} | dict.fromkeys(("min", "p25", "p50", "p75", "p95", "max", "iqr", "p50_ci95"))
    data = np.asarray(values, dtype=float)
    p25, p50, p75, p95 = (float(q) for q in np.percentile(data, [25, 50, 75, 95]))
    return {
        "count": len(data),
        "min": float(data.min()),
        "p25": p25,
        "p50": p50,
        "p75": p75,
        "p95": p95,
        "max": float(data.max()),
        "iqr": p75 - p25,
        "p50_ci95": median_interval(data, seed),
    }


def median_interval(values: Any, seed: int = 0, resamples: int = 2000) -> list[float]:
    """95 % percentile-bootstrap interval of the median (Efron 1979), reproducible by `seed`."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).choice(data, size=(resamples, len(data)))
    return [float(q) for q in np.percentile(np.median(draws, axis=1), [2.5, 97.5])]
