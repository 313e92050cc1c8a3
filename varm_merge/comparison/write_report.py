"""Writes a finished comparison: Markdown, JSON, one page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from varm_common.files import write_whole
from varm_common.process_usage import table
from varm_merge.comparison import plots
from varm_merge.comparison.report import (
    ALL,
    Column,
    Row,
    costs,
    distances,
    fairness,
    loss_table,
    main_measures,
    measure_of,
    named,
    problems,
    remarks,
    tables,
)
from varm_merge.inspection import page

__all__ = [
    "markdown",
    "write_page",
    "write_report",
]


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = ["# Merges side by side", f"    {report['command']}", report["machine"]]
    if wrong := problems(report):
        parts.append("## What went wrong\n\n" + "\n".join(f"- {one}" for one in wrong))
    for one in tables(report):
        rows = [
            [_escaped(named(name, role)), *(f"**{cell.text}**" if cell.best else cell.text for cell in cells)]
            for name, role, cells in one.rows
        ]
        parts.append(f"## {one.title}\n\n{one.note}\n\n{table([_escaped(name) for name in one.header], rows)}")
    parts.append("\n".join(f"- {one}" for one in [fairness(report), *remarks(report)]))
    parts.append("## Recipes\n\n" + "\n\n".join(_recipe(row, report) for row in report["rows"] if "recipe" in row))
    return "\n\n".join(parts) + "\n"


def _recipe(row: Row, report: Mapping[str, Any]) -> str:
    settings = f": {row['settings']}" if row["settings"] else ""
    fence = "`" * (3 if "```" not in row["recipe"]["text"] else 9)
    options = " ".join(report["mergekit_options"])
    return (
        f"### {row['name']}\n\n{row['method']}{settings}\n\n"
        f"    mergekit-yaml {row['recipe']['path']} OUT {options}\n\n"
        f"{fence}yaml\n{row['recipe']['text'].rstrip()}\n{fence}"
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_report(report: Mapping[str, Any], folder: Path, text: str) -> None:
    """Write ``report.json`` (its ``text``), ``report.md`` and ``report.html``.

    Raises:
        UserError: They cannot be written.
    """
    write_whole(folder / "report.json", text)
    write_whole(folder / "report.md", markdown(report))
    write_page(report, folder / "report.html")


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Raises:
        UserError: It cannot be written.
    """
    html = page.render(
        "compare.html",
        data={},
        report=report,
        tables=tables(report),
        problems=problems(report),
        remarks=[fairness(report), *remarks(report)],
        plots=list(_plots(report)),
    )
    page.write(path, html)


def _plots(report: Mapping[str, Any]) -> Iterator[plots.Plot]:
    rows = report["rows"]
    points = [
        plots.Point(row["name"], distance, loss, row["role"])
        for row in rows
        if (loss := loss_table(ALL, "").value(row)) is not None
        and (distance := distances(row).get("pivot")) is not None
    ]
    if len(points) > 1:
        yield plots.scatter(
            "Held-out loss against distance to the pivot", "distance to the pivot", "nats per byte", points
        )
    for column, title in zip(costs(report), ("Time, s", "Peak anonymous memory, MiB"), strict=False):
        yield plots.bars(title, _bars(column, rows))
    for task, one in main_measures(rows):
        found = [(row, measure_of(row, task, one["task"], one["metric"])) for row in rows]
        bars = [plots.Bar(row["name"], of["value"], row["role"], of["standard_error"]) for row, of in found if of]
        yield plots.bars(f"{one['task']}, {one['metric']}", bars)


def _bars(column: Column, rows: Sequence[Row]) -> list[plots.Bar]:
    found = [(row, column.value(row)) for row in rows]
    return [
        plots.Bar(row["name"], value, row["role"])
        for row, value in found
        if value is not None and math.isfinite(value)
    ]
