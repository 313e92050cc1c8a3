"""The weights of a merge as a picture: for each target a heat map, blocks by the parts of a block."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varm_common.errors import UserError
from varm_common.files import write_whole
from varm_common.tables import short_names
from varm_merge.merging.weight_log import natural_order

__all__ = ["draw", "grid"]

OUTSIDE = "outside"
"""The column of tensors that lie in no block."""

Grid = tuple[list[str], list[str], dict[tuple[str, str], float]]


def grid(units: Sequence[Mapping[str, Any]], target: str) -> Grid:
    """Rows (parts of a block), columns (blocks) and the weights of a target's units at them.

    The block of a unit is its name up to its first number.
    """
    cells: dict[tuple[str, str], float] = {}
    for unit in units:
        found = re.match(r"(.*?\.\d+)(?:\.(.*))?$", str(unit["unit"]))
        column, row = (found[1], found[2] or "block") if found else (OUTSIDE, str(unit["unit"]))
        if weight := unit["targets"].get(target):
            cells[row.removesuffix(".weight"), column] = float(weight["weight"])
    columns = sorted({column for _, column in cells} - {OUTSIDE}, key=natural_order)
    columns += [OUTSIDE] if any(column == OUTSIDE for _, column in cells) else []
    rows = sorted({row for row, _ in cells}, key=lambda row: ((row, OUTSIDE) in cells, natural_order(row)))
    return rows, columns, cells


def draw(found: Mapping[str, Any], granularity: str, path: Path) -> None:
    """Write the weights of all targets at a granularity as a PNG.

    Args:
        found: What ``inspection.inspect`` has found.
        granularity: One of its ``units``.
        path: Of the picture.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install 'varm-merge[plots]'") from error
    targets, units = found["targets"], found["units"][granularity]
    names = dict(zip(targets, short_names(targets), strict=True))
    told = [{**unit, "targets": {"any": {"weight": 0.0}}} for unit in units if unit["targets"]]
    rows, columns, _ = grid(told, "any")
    size = (2.5 + len(targets) * max(1.5, 0.35 * len(columns)), 1.6 + 0.28 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for axes, target in zip(all_axes, targets, strict=True):
        cells = grid(units, target)[2]
        values = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
        image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_title(names[target])
        blocks = [column.rpartition(".")[2] for column in columns if column != OUTSIDE]
        axes.set_xticks(range(len(columns)), blocks + ["–"] * (len(columns) - len(blocks)))
        axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=list(all_axes), label=f"weight, {granularity}")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    write_whole(path, drawn.getvalue())
