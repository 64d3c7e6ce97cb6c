"""Accuracy against what it costs, as an SVG: a panel each for tokens, latency and KV bytes.

Colours are of middle lightness and the background is transparent, so that it reads on light and dark pages.
Points carry numbers, which the legend explains: colour alone says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

PANEL_W, PANEL_H, GAP = 330, 280, 34
LEFT, TOP, BOTTOM, LEGEND_ROW = 58, 62, 50, 18
ZERO_W = 26
"""Pixels on the left of an axis for what costs nothing: a logarithm has no zero."""
COLOURS = ("#1f83c8", "#d9622b", "#12997a", "#b765a8", "#b58900", "#7a7fd1", "#c94f63", "#5f9136")
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
.title { font-size: 15px; font-weight: 600; fill: #24292f }
.axis { font-weight: 600 }
.mark { font-size: 11px; font-weight: 600 }
.grid { stroke: #8c959f; stroke-opacity: 0.28 }
.frame { stroke: #8c959f; stroke-opacity: 0.7; fill: none }
.front { stroke: #8c959f; stroke-width: 1.2; stroke-dasharray: 4 4; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #9da7b3 } .title { fill: #e6edf3 } }
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One method in one panel: its number, cost, share of right answers with interval, all as told."""

    number: int
    name: str
    cost: float
    accuracy: float
    low: float
    high: float

    @property
    def colour(self) -> str:
        return COLOURS[(self.number - 1) % len(COLOURS)]


@dataclass(frozen=True, slots=True)
class Axis:
    """A logarithmic axis over ``width`` pixels; ``zero`` makes room for points of no cost."""

    low: float
    high: float
    width: float
    zero: bool

    def at(self, value: float) -> float:
        """Pixels from the left."""
        start = ZERO_W if self.zero else 0
        if value <= 0:
            return ZERO_W / 2
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return start + share * (self.width - start)

    def ticks(self) -> list[float]:
        """Round values: at most seven of 1, 2, 5 x 10^k, or of powers of ten where there are more."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**k for k in decades for step in steps]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) <= 7:
                break
        return inside


COSTS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None], Callable[[float], str]], ...] = (
    ("generated tokens a problem", lambda e: e["completion_tokens"]["per_problem"], lambda v: metric(v, "")),
    ("latency, p50", lambda e: e["latency_s"]["p50"], lambda v: f"{v:g} s"),
    ("KV bytes moved a problem", lambda e: e["kv_bytes"]["per_problem"], lambda v: metric(v, "B")),
)


def metric(value: float, unit: str) -> str:
    """``20k``, ``3 MB``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.3g}{' ' if unit else ''}{unit}"


def svg(title: str, methods: Mapping[str, Mapping[str, Any]]) -> str:
    """The picture of the figures of :func:`braid.evaluate.figures.summarise`, by method."""
    bottom, top = _range([bound for entry in methods.values() for bound in entry["accuracy_ci95"]])
    width = LEFT + len(COSTS) * (PANEL_W + GAP)
    rows = math.ceil(len(methods) / len(COSTS))
    height = TOP + PANEL_H + BOTTOM + rows * LEGEND_ROW + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="26">{escape(title)}</text>',
        f'<text x="{LEFT}" y="46">right answers with 95 % intervals; dashed: no other is both cheaper and '
        "better</text>",
    ]
    for place, (label, cost, told) in enumerate(COSTS):
        points = [
            Point(number, name, value, entry["accuracy"], *entry["accuracy_ci95"])
            for number, (name, entry) in enumerate(methods.items(), 1)
            if (value := cost(entry)) is not None
        ]
        x = LEFT + place * (PANEL_W + GAP)
        parts += [
            f'<g transform="translate({x} {TOP})">',
            *_panel(label, points, told, bottom, top, place == 0),
        ]
        parts.append("</g>")
    return "\n".join([*parts, *_legend(methods), "</svg>", ""])


def _range(bounds: Sequence[float]) -> tuple[float, float]:
    """Whole tenths around all intervals."""
    low, high = min(bounds, default=0.0), max(bounds, default=1.0)
    bottom = math.floor(low * 10 + 1e-9) / 10
    return bottom, max(bottom + 0.1, math.ceil(high * 10 - 1e-9) / 10)


