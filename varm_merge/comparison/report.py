"""A comparison as tables: for a terminal, in Markdown, and on a page with plots."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from varm_common.process_usage import spread
from varm_common.standard_errors import NOISE

__all__ = [
    "ALL",
    "Cell",
    "Column",
    "Row",
    "Table",
    "costs",
    "distances",
    "fairness",
    "loss_table",
    "main_measures",
    "measure_of",
    "named",
    "problems",
    "remarks",
    "tables",
    "terminal",
]

Row = Mapping[str, Any]
"""One of the report's ``rows``."""
ALL = "all"
"""The group of all held-out rows."""
MARKED = (
    "The best of a column is marked; a held-out score or a task's only if it differs from every other by more "
    f"than {NOISE:g} standard errors."
)
TO_TARGETS = (
    (
        "distance",
        "Distance to each target",
        "‖merged − target‖ / ‖pivot‖.",
        "#.3g",
        "min",
        ("pivot", "target", "merge"),
    ),
    (
        "cosine",
        "Cosine with each task vector",
        "Of the delta: 1 is its direction.",
        ".3f",
        "max",
        ("target", "merge"),
    ),
    (
        "sign_agreement",
        "Sign agreement with each target",
        "Of the elements that the target moved, the share moved in the same direction.",
        ".1%",
        "max",
        ("target", "merge"),
    ),
)
"""Name, title, note, form, better end, and whose."""


@dataclass(frozen=True)
class Cell:
    """What is shown, the number it is sorted by, and whether it is the best of its column."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A number of each row.

    Attributes:
        title: Its header.
        value: The number, None where there is none.
        text: How it is shown.
        better: ``min`` or ``max``, None where neither end is better.
        differ: Whether the numbers of two rows differ by more than noise; None where the noise is not known.
    """

    title: str
    value: Callable[[Row], float | None]
    text: Callable[[Row, float], str]
    better: str | None = None
    differ: Callable[[Row, Row], bool] | None = None


@dataclass(frozen=True)
class Table:
    """A row for each model: its name, its role, its cells."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[tuple[str, str, list[Cell]]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables of a comparison."""
    rows: Sequence[Row] = report["rows"]
    targets = [row["name"] for row in rows if row["role"] == "target"]
    pivots = [row["name"] for row in rows if row["role"] == "pivot" and row["held_out"]]
    made = [
        _table(
            "side-by-side",
            "Side by side",
            f"Time and memory of whole mergekit-yaml runs, {_memory(report)}. Distance: ‖merged − pivot‖ / "
            "‖pivot‖. "
            "Sign agreement: of the elements that a target moved, the share that the merge moved in the same "
            f"direction; the mean over the targets. {MARKED}",
            [*costs(report), *_ends(), *_scores(rows)],
            rows,
        ),
        *(
            _table(
                name,
                title,
                note,
                [_of_target(target, name, form, better) for target in targets],
                [row for row in rows if distances(row) and row["role"] in roles],
            )
            for name, title, note, form, better, roles in TO_TARGETS
        ),
        _table(
            "held-out",
            "Held-out loss by group, nats per byte",
            f"Groups are the parts of the conversations' ids before the first “/”. {MARKED}",
            [loss_table(group, group) for group in _groups(rows) if group != ALL],
            rows,
        ),
        _table(
            "held-out-difference",
            "Held-out loss less the pivot's, nats per byte",
            "Below 0 is better. ± is the standard error over conversations, of the two models' differences on the "
            f"same ones. Less than {NOISE:g} standard errors is noise.",
            [_less(pivot, group) for pivot in pivots for group in _groups(rows)],
            [row for row in rows if row["role"] != "pivot" and row["held_out"]],
        ),
        _table(
            "tasks",
            "Tasks, all metrics",
            f"By lm-evaluation-harness, ± its standard error. {MARKED}",
            [_measure(task, one) for task, one in _measures(rows)],
            rows,
        ),
    ]
    return [one for one in made if len(one.header) > 1 and one.rows]


