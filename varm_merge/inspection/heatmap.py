"""The weights of a merge as a picture: for each target a heat map, drawn by matplotlib."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varm_common.errors import UserError
from varm_common.files import write_file
from varm_common.tables import short_names
from varm_merge.inspection.grid import Grid, Unit, grid

__all__ = ["draw", "weights"]


def weights(places: Grid, units: Sequence[Unit], target: str) -> NDArray[np.float64]:
    """The weights of a target by row and column; units outside all blocks in the last column; NaN elsewhere."""
    values_RC = np.full((len(places.rows), len(places.columns) + 1), np.nan)
    for unit in units:
        if numbers := unit["targets"].get(target):
            values_RC[places.cells[unit["unit"]]] = numbers["weight"]
    return values_RC


def draw(inspection: Mapping[str, Any], granularity: str, path: Path) -> None:
    """Write the weights of all targets at a granularity as a PNG.

    Args:
        inspection: The result of ``measure.inspect``.
        granularity: One of its ``units``.
        path: The file of the picture.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from error
    targets = inspection["targets"]
    units = [unit for unit in inspection["units"][granularity] if unit["targets"]]
    places = grid([units])
    columns = [block.rpartition(".")[2] for block in places.columns]
    columns += ["–"] if any(column < 0 for _, column in places.cells.values()) else []
    size = (2.5 + len(targets) * max(1.5, 0.35 * len(columns)), 1.6 + 0.28 * len(places.rows))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for axes, target, name in zip(all_axes, targets, short_names(targets), strict=True):
        values_RC = weights(places, units, target)[:, : len(columns)]
        image = axes.imshow(values_RC, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_title(name, parse_math=False)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(places.rows)), places.rows)
    figure.colorbar(image, ax=list(all_axes), label=f"weight, {granularity}")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font does not have
        figure.savefig(picture, dpi=120, format="png")
    write_file(path, picture.getvalue())
