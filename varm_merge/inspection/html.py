"""What ``inspect`` has found as one page: heat maps, plots and tables, in the data they need and no more."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from varm_common.tables import short_names
from varm_merge.inspection import page
from varm_merge.inspection.measure import RECIPE
from varm_merge.merging.weight_log import FILE_NAME, natural_order

__all__ = ["draw", "render"]

Unit = Mapping[str, Any]

MEANINGS = {
    "model": "all tensors at once",
    "layer": "a block at a time",
    "module": "attention, MLP and each norm of a block",
    "matrix": "a tensor, or a matrix of an expert, at a time",
    "parameter": "an element at a time",
}
"""What a unit of each granularity is."""


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        found: What ``inspection.inspect`` has found, of a recipe or of a finished merge.
        path: Of the page.

    Raises:
        UserError: It cannot be written.
    """
    page.write(path, render(found))


def render(found: Mapping[str, Any]) -> str:
    """The page's HTML."""
    targets: list[str] = found["targets"]
    names = short_names(targets)
    granularities = {key: _label(key, units) for key, units in found["units"].items()}
    tensors = [_moved(tensor, targets) for tensor in found.get("tensors", [])]
    depth = _depth(found.get("tensors", []), targets)
    return page.render(
        "inspection.html",
        found=found,
        name=_name(Path(found["recipe"]["path"])),
        recipe=yaml.safe_dump(found["recipe"]["content"], sort_keys=False, allow_unicode=True),
        names=names,
        granularities=granularities,
        bounds=_bounds(found["units"].values()),
        own=[_row(unit, targets) for unit in found["units"][RECIPE]],
        remarks=list(_remarks(found, targets)),
        effects=[_effect(key, units, targets, names) for key, units in found["units"].items()],
        tensors=sorted(tensors, key=lambda one: -one["greatest"]),
        depth=depth,
        agreement=_agreement(found, targets, names),
        data={
            "targets": names,
            "even": 1 / len(targets),
            "span": _span(found["units"].values()),
            **_placed(found["units"], targets),
            "labels": granularities,
            "depth": depth,
        },
    )


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.name == FILE_NAME else path.name


def _label(key: str, units: Iterable[Unit]) -> str:
    if key != RECIPE:
        return key
    return f"the recipe's own ({', '.join(dict.fromkeys(unit['granularity'] for unit in units))})"


# The heat maps


def _placed(units: Mapping[str, Sequence[Unit]], targets: Sequence[str]) -> dict[str, Any]:
    """Where each unit stands in a map of parts by blocks, and its numbers, with every text written once.

    Returns:
        ``rows`` and ``columns``, the labels of the map, a column as the path to its block and its number;
        ``units``, for each granularity a list of name, row, column (-1 outside the blocks), number of elements,
        of tensors, whether a target moved, and for each target its weight and statistic (null if it has none), or
        what is wrong with the unit.
    """
    places = _places(units.values())
    columns = sorted({block for block, _ in places.values() if block}, key=natural_order)
    rows = sorted({(not block, part) for block, part in places.values()}, key=lambda row: (row[0], _order(row[1])))
    row_of = {row: index for index, row in enumerate(rows)}
    column_of = {column: index for index, column in enumerate(columns)} | {"": -1}
    return {
        "rows": [part for _, part in rows],
        "columns": [list(column.rpartition(".")[::2]) for column in columns],
        "units": {
            key: [
                [
                    unit["unit"],
                    row_of[not places[unit["unit"]][0], places[unit["unit"]][1]],
                    column_of[places[unit["unit"]][0]],
                    unit["elements"],
                    len(unit["tensors"]),
                    int(unit.get("moved", True)),
                    unit.get("problem") or [_numbers(unit["targets"].get(target)) for target in targets],
                ]
                for unit in some
            ]
            for key, some in units.items()
        },
    }


def _places(units: Iterable[Iterable[Unit]]) -> dict[str, tuple[str, str]]:
    """Of each unit its block, "" outside all of them, and the part of the block that it is.

    Names of parts end before ``.weight``, except where a granularity has another unit of that name.
    """
    places = {}
    for some in units:
        of_these = {unit["unit"]: _place(unit["unit"]) for unit in some}
        short = Counter((block, part.removesuffix(".weight")) for block, part in of_these.values())
        for name, (block, part) in of_these.items():
            stem = part.removesuffix(".weight")
            places[name] = block, stem if short[block, stem] == 1 else part
    return places


def _place(unit: str) -> tuple[str, str]:
    """The block of a unit, which is its name up to the first number, and what of the block it is."""
    found = re.match(r"(.*?\.\d+)(?:\.(.*))?$", unit, re.DOTALL)
    if found:
        return found[1], found[2] or "whole block"
    return "", "whole model" if unit == "model" else unit


def _order(part: str) -> Any:
    return [(len(piece) if piece.isdigit() else -1, piece) for piece in part.split(".")]


def _numbers(of: Mapping[str, float] | None) -> list[float] | None:
    return None if of is None else [float(f"{of['weight']:.7g}"), float(f"{of['statistic']:.4g}")]


def _span(units: Iterable[Sequence[Unit]]) -> float:
    """The greatest distance of a weight from an even share: where the colours end, at all granularities."""
    return max((abs(weight - 1 / len(some)) for some in _weights(units) for weight in some), default=0.0)


