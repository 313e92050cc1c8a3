"""The columns of a comparison's tables: a number of every row, how it is written, and which numbers are better."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from varm_common.process_usage import spread
from varm_common.standard_errors import NOISE

__all__ = [
    "ALL",
    "Column",
    "Row",
    "cost_columns",
    "get",
    "group_names",
    "loss",
    "loss_minus_pivot",
    "main_task_columns",
    "matched",
    "sign_agreement",
    "task_columns",
    "to_pivot",
    "to_target",
]

Row = Mapping[str, Any]
"""One of the report's ``rows``."""
ALL = "all"
"""The group of all held-out rows."""

Number = Callable[[Row], float | None]


@dataclass(frozen=True)
class Column:
    """A number of each row.

    Attributes:
        title: The header.
        format: How the number is written.
        value: The number; None if the row has none.
        better: ``min`` or ``max``; None if neither is better.
        error: The standard error of the number.
        differ: Whether the numbers of two rows differ by more than noise; None if the noise is not known.
        text: How the number is written if ``format`` is not enough.
    """

    title: str
    format: str
    value: Number
    better: str | None = None
    error: Number | None = None
    differ: Callable[[Row, Row], bool] | None = None
    text: Callable[[Row], str] | None = None

    def shown(self, row: Row) -> str:
        """The number of a row with its standard error; a dash if there is none."""
        if (value := self.value(row)) is None:
            return "–"
        if self.text:
            return self.text(row)
        error = self.error(row) if self.error else None
        return f"{value:{self.format}}" + ("" if error is None else f" ± {error:{self.format.lstrip('+')}}")

    def best(self, rows: Sequence[Row]) -> float | None:
        """The best number, if the rows differ and the best differs from every other by more than noise."""
        values = {id(row): value for row in rows if (value := self.value(row)) is not None}
        if self.better is None or len(values) < 2 or min(values.values()) == max(values.values()):
            return None
        best = (min if self.better == "min" else max)(values.values())
        known = [row for row in rows if id(row) in values]
        first = next(row for row in known if values[id(row)] == best)
        differ = self.differ or (lambda _one, _other: True)
        return best if all(differ(first, row) for row in known if row is not first) else None


def get(content: Any, *keys: str) -> Any:
    """An entry of nested mappings; None if one of the keys is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def cost_columns(rows: Sequence[Row]) -> list[Column]:
    """Time and memory of the merges; none if nothing was merged."""

    def cost(title: str, name: str, digits: int) -> Column:
        def numbers(row: Row) -> list[float]:
            return [run[name] for run in row["runs"] if run[name] is not None]

        def value(row: Row) -> float | None:
            return median(numbers(row)) if numbers(row) else None

        def text(row: Row) -> str:
            return spread(numbers(row), digits) if len(row["runs"]) > 1 else f"{value(row):.{digits}f}"

        return Column(title, "", value, "min", text=text)

    merged = any(row["runs"] for row in rows)
    return [cost("time, s", "wall_s", 1), cost("memory, MiB", "anonymous_mib", 0)] if merged else []


def to_pivot() -> Column:
    return Column("distance to pivot", "#.3g", lambda row: get(row, "distances", "pivot"))


def to_target(target: str, name: str, form: str, better: str) -> Column:
    """A distance, cosine or sign agreement of each model, except of the target itself."""

    def value(row: Row) -> float | None:
        return None if row["name"] == target else get(row, "distances", "targets", target, name)

    return Column(target, form, value, better)


def sign_agreement() -> Column:
    """The mean over the targets, for merges."""

    def value(row: Row) -> float | None:
        targets = (get(row, "distances", "targets") or {}) if row["role"] == "merge" else {}
        shares = [share for numbers in targets.values() if (share := numbers["sign_agreement"]) is not None]
        return mean(shares) if shares else None

    return Column("sign agreement", ".1%", value, "max")


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

    return Column(title, form, lambda row: get(row, "held_out", group, score), better, differ=differ)


def loss_minus_pivot(pivot: str, group: str) -> Column:
    def number(row: Row, index: int) -> float | None:
        gap_and_error = get(row, "held_out", group, "against", pivot, "nats_per_byte")
        return gap_and_error[index] if gap_and_error else None

    return Column(group, "+.4f", lambda row: number(row, 0), error=lambda row: number(row, 1))


def task_columns(rows: Sequence[Row]) -> list[Column]:
    """Every metric of every task."""
    return [_measure(task, measure) for task, measure in _measures(rows)]


def main_task_columns(rows: Sequence[Row]) -> list[Column]:
    """The first metric of each task: of a group as a whole, of each task of a tag."""
    every = _measures(rows)
    groups = {task for task, measure in every if measure["group"]}
    first: dict[tuple[str, str], Column] = {}
    for task, measure in every:
        if measure["group"] or task not in groups:
            first.setdefault((task, measure["task"]), _measure(task, measure))
    return list(first.values())


def _measures(rows: Sequence[Row]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each metric, from the first row that has it, with the task it was measured for."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        for task, measures in row["tasks"].items():
            for measure in measures:
                found.setdefault((task, measure["task"], measure["metric"]), measure)
    return [(task, measure) for (task, _, _), measure in found.items()]


def _measure(task: str, measure: Mapping[str, Any]) -> Column:
    subtask, metric = measure["task"], measure["metric"]

    def number(row: Row, key: str) -> float | None:
        own = {(other["task"], other["metric"]): other for other in row["tasks"].get(task, ())}
        value: float | None = get(own.get((subtask, metric)), key)
        return value

    def differ(row: Row, other: Row) -> bool:
        """Not paired: the harness gives one error for each model."""
        values = [number(model, "value") or 0.0 for model in (row, other)]
        errors = [error for model in (row, other) if (error := number(model, "standard_error")) is not None]
        return len(errors) == 2 and abs(values[0] - values[1]) > NOISE * math.hypot(*errors)

    return Column(
        f"{subtask}, {metric}",
        ".3f",
        lambda row: number(row, "value"),
        "max" if measure["higher_is_better"] else "min",
        lambda row: number(row, "standard_error"),
        differ,
    )
