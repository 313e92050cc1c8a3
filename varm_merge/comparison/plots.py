"""Plots as inline SVG, in the colours of the page and its theme; every number also stands in a table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Bar", "Plot", "Point", "bars", "scatter"]

WIDTH = 360
"""In units of text 11 high: as wide as a telephone."""
BOTTOM = 300.0
"""Of the plane of a scatter plot."""
LETTER, LINE = 7.0, 13.0
NAME = 18
"""Most letters of a name."""
COLOURS = {"pivot": "var(--text)", "target": "var(--line-2)", "merge": "var(--line-1)"}
SHAPES = {"pivot": "M-5 -5H5V5H-5Z", "target": "M0 -6L6 5H-6Z"}
"""What is no circle: roles are told by shape as well as by colour."""


@dataclass(frozen=True)
class Plot:
    """A title, and the drawing."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Point:
    """A model in a plane."""

    name: str
    x: float
    y: float
    role: str


@dataclass(frozen=True)
class Bar:
    """A model's number, and its standard error if it has one."""

    name: str
    value: float
    role: str
    error: float | None = None


def bars(title: str, values: Sequence[Bar]) -> Plot:
    """Horizontal bars from zero, in the order given; lines are one standard error to each side."""
    left = min(NAME, max(len(bar.name) for bar in values)) * LETTER + 8
    right = max(len(_number(bar.value)) for bar in values) * LETTER + 8
    ends = [abs(bar.value) + (bar.error or 0.0) for bar in values]
    scale = (WIDTH - left - right) / (max(ends) or 1.0)
    parts = []
    for number, bar in enumerate(values):
        y, end = 18 * number + 3, left + max(bar.value, 0.0) * scale
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 11}" text-anchor="end">{escape(_short(bar.name))}</text>'
            f'<rect x="{left:.1f}" y="{y}" width="{end - left:.1f}" height="14" rx="2" fill="{COLOURS[bar.role]}">'
            f"<title>{escape(bar.name)}: {_number(bar.value)}</title></rect>"
        )
        if bar.error:
            ends_of = [max(left, left + (bar.value + side * bar.error) * scale) for side in (-1, 1)]
            line = f"M{ends_of[0]:.1f} {y + 7}H{ends_of[1]:.1f}"
            parts.append(f'<path d="{line}" class="halo"/><path d="{line}" class="error"/>')
            end = max(end, ends_of[1])
        parts.append(f'<text x="{end + 4:.1f}" y="{y + 11}" class="value">{_number(bar.value)}</text>')
    return Plot(title, _svg(title, 18 * len(values) + 4, parts))


def scatter(title: str, across: str, up: str, points: Sequence[Point]) -> Plot:
    """Points with their names."""
    left, right, top, bottom = 44.0, WIDTH - 18.0, 10.0, BOTTOM
    x_ticks, y_ticks = _ticks([point.x for point in points]), _ticks([point.y for point in points])

    def place(value: float, ticks: Sequence[float], start: float, end: float) -> float:
        return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)

    parts = []
    for tick in x_ticks:
        x = place(tick, x_ticks, left, right)
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" class="value">{tick:g}</text>')
    for tick in y_ticks:
        y = place(tick, y_ticks, bottom, top)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" class="grid"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" class="value">{tick:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(across)}</text>')
    turned = f"translate(11 {(top + bottom) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(up)}</text>')
    places = [(place(p.x, x_ticks, left, right), place(p.y, y_ticks, bottom, top)) for p in points]
    for point, (x, y), (label_x, label_y) in zip(
        points, places, _labels(points, places, left, right), strict=True
    ):
        colour = COLOURS[point.role]
        shape = SHAPES.get(point.role)
        drawn = f'<path d="{shape}"/>' if shape else '<circle r="5"/>'
        told = f"{point.name}: {_number(point.x)}, {_number(point.y)}"
        if abs(label_y - y) > 1.3 * LINE:
            edge = label_y + math.copysign(LINE / 2, y - label_y)
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{label_x:.1f} {edge:.1f}" class="leader"/>')
        at, name = f'x="{label_x:.1f}" y="{label_y + 4:.1f}"', escape(_short(point.name))
        parts.append(
            f'<g transform="translate({x:.1f} {y:.1f})" fill="{colour}"><title>{escape(told)}</title>{drawn}</g>'
            f'<text {at} text-anchor="middle">{name}</text>'
        )
    return Plot(title, _svg(title, bottom + 38, parts))


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float]], left: float, right: float
) -> Iterator[tuple[float, float]]:
    """Where the middle of each name goes: near its point, on no other name and no point."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        half = len(_short(point.name)) * LETTER / 2
        best = (x, y - LINE)
        for x_step, y_step in _around(half):
            where = (min(max(x + x_step, left + half), right - half), y + y_step)
            box = (where[0] - half, where[1] - LINE / 2, where[0] + half, where[1] + LINE / 2)
            if 8 < where[1] < BOTTOM - 4 and not any(_overlap(box, other) for other in taken):
                best = where
                break
        taken.append((best[0] - half, best[1] - LINE / 2, best[0] + half, best[1] + LINE / 2))
        yield best


def _around(half: float) -> Iterator[tuple[float, float]]:
    """Steps from a point to the middle of its name, the nearest first."""
    for ring in range(14):
        away = LINE * ring / 2
        for side in (1, -1):
            yield side * (half + 8), side * away
            yield side * (half + 8), -side * away
            yield 0.0, -side * (LINE + away)
            yield side * (half / 2), -side * (LINE + away)


Box = tuple[float, float, float, float]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, three to seven, around all values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step = next(step * factor for factor in (0.2, 0.5, 1.0, 2.0) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last += first == last
    return [round(number * step, 12) for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _svg(title: str, height: float, parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")
