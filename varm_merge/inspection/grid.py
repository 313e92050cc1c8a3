"""Where each unit of a merge is in a heat map: columns are blocks, rows are the parts of a block."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from varm_merge.merging.weight_log import natural_order

__all__ = ["Grid", "Unit", "grid"]

Unit = Mapping[str, Any]
"""A unit as ``varm_weights.json`` and ``inspect`` describe it."""


@dataclass(frozen=True)
class Grid:
    """A heat map without its colours.

    Attributes:
        rows: The parts of a block; the units outside all blocks come last.
        columns: The blocks.
        cells: For each unit the index of its row and of its column, -1 outside all blocks.
    """

    rows: list[str]
    columns: list[str]
    cells: dict[str, tuple[int, int]]


def grid(granularities: Iterable[Iterable[Unit]]) -> Grid:
    """Place the units of some granularities.

    The names of parts end before ``.weight``, except where a granularity has another unit of that name.
    """
    places: dict[str, tuple[str, str]] = {}
    for units in granularities:
        own = {unit["unit"]: _place(unit["unit"]) for unit in units}
        short = Counter((block, part.removesuffix(".weight")) for block, part in own.values())
        for name, (block, part) in own.items():
            stem = part.removesuffix(".weight")
            places[name] = block, stem if short[block, stem] == 1 else part
    columns = sorted({block for block, _ in places.values() if block}, key=natural_order)
    parts = {(not block, part) for block, part in places.values()}
    rows = sorted(parts, key=lambda row: (row[0], natural_order(row[1])))
    row_of = {row: index for index, row in enumerate(rows)}
    column_of = {column: index for index, column in enumerate(columns)} | {"": -1}
    cells = {name: (row_of[not block, part], column_of[block]) for name, (block, part) in places.items()}
    return Grid([part for _, part in rows], columns, cells)


def _place(unit: str) -> tuple[str, str]:
    """The block of a unit, which is its name up to the first number, and the part of the block."""
    if name := re.match(r"(.*?\.\d+)(?:\.(.*))?$", unit, re.DOTALL):
        return name[1], name[2] or "whole block"
    return "", "whole model" if unit == "model" else unit
