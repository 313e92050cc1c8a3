"""The columns of a comparison's tables: the cell of every row, and which numbers are better."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

from varm_common.process_usage import spread
from varm_common.standard_errors import NOISE
from varm_merge.comparison.suites import SHOTS

__all__ = [
    "ALL",
    "Cell",
    "Column",
    "Row",
    "costs",
    "get",
    "group_names",
    "loss",
    "loss_minus_pivot",
    "matched",
    "sign_agreement",
    "task_measures",
    "to_pivot",
    "to_target",
]

Row = Mapping[str, Any]
"""One of the report's ``rows``."""
ALL = "all"
"""The group of all held-out rows."""


@dataclass(frozen=True)
class Cell:
    """A number as text, the number, its standard error, and whether it is the best of its column."""

    text: str = "–"
    value: float | None = None
    error: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A number of each row.

    Attributes:
        title: The header.
        cell: The number of a row.
        better: ``min`` or ``max``; None if neither is better.
        differ: Whether the numbers of two rows differ by more than noise; None if the noise is not known.
    """

    title: str
    cell: Callable[[Row], Cell]
    better: str | None = None
    differ: Callable[[Row, Row], bool] | None = None

    def cells(self, rows: Sequence[Row]) -> list[Cell]:
        """The cells; the best is marked if it differs from every other by more than noise."""
        cells = [self.cell(row) for row in rows]
        known = [(row, cell.value) for row, cell in zip(rows, cells, strict=True) if cell.value is not None]
        if self.better is None or len({value for _, value in known}) < 2:
            return cells
        best = (min if self.better == "min" else max)(value for _, value in known)
        first = next(row for row, value in known if value == best)
        if self.differ and not all(self.differ(first, row) for row, _ in known if row is not first):
            return cells
        return [replace(cell, best=cell.value == best) for cell in cells]


def get(content: Any, *keys: str) -> Any:
    """An entry of nested mappings; None if one of the keys is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _cell(value: float | None, form: str, error: float | None = None) -> Cell:
    if value is None:
        return Cell()
    return Cell(f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}"), value, error)


def costs(rows: Sequence[Row]) -> list[Column]:
    """Time and memory of the merges; none if nothing was merged."""

    def cost(title: str, name: str, digits: int) -> Column:
        def cell(row: Row) -> Cell:
            numbers = [run[name] for run in row["runs"] if run[name] is not None]
            if len(row["runs"]) > 1 and numbers:
                return Cell(spread(numbers, digits), median(numbers))
            return _cell(numbers[0] if numbers else None, f".{digits}f")

        return Column(title, cell, "min")

    merged = any(row["runs"] for row in rows)
    return [cost("time, s", "wall_s", 1), cost("memory, MiB", "anonymous_mib", 0)] if merged else []


def to_pivot() -> Column:
    return Column("distance to pivot", lambda row: _cell(get(row, "distances", "pivot"), "#.3g"))


def to_target(target: str, name: str, form: str, better: str) -> Column:
    """A distance, cosine or sign agreement of each model, except of the target itself."""

    def cell(row: Row) -> Cell:
        return Cell() if row["name"] == target else _cell(get(row, "distances", "targets", target, name), form)

    return Column(target, cell, better)


def sign_agreement() -> Column:
    """The mean over the targets, for merges."""

    def cell(row: Row) -> Cell:
        targets = (get(row, "distances", "targets") or {}) if row["role"] == "merge" else {}
        shares = [share for numbers in targets.values() if (share := numbers["sign_agreement"]) is not None]
        return _cell(mean(shares) if shares else None, ".1%")

    return Column("sign agreement", cell, "max")


def group_names(rows: Sequence[Row]) -> list[str]:
    """The groups of held-out conversations."""
    return list(dict.fromkeys(group for row in rows for group in row["held_out"] or {}))


def loss(group: str, title: str) -> Column:
    return _held_out(title, ".4f", group, "nats_per_byte", "min")


def matched() -> Column:
    return _held_out("answers matched", ".1%", ALL, "exact_match", "max")


def _held_out(title: str, form: str, group: str, score: str, better: str) -> Column:
    def differ(row: Row, other: Row) -> bool:
        gap, error = get(row, "held_out", group, "against", other["name"], score) or (None, None)
        return gap is not None and error is not None and abs(gap) > NOISE * error

    return Column(title, lambda row: _cell(get(row, "held_out", group, score), form), better, differ)


def loss_minus_pivot(pivot: str, group: str) -> Column:
    def cell(row: Row) -> Cell:
        gap, error = get(row, "held_out", group, "against", pivot, "nats_per_byte") or (None, None)
        return _cell(gap, "+.4f", error)

    return Column(group, cell)


def task_measures(rows: Sequence[Row], main: bool = False) -> list[Column]:
    """Every metric of every task; the ``main`` ones are the first of each group as a whole, or of each task."""
    by_metric: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        for task, measures in row["tasks"].items():
            for measure in measures:
                by_metric.setdefault((task, measure["task"], measure["metric"]), measure)
    keys = list(by_metric)
    if main:
        groups = {key[0] for key in keys if by_metric[key]["group"]}
        first: dict[tuple[str, str], tuple[str, str, str]] = {}
        for key in keys:
            if by_metric[key]["group"] or key[0] not in groups:
                first.setdefault(key[:2], key)
        keys = list(first.values())
    return [_measure(*key, by_metric[key]["higher_is_better"]) for key in keys]


def _measure(task: str, subtask: str, metric: str, higher_is_better: bool) -> Column:
    def cell(row: Row) -> Cell:
        for measure in row["tasks"].get(task, ()):
            if (measure["task"], measure["metric"]) == (subtask, metric):
                return _cell(measure["value"], ".3f", measure["standard_error"])
        return Cell()

    def differ(row: Row, other: Row) -> bool:
        """Not paired: the harness gives one error for each model."""
        first, second = cell(row), cell(other)
        if first.value is None or second.value is None or first.error is None or second.error is None:
            return False
        return abs(first.value - second.value) > NOISE * math.hypot(first.error, second.error)

    shots = SHOTS.fullmatch(task)
    name = f"{subtask}:{shots['shots']}" if shots else subtask
    return Column(f"{name}, {metric}", cell, "max" if higher_is_better else "min", differ)
