"""The report of a comparison: tables in a terminal, Markdown, and one page with plots."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varm_common.files import write_file
from varm_common.standard_errors import NOISE
from varm_common.tables import markdown as markdown_table
from varm_merge.comparison import columns, plots
from varm_merge.comparison.columns import ALL, Cell, Column, Row, get
from varm_merge.inspection import page

__all__ = ["Table", "markdown", "problems", "tables", "terminal", "write_page", "write_report"]

MARKED = (
    "The best of a column is marked; a held-out score or a task's only if it differs from every other by more "
    f"than {NOISE:g} standard errors."
)
SAME_DIRECTION = "Of the elements that the target moved, the share moved in the same direction."
TO_TARGETS = (
    ("distance", "Distance to each target", "‖merged − target‖ / ‖pivot‖.", "#.3g", "min"),
    ("cosine", "Cosine with each task vector", "1: the merge moved in its direction.", ".3f", "max"),
    ("sign_agreement", "Sign agreement with each target", SAME_DIRECTION, ".1%", "max"),
)
"""Name, title, note, format, and which end is better."""


@dataclass(frozen=True)
class Table:
    """A row for each model: its name, its role (``failed`` for a merge without a model), its cells."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[tuple[str, str, list[Cell]]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables that have columns and rows."""
    rows: Sequence[Row] = report["rows"]
    targets = [row["name"] for row in rows if row["role"] == "target"]
    pivots = [row["name"] for row in rows if row["role"] == "pivot" and row["held_out"]]
    groups = columns.group_names(rows)
    distant = [row for row in rows if get(row, "distances", "targets") is not None]
    moved = [row for row in distant if row["role"] != "pivot"]
    summary = [*columns.costs(rows), columns.to_pivot(), columns.sign_agreement()]
    summary += [columns.loss(ALL, "loss, nats/byte"), columns.matched()] if groups else []
    summary += columns.task_measures(rows, main=True)
    note = (
        f"Time and memory of whole mergekit-yaml runs, {_memory(report)}. Distance: ‖merged − pivot‖ / ‖pivot‖. "
        "Sign agreement: of the elements that a target moved, the share that the merge moved in the same "
        f"direction; the mean over the targets. {MARKED}"
    )
    every = [_table("side-by-side", "Side by side", note, summary, rows)]
    for name, title, note, form, better in TO_TARGETS:
        numbers = [columns.to_target(target, name, form, better) for target in targets]
        every.append(_table(name, title, note, numbers, distant if name == "distance" else moved))
    note = f"Groups are the parts of the conversations' ids before the first “/”. {MARKED}"
    losses = [columns.loss(group, group) for group in groups if group != ALL]
    every.append(_table("held-out", "Held-out loss by group, nats per byte", note, losses, rows))
    note = (
        "Below 0 is better. ± is the standard error of the difference, from the two models' losses on the same "
        f"conversations. Less than {NOISE:g} standard errors is noise."
    )
    gaps = [columns.loss_minus_pivot(pivot, group) for pivot in pivots for group in groups]
    scored = [row for row in rows if row["role"] != "pivot" and row["held_out"]]
    title = "Held-out loss less the pivot's, nats per byte"
    every.append(_table("held-out-difference", title, note, gaps, scored))
    note = f"By lm-evaluation-harness, ± its standard error. {MARKED}"
    every.append(_table("tasks", "Tasks, all metrics", note, columns.task_measures(rows), rows))
    return [table for table in every if len(table.header) > 1 and table.rows]


def _table(name: str, title: str, note: str, shown: Sequence[Column], rows: Sequence[Row]) -> Table:
    cells = list(zip(*(column.cells(rows) for column in shown), strict=True)) if shown else [()] * len(rows)
    lines = [(row["name"], _role(row), list(own)) for row, own in zip(rows, cells, strict=True)]
    return Table(name, title, note, ["model", *(column.title for column in shown)], lines)


def _role(row: Row) -> str:
    return "failed" if row["role"] == "merge" and not row["runs"] else str(row["role"])


def _memory(report: Mapping[str, Any]) -> str:
    return f"peak of {report['memory']}" + (f", median of {report['repeat']} runs" if report["repeat"] > 1 else "")


def problems(report: Mapping[str, Any]) -> list[str]:
    """Problems of the comparison, one sentence each."""
    return [f"{row['name']}: {problem}" for row in report["rows"] for problem in row["problems"]]