def _axis(points: Sequence[Point]) -> Axis:
    costs = [point.cost for point in points if point.cost > 0] or [1.0]
    return Axis(min(costs) / 1.4, max(costs) * 1.4, PANEL_W, any(point.cost <= 0 for point in points))


def _panel(
    label: str,
    points: Sequence[Point],
    told: Callable[[float], str],
    bottom: float,
    top: float,
    named: bool,
) -> Iterator[str]:
    axis = _axis(points)

    def y(share: float) -> float:
        return PANEL_H * (top - share) / (top - bottom)

    for share in _shares(bottom, top):
        yield f'<line class="grid" x1="0" x2="{PANEL_W}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>'
        if named:
            yield f'<text x="-8" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
    marks = [(axis.at(value), told(value)) for value in axis.ticks()]
    for x, text in [*marks, *([(axis.at(0), "0")] if axis.zero else [])]:
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{PANEL_H}"/>'
        yield f'<text x="{x:.1f}" y="{PANEL_H + 17}" text-anchor="middle">{escape(text)}</text>'
    yield f'<rect class="frame" width="{PANEL_W}" height="{PANEL_H}"/>'
    yield f'<text class="axis" x="{PANEL_W / 2}" y="{PANEL_H + 37}" text-anchor="middle">{label}</text>'
    steps = [f"{axis.at(point.cost):.1f},{y(point.accuracy):.1f}" for point in front(points)]
    yield f'<polyline class="front" points="{" ".join(steps)}"/>'
    taken = [(axis.at(point.cost), y(point.accuracy)) for point in points]
    for point, (x, at) in zip(points, list(taken), strict=True):
        yield from _point(point, x, at, y(point.low), y(point.high), told)
        left, above = _free(x, at, taken)
        taken.append((left, above))
        yield (
            f'<text class="mark" style="fill:{point.colour}" x="{left:.1f}" y="{above + 4:.1f}" '
            f'text-anchor="middle">{point.number}</text>'
        )


def _point(
    point: Point, x: float, at: float, low: float, high: float, told: Callable[[float], str]
) -> Iterator[str]:
    """A dot on its interval, and what a pointer over it shows."""
    text = f"{point.name}: {point.accuracy:.1%} ({point.low:.1%} to {point.high:.1%}), {told(point.cost)}"
    yield f'<g stroke="{point.colour}" fill="{point.colour}"><title>{escape(text)}</title>'
    yield f'<path d="M{x:.1f} {high:.1f}V{low:.1f}M{x - 4:.1f} {high:.1f}h8M{x - 4:.1f} {low:.1f}h8"/>'
    yield f'<circle cx="{x:.1f}" cy="{at:.1f}" r="4"/></g>'


def _shares(bottom: float, top: float) -> list[float]:
    step = 0.1 if top - bottom > 0.35 else 0.05 if top - bottom > 0.15 else 0.02
    count = round((top - bottom) / step)
    return [bottom + step * k for k in range(count + 1)]


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a number beside the point meets the fewest others; inside the panel."""
    around = [
        (13, -9),
        (-13, -9),
        (13, 9),
        (-13, 9),
        (13, 0),
        (-13, 0),
        (24, 0),
        (-24, 0),
        (24, -12),
        (-24, 12),
    ]
    inside = [(x + dx, y + dy) for dx, dy in around if 8 < x + dx < PANEL_W - 8 and 8 < y + dy < PANEL_H - 8]

    def crowd(place: tuple[float, float]) -> float:
        return sum(max(0.0, 15 - math.hypot(place[0] - a, place[1] - b)) for a, b in taken)

    return min(inside or [(x + 13, y)], key=crowd)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in cost and accuracy (one that is equal in both beats the later), by cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.accuracy, one.number)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def _legend(methods: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for number, (name, entry) in enumerate(methods.items(), 1):
        row, column = divmod(number - 1, len(COSTS))
        x = LEFT + column * (PANEL_W + GAP)
        y = TOP + PANEL_H + BOTTOM + 14 + row * LEGEND_ROW
        colour = COLOURS[(number - 1) % len(COLOURS)]
        shown = name if len(name) <= 40 else f"{name[:39]}…"
        mark = f'class="mark" style="fill:{colour}" x="{x + 12}" y="{y}" text-anchor="end"'
        yield f"<text {mark}>{number}</text>"
        yield f'<text x="{x + 20}" y="{y}">{escape(shown)}, {entry["accuracy"]:.1%}</text>'
