"""Plots as inline SVG in the colours of the page. matplotlib draws them; every number is also in a table."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from markupsafe import Markup, escape

__all__ = ["Bar", "Plot", "Point", "available", "bars", "scatter"]

WIDTH, LINE, LONGEST = 5.0, 0.22, 18
"""Inches: the width of a plot, the height of a line of text. The most letters of a name."""
TEXT, GREY, GRID, CARD, MERGE, TARGET = DRAWN = [f"#{number:02x}0000" for number in range(1, 7)]
"""Colours that matplotlib draws in; ``_svg`` replaces them with those of the page's light or dark theme."""
VARIABLES = dict(zip(DRAWN, ("--text", "--muted", "--line", "--card", "--line-1", "--line-2"), strict=True))
COLOURS = {"pivot": TEXT, "target": TARGET, "merge": MERGE}
MARKERS = {"pivot": "s", "target": "^", "merge": "o"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "varm-merge",
    "font.size": 11.0,
    "axes.axisbelow": True,
    "xtick.labelcolor": GREY,
    **dict.fromkeys(("text.color", "axes.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("text.parse_math", "axes.spines.top", "axes.spines.right"), False),
}


@dataclass(frozen=True)
class Plot:
    """A title and the drawing."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Point:
    """A model in a plane."""

    name: str
    role: str
    x: float
    y: float


@dataclass(frozen=True)
class Bar:
    """A number of a model, and its standard error (0 if it has none)."""

    name: str
    role: str
    value: float
    error: float


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def bars(title: str, values: Sequence[Bar]) -> Plot:
    """Horizontal bars from zero, in the order given; thin lines are one standard error to each side."""
    with _axes(len(values) * LINE * 1.2 + 0.2) as (figure, axes):
        places = range(len(values))
        ends = [0.0, *(bar.value + bar.error for bar in values)]
        for place, bar in enumerate(values):
            axes.barh(place, bar.value, 0.75, color=COLOURS[bar.role], gid=_mark(bar))
            # dark bars need the light border
            for colour, width in ((CARD, 4.0), (TEXT, 1.5)) if bar.error else ():
                axes.errorbar(bar.value, place, xerr=bar.error, color=colour, linewidth=width)
            number = f"{bar.value:,.0f}" if abs(bar.value) >= 1000 else f"{bar.value:.3g}"
            end = max(bar.value, 0.0) + bar.error
            axes.annotate(number, (end, place), (4, 0), textcoords="offset points", va="center", color=GREY)
        axes.set_yticks(places, [_short(bar.name) for bar in values])
        axes.set_xlim(min(ends), max(ends) or 1.0)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.xaxis.set_visible(False)
        axes.tick_params("y", length=0)
        axes.spines[["bottom"]].set_visible(False)
        return Plot(title, _svg(title, figure))


def scatter(title: str, across: str, up: str, points: Sequence[Point]) -> Plot:
    """Points; their names are to the right in the order of height, each joined to its point by a thin line."""
    height = max(3.6, len(points) * LINE + 1.0)
    with _axes(height) as (figure, axes):
        for point in points:
            look = {"marker": MARKERS[point.role], "color": COLOURS[point.role], "markersize": 8}
            axes.plot(point.x, point.y, linestyle="", gid=_mark(point), **look)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.tick_params("y", labelcolor=GREY)
        axes.grid()
        axes.margins(0.08)
        low, high = axes.get_ylim()
        from_below = sorted(points, key=lambda point: point.y)
        places = _apart([(point.y - low) / (high - low) for point in from_below], LINE / (height - 0.9))
        for point, place in zip(from_below, places, strict=True):
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 5, "relpos": (0, 0.5)}
            look = {"textcoords": "axes fraction", "va": "center", "gid": "name", "arrowprops": line}
            axes.annotate(_short(point.name), (point.x, point.y), (1.08, place), **look)
        return Plot(title, _svg(title, figure))


def _apart(places: Sequence[float], step: float) -> list[float]:
    """Ascending places, moved until they are ``step`` apart and none is above 1."""
    lower: list[float] = []
    upper: list[float] = []
    for place in places:
        lower.append(max(place, lower[-1] + step) if lower else place)
    for place in reversed(lower):
        upper.append(min(place, upper[-1] - step) if upper else min(place, 1.0))
    return upper[::-1]


def _mark(model: Point | Bar) -> str:
    return f"mark {model.role}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


@contextmanager
def _axes(height: float) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font does not have; the browser has them
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(title: str, figure: Any) -> Markup:
    """The drawing as a part of a page. The ids of marks and names become classes, because ids may not repeat."""
    file, no_metadata = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = re.sub(r'<g id="(mark \w+|name)"', r'<g class="\1"', svg[svg.index("<svg ") :])
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub("|".join(VARIABLES), lambda colour: f"var({VARIABLES[colour[0]]})", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