def _table(name: str, title: str, note: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    best = {}
    for number, column in enumerate(columns):
        values = [value for row in rows if (value := column.value(row)) is not None]
        if column.better and len(values) > 1 and min(values) < max(values):
            end = min(values) if column.better == "min" else max(values)
            if _stands_out(column, end, rows):
                best[number] = end
    cells = [
        (row["name"], _role(row), [_cell(column, row, best.get(n)) for n, column in enumerate(columns)])
        for row in rows
    ]
    return Table(name, title, note, ["model", *(column.title for column in columns)], cells)


def _stands_out(column: Column, end: float, rows: Sequence[Row]) -> bool:
    """Whether the row with the best number differs from every other by more than noise, where that is known."""
    differ, known = column.differ, [row for row in rows if column.value(row) is not None]
    first = next(row for row in known if column.value(row) == end)
    return differ is None or all(differ(first, row) for row in known if row is not first)


def _cell(column: Column, row: Row, best: float | None) -> Cell:
    value = column.value(row)
    return Cell("–") if value is None else Cell(column.text(row, value), value, value == best)


def _role(row: Row) -> str:
    if row["role"] != "merge":
        return str(row["role"])
    return "failed" if not row["runs"] else "merge"


def _memory(report: Mapping[str, Any]) -> str:
    return f"peak of {report['memory']}" + (f", median of {report['repeat']} runs" if report["repeat"] > 1 else "")


def costs(report: Mapping[str, Any]) -> list[Column]:
    """The columns of time and memory."""

    def column(title: str, name: str, digits: int) -> Column:
        def numbers(row: Row) -> list[float]:
            return [run[name] for run in row["runs"] if run[name] is not None]

        def text(row: Row, value: float) -> str:
            return spread(numbers(row), digits) if len(row["runs"]) > 1 else f"{value:.{digits}f}"

        return Column(title, lambda row: median(numbers(row)) if numbers(row) else None, text, "min")

    if not any(row["runs"] for row in report["rows"]):
        return []
    return [column("time, s", "wall_s", 1), column("memory, MiB", "anonymous_mib", 0)]


def distances(row: Row) -> Mapping[str, Any]:
    found = row["distances"] or {}
    return {} if "not_comparable" in found else found


def _ends() -> list[Column]:
    def agreement(row: Row) -> float | None:
        own = distances(row).get("targets", {}) if row["role"] == "merge" else {}
        known = [of["sign_agreement"] for of in own.values() if of["sign_agreement"] is not None]
        return sum(known) / len(known) if known else None

    return [
        Column("distance to pivot", lambda row: distances(row).get("pivot"), lambda _, value: f"{value:#.3g}"),
        Column("sign agreement", agreement, lambda _, value: f"{value:.1%}", "max"),
    ]


def _of_target(target: str, name: str, form: str, better: str) -> Column:
    def value(row: Row) -> float | None:
        if row["name"] == target:
            return None  # itself
        found: float | None = distances(row).get("targets", {}).get(target, {}).get(name)
        return found

    return Column(target, value, lambda _, number: format(number, form), better)


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(group for row in rows for group in row["held_out"] or {}))


def loss_table(group: str, title: str) -> Column:
    def value(row: Row) -> float | None:
        found: float | None = (row["held_out"] or {}).get(group, {}).get("nats_per_byte")
        return found

    return Column(title, value, lambda _, number: f"{number:.4f}", "min", _differ(group, "nats_per_byte"))


def _against(row: Row, other: str, group: str, score: str) -> tuple[float | None, float | None]:
    """The difference of a score to another model's, and its standard error; None where it is not known."""
    found = (row["held_out"] or {}).get(group, {}).get("against", {}).get(other, {})
    gap, error = found.get(score) or (None, None)
    return gap, error


def _differ(group: str, score: str) -> Callable[[Row, Row], bool]:
    def differ(one: Row, other: Row) -> bool:
        gap, error = _against(one, other["name"], group, score)
        return gap is not None and error is not None and abs(gap) > NOISE * error

    return differ


def _less(pivot: str, group: str) -> Column:
    def text(row: Row, gap: float) -> str:
        error = _against(row, pivot, group, "nats_per_byte")[1]
        return f"{gap:+.4f}" + ("" if error is None else f" ± {error:.4f}")

    return Column(group, lambda row: _against(row, pivot, group, "nats_per_byte")[0], text)