def _bounds(units: Iterable[Iterable[Unit]]) -> tuple[float, float]:
    """The least and the greatest weight of all granularities, with some room."""
    all_weights = [weight for some in _weights(units) for weight in some] or [0.0, 1.0]
    return max(min(all_weights) - 0.02, 0.0), max(all_weights) + 0.02


def _weights(units: Iterable[Iterable[Unit]]) -> Iterable[list[float]]:
    for some in units:
        for unit in some:
            if unit["targets"]:
                yield [of["weight"] for of in unit["targets"].values()]


# Tables


def _row(unit: Unit, targets: Sequence[str]) -> dict[str, Any]:
    """A unit as the table of weights tells it."""
    remark = unit.get("problem") or ("" if unit.get("moved", True) else "no target moved: the pivot is kept")
    weights = [of and of["weight"] for of in map(unit["targets"].get, targets)]
    return {"unit": unit["unit"], "elements": unit["elements"], "weights": weights, "remark": remark}


def _remarks(found: Mapping[str, Any], targets: Sequence[str]) -> Iterable[str]:
    """What a reader must know before believing the colours."""
    for key, units in found["units"].items():
        where = "The recipe" if key == RECIPE else f"Granularity {key}"
        wrong = [unit["problem"] for unit in units if "problem" in unit]
        if wrong:
            yield f"{where}: {_counted(len(wrong), 'unit')} cannot be merged. {wrong[0]}"
    own = found["units"][RECIPE]
    still = [unit["unit"] for unit in own if not unit.get("moved", True)]
    if still:
        yield f"No target moved {_counted(len(still), 'unit')} ({_some(still)}): the pivot is kept there."
    fewer = [unit["unit"] for unit in own if "problem" not in unit and len(unit["targets"]) < len(targets)]
    if fewer:
        yield f"Not every target has {_counted(len(fewer), 'unit')} ({_some(fewer)}): the others share the weight."


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _effect(key: str, units: Sequence[Unit], targets: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What a granularity would do, in numbers and words."""
    sound = [unit for unit in units if unit["targets"]]
    elements = sum(unit["elements"] for unit in sound)
    apart = sum(
        unit["elements"] * sum(abs(of["weight"] - 1 / len(unit["targets"])) for of in unit["targets"].values()) / 2
        for unit in sound
    )
    spread = []
    for target in targets:
        weights = [of["weight"] for unit in sound if (of := unit["targets"].get(target))]
        spread.append((min(weights), median(weights), max(weights)) if weights else None)
    leads = Counter(_leader(unit) for unit in sound if unit.get("moved", True))
    told = [f"{names[targets.index(target)]}\N{NO-BREAK SPACE}{count:,}" for target, count in leads.most_common()]
    return {
        "label": _label(key, units),
        "meaning": MEANINGS.get(key, ""),
        "units": len(units),
        "spread": spread,
        "apart": apart / elements if elements else None,
        "leads": ", ".join(told) or "–",
    }


def _leader(unit: Unit) -> str:
    weights = {str(target): float(of["weight"]) for target, of in unit["targets"].items()}
    return max(weights, key=weights.__getitem__)


def _moved(tensor: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """A tensor as the table of moves tells it."""
    moves = [of and of["mean_squared_delta"] for of in map(tensor["targets"].get, targets)]
    greatest = max(move for move in moves if move is not None)
    pivot = tensor["pivot_mean_square"]
    return {
        "tensor": tensor["tensor"],
        "elements": tensor["elements"],
        "moves": moves,
        "greatest": greatest,
        "relative": math.sqrt(greatest / pivot) if pivot else None,
    }


def _depth(tensors: Iterable[Mapping[str, Any]], targets: Sequence[str]) -> list[dict[str, Any]]:
    """For each block, the mean squared delta of each target over all its elements."""
    sums: dict[str, list[list[float]]] = {}
    for tensor in tensors:
        if tensor["block"] is None:
            continue
        of_block = sums.setdefault(tensor["block"], [[0.0, 0.0] for _ in targets])
        for total, target in zip(of_block, targets, strict=True):
            if of := tensor["targets"].get(target):
                total[0] += of["mean_squared_delta"] * tensor["elements"]
                total[1] += tensor["elements"]
    return [
        {
            "stack": block.rpartition(".")[0],
            "number": block.rpartition(".")[2],
            "means": [float(f"{square / count:.4g}") if count else None for square, count in sums[block]],
        }
        for block in sorted(sums, key=natural_order)
    ]


def _agreement(found: Mapping[str, Any], targets: Sequence[str], names: Sequence[str]) -> dict[str, Any] | None:
    """Cosines and sign conflicts as matrices, the targets' distances from the pivot, and the extremes in words."""
    if not (told := found.get("agreement")):
        return None
    pairs = {frozenset(pair["targets"]): pair for pair in told["pairs"]}
    matrices = {
        key: [
            [None if one == other else pairs[frozenset((one, other))][key] for other in targets] for one in targets
        ]
        for key in ("cosine", "sign_conflicts")
    }
    words = ""
    if len(pairs) > 1:
        ranked = sorted(told["pairs"], key=lambda pair: float(pair["cosine"]))
        least, most = (
            f"{' and '.join(names[targets.index(target)] for target in pair['targets'])} ({pair['cosine']:.2f})"
            for pair in (ranked[0], ranked[-1])
        )
        words = f"{most} moved most alike, {least} least."
    return {
        **matrices,
        "words": words,
        "distances": [told["relative_distance"][target] for target in targets],
    }