def remarks(report: Mapping[str, Any]) -> list[str]:
    """How it was measured, and what a reader must know about the numbers."""
    lines = [
        "The inputs were read once before the first merge; merges ran one after another, each in a process of its "
        f"own. Memory is the {_memory(report)}: what is allocated, not mapped files."
    ]
    for row in report["rows"]:
        name, left_out = row["name"], get(row, "distances", "not_compared") or {"tensors": 0}
        if reason := get(row, "distances", "not_comparable"):
            lines.append(f"{name} is not compared with the pivot and the targets: {reason}.")
        if number := left_out["tensors"]:
            why = f"they differ in shape or are missing ({', '.join(left_out['some'])})"
            lines.append(f"{name}: {number} tensors are not compared, {why}.")
        if cut := get(row, "held_out", ALL, "cut_tokens"):
            lines.append(f"{name}: {cut} held-out tokens are beyond its context and are not scored.")
    if report["input_bytes"] > report["memory_bytes"]:
        lines.append("The inputs are larger than the memory: reading them from the disk is part of every time.")
    return lines


def _named(name: str, role: str) -> str:
    return name if role in ("merge", name) else f"{name} ({role})"


def terminal(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table; the best of a column has a star."""
    for table in tables(report):
        starred = [
            [_named(name, role), *(f"{cell.text}{'*' if cell.best else ' '}" for cell in cells)]
            for name, role, cells in table.rows
        ]
        yield table.title, table.header, starred


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = ["# Merges side by side", f"    {report['command']}", report["machine"]]
    if wrong := problems(report):
        parts.append("## What went wrong\n\n" + "\n".join(f"- {problem}" for problem in wrong))
    for table in tables(report):
        rows = [
            [_escaped(_named(name, role)), *(f"**{cell.text}**" if cell.best else cell.text for cell in cells)]
            for name, role, cells in table.rows
        ]
        header = [_escaped(title) for title in table.header]
        parts.append(f"## {table.title}\n\n{table.note}\n\n{markdown_table(header, rows)}")
    parts.append("\n".join(f"- {remark}" for remark in remarks(report)))
    parts += ["## Recipes", *(_recipe(row, report) for row in report["rows"] if "recipe" in row)]
    return "\n\n".join(parts) + "\n"


def _recipe(row: Row, report: Mapping[str, Any]) -> str:
    settings = f": {row['settings']}" if row["settings"] else ""
    fence = "`" * (3 if "```" not in row["recipe"]["text"] else 9)
    code = f"{fence}yaml\n{row['recipe']['text'].rstrip()}\n{fence}"
    return f"### {row['name']}\n\n{row['method']}{settings}\n\n    {_command(row, report)}\n\n{code}"


def _command(row: Row, report: Mapping[str, Any]) -> str:
    return shlex.join(["mergekit-yaml", row["recipe"]["path"], "OUT", *report["mergekit_options"]])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_report(report: Mapping[str, Any], folder: Path, text: str) -> None:
    """Write ``report.json`` (its ``text``), ``report.md`` and ``report.html``.

    Raises:
        UserError: They cannot be written.
    """
    write_file(folder / "report.json", text)
    write_file(folder / "report.md", markdown(report))
    write_page(report, folder / "report.html")


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Raises:
        UserError: It cannot be written.
    """
    drawn = _plots(report["rows"]) if plots.available() else None
    texts = {"tables": tables(report), "problems": problems(report), "remarks": remarks(report)}
    own = {"report": report, "plots": drawn, "command": _command, **texts}
    page.write(path, page.render("compare.html", data={}, **own))


def _plots(rows: Sequence[Row]) -> list[plots.Plot]:
    distances, losses = columns.to_pivot().cells(rows), columns.loss(ALL, "").cells(rows)
    points = [
        plots.Point(row["name"], row["role"], distance.value, loss.value)
        for row, distance, loss in zip(rows, distances, losses, strict=True)
        if distance.value is not None and loss.value is not None
    ]
    title = "Held-out loss against distance to the pivot"
    drawn = [plots.scatter(title, "distance to the pivot", "nats per byte", points)] if len(points) > 1 else []
    costs = zip(("Time, s", "Peak anonymous memory, MiB"), columns.costs(rows), strict=False)
    for title, column in [*costs, *((column.title, column) for column in columns.task_measures(rows, main=True))]:
        bars = [
            plots.Bar(row["name"], row["role"], cell.value, cell.error or 0.0)
            for row, cell in zip(rows, column.cells(rows), strict=True)
            if cell.value is not None
        ]
        drawn.append(plots.bars(title, bars))
    return drawn