def _scores(rows: Sequence[Row]) -> Iterator[Column]:
    if any(row["held_out"] for row in rows):
        yield loss_table(ALL, "loss, nats/byte")
        yield Column(
            "answers matched",
            lambda row: (row["held_out"] or {}).get(ALL, {}).get("exact_match"),
            lambda _, value: f"{value:.1%}",
            "max",
            _differ(ALL, "exact_match"),
        )
    for task, one in main_measures(rows):
        yield _measure(task, one)


def _measures(rows: Sequence[Row]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every metric of every task asked for, of the first row that has it."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        for task, measures in row["tasks"].items():
            for one in measures:
                found.setdefault((task, one["task"], one["metric"]), one)
    return [(task, one) for (task, _, _), one in found.items()]


def main_measures(rows: Sequence[Row]) -> list[tuple[str, Mapping[str, Any]]]:
    """The first metric of each task asked for: of a group as a whole, of each task of a tag."""
    every = _measures(rows)
    groups = {task for task, one in every if one["group"]}
    firsts: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
    for task, one in every:
        if one["group"] or task not in groups:
            firsts.setdefault((task, one["task"]), (task, one))
    return list(firsts.values())


def measure_of(row: Row, task: str, subtask: str, metric: str) -> Mapping[str, Any] | None:
    """One metric of a row."""
    found = (one for one in row["tasks"].get(task, ()) if (one["task"], one["metric"]) == (subtask, metric))
    return next(found, None)


def _measure(task: str, one: Mapping[str, Any]) -> Column:
    subtask, metric = one["task"], one["metric"]

    def value(row: Row) -> float | None:
        found = measure_of(row, task, subtask, metric)
        return found["value"] if found else None

    def text(row: Row, number: float) -> str:
        found = measure_of(row, task, subtask, metric)
        error = found["standard_error"] if found else None
        return f"{number:.3f}" if error is None else f"{number:.3f} ± {error:.3f}"

    def differ(first: Row, second: Row) -> bool:
        """Not paired: the harness gives one error for each model."""
        both = [found for row in (first, second) if (found := measure_of(row, task, subtask, metric))]
        errors = [found["standard_error"] for found in both]
        return None not in errors and abs(both[0]["value"] - both[1]["value"]) > NOISE * math.hypot(*errors)

    better = "max" if one["higher_is_better"] else "min"
    return Column(f"{subtask}, {metric}", value, text, better, differ)


def terminal(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table; the best of a column has a star."""
    for one in tables(report):
        starred = [
            [named(name, role), *(f"{cell.text}{'*' if cell.best else ' '}" for cell in cells)]
            for name, role, cells in one.rows
        ]
        yield one.title, one.header, starred


def named(name: str, role: str) -> str:
    return name if role in ("merge", name) else f"{name} ({role})"


def problems(report: Mapping[str, Any]) -> list[str]:
    """What went wrong, a sentence each."""
    return [f"{row['name']}: {problem}" for row in report["rows"] for problem in row["problems"]]


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the numbers."""
    told = []
    for row in report["rows"]:
        found = row["distances"] or {}
        if "not_comparable" in found:
            told.append(
                f"{row['name']} is not compared with the pivot and the targets: {found['not_comparable']}."
            )
        elif left := found.get("not_compared", {}).get("tensors"):
            some = ", ".join(found["not_compared"]["some"])
            told.append(
                f"{row['name']}: {left} tensors are not in all models in one shape and not compared ({some})."
            )
        if cut := (row["held_out"] or {}).get(ALL, {}).get("cut_tokens"):
            told.append(f"{row['name']}: {cut} held-out tokens lie beyond its context and are not scored.")
    if report["input_bytes"] > report["memory_bytes"]:
        told.append("The inputs are larger than the memory: reading them from the disk is part of every time.")
    return told


def fairness(report: Mapping[str, Any]) -> str:
    """How times and memory were measured."""
    return (
        "The inputs were read once before the first merge; merges ran one after another, each in a process of its "
        f"own. Memory is the {_memory(report)}: what is allocated, not mapped files."
    )
