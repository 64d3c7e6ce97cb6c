"""Read counters from a Prometheus text page."""

from __future__ import annotations

import re
from collections import defaultdict

LINE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?\s+(\S+)")


def totals(page: str, prefixes: tuple[str, ...]) -> dict[str, float]:
    """Each series whose name starts with one of `prefixes`, summed over its labels; buckets are left out."""
    sums: dict[str, float] = defaultdict(float)
    for line in page.splitlines():
        match = LINE.match(line)
        if match and match[1].startswith(prefixes) and not match[1].endswith(("_bucket", "_created")):
            sums[match[1]] += float(match[2])
    return dict(sums)


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What each series grew by, where it changed."""
    return {
        name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)
    }
