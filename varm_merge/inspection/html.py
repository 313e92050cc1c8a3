"""The result of ``inspect`` as one page: heat maps, plots and tables."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from varm_common.tables import short_names
from varm_merge.inspection import page
from varm_merge.inspection.grid import Unit, grid
from varm_merge.inspection.measure import RECIPE
from varm_merge.merging.weight_log import FILE_NAME, natural_order

__all__ = ["draw"]

MEANINGS = {
    "model": "all tensors at once",
    "layer": "a block at a time",
    "module": "attention, MLP and each norm of a block",
    "matrix": "a tensor, or a matrix of an expert, at a time",
    "parameter": "an element at a time",
}
"""The unit of each granularity."""


def draw(inspection: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        inspection: The result of ``measure.inspect``, for a recipe or for a finished merge.
        path: The file of the page.

    Raises:
        UserError: It cannot be written.
    """
    targets: list[str] = inspection["targets"]
    names = short_names(targets)
    kinds = ", ".join(dict.fromkeys(unit["granularity"] for unit in inspection["units"][RECIPE]))
    labels = {key: f"the recipe's own ({kinds})" if key == RECIPE else key for key in inspection["units"]}
    weights = [_weights(unit) for units in inspection["units"].values() for unit in units if unit["targets"]]
    every = [weight for own in weights for weight in own] or [0.0, 1.0]
    span = max((abs(weight - 1 / len(own)) for own in weights for weight in own), default=0.0)
    scale = {"targets": names, "even": 1 / len(targets), "span": span}
    tensors = inspection.get("tensors", [])
    depth = _depth(tensors, targets)
    recipe = Path(inspection["recipe"]["path"])
    html = page.render(
        "inspection.html",
        inspection=inspection,
        name=recipe.resolve().parent.name if recipe.name == FILE_NAME else recipe.name,
        recipe=yaml.safe_dump(inspection["recipe"]["content"], sort_keys=False, allow_unicode=True),
        names=names,
        granularities=labels,
        bounds=(max(min(every) - 0.02, 0.0), max(every) + 0.02),
        own=[_unit_row(unit, targets) for unit in inspection["units"][RECIPE]],
        remarks=list(_remarks(inspection, targets)),
        effects={labels[key]: _effect(key, own, targets, names) for key, own in inspection["units"].items()},
        tensors=sorted((_tensor_row(tensor, targets) for tensor in tensors), key=lambda row: -row["greatest"]),
        depth=depth,
        agreement=_agreement(inspection["agreement"], targets, names) if inspection.get("agreement") else None,
        data={**scale, **_maps(inspection["units"], targets), "labels": labels, "depth": depth},
    )
    page.write(path, html)


def _weights(unit: Unit) -> list[float]:
    return [numbers["weight"] for numbers in unit["targets"].values()]


def _maps(granularities: Mapping[str, Sequence[Unit]], targets: Sequence[str]) -> dict[str, Any]:
    """The heat maps for the script.

    Returns:
        ``rows`` and ``columns``, the labels; a column is the path to its block and its number. ``units``: for each
        granularity a list of name, row, column (-1 outside the blocks), number of elements, of tensors, whether a
        target moved, and for each target its weight and statistic (null if it has none), or the unit's problem.
    """

    def numbers(target: Mapping[str, float] | None) -> list[float] | None:
        return target and [float(f"{target['weight']:.7g}"), float(f"{target['statistic']:.4g}")]  # type: ignore[return-value]

    def entry(unit: Unit) -> list[Any]:
        sizes = unit["elements"], len(unit["tensors"]), int(unit.get("moved", True))
        own = unit.get("problem") or [numbers(unit["targets"].get(target)) for target in targets]
        return [unit["unit"], *places.cells[unit["unit"]], *sizes, own]

    places = grid(granularities.values())
    columns = [list(column.rpartition(".")[::2]) for column in places.columns]
    entries = {key: [entry(unit) for unit in units] for key, units in granularities.items()}
    return {"rows": places.rows, "columns": columns, "units": entries}


def _unit_row(unit: Unit, targets: Sequence[str]) -> dict[str, Any]:
    """A row of the table of weights."""
    remark = unit.get("problem") or ("" if unit.get("moved", True) else "no target moved: the pivot is kept")
    weights = [numbers and numbers["weight"] for numbers in map(unit["targets"].get, targets)]
    return {**unit, "weights": weights, "remark": remark}


def _remarks(inspection: Mapping[str, Any], targets: Sequence[str]) -> Iterable[str]:
    """Sentences that a reader must know before believing the colours."""
    for key, units in inspection["units"].items():
        where = "The recipe" if key == RECIPE else f"Granularity {key}"
        if wrong := [unit["problem"] for unit in units if "problem" in unit]:
            yield f"{where}: {_counted(wrong)} cannot be merged. {wrong[0]}"
    own = inspection["units"][RECIPE]
    if still := [unit["unit"] for unit in own if not unit.get("moved", True)]:
        yield f"No target moved {_counted(still)} ({_some(still)}): the pivot is kept there."
    if fewer := [unit["unit"] for unit in own if "problem" not in unit and len(unit["targets"]) < len(targets)]:
        yield f"Not every target has {_counted(fewer)} ({_some(fewer)}): the others share the weight."


def _counted(units: Sequence[str]) -> str:
    return f"{len(units):,} unit{'' if len(units) == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _effect(key: str, units: Sequence[Unit], targets: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """The effect of a granularity, in numbers and words."""
    sound = [unit for unit in units if unit["targets"]]
    elements = sum(unit["elements"] for unit in sound)
    apart = sum(
        unit["elements"] * sum(abs(weight - 1 / len(unit["targets"])) for weight in _weights(unit)) / 2
        for unit in sound
    )
    weights = [[unit["targets"][name]["weight"] for unit in sound if name in unit["targets"]] for name in targets]
    leaders = Counter(_leader(unit) for unit in sound if unit.get("moved", True))
    leads = [f"{names[targets.index(name)]}\N{NO-BREAK SPACE}{count:,}" for name, count in leaders.most_common()]
    words = {"meaning": MEANINGS.get(key, ""), "leads": ", ".join(leads) or "–"}
    spread = [(min(own), median(own), max(own)) if own else None for own in weights]
    return {**words, "units": len(units), "spread": spread, "apart": apart / elements if elements else None}


def _leader(unit: Unit) -> str:
    weights = {str(target): float(numbers["weight"]) for target, numbers in unit["targets"].items()}
    return max(weights, key=weights.__getitem__)


def _tensor_row(tensor: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """A row of the table of moves."""
    moves = [numbers and numbers["mean_squared_delta"] for numbers in map(tensor["targets"].get, targets)]
    greatest = max(move for move in moves if move is not None)
    pivot = tensor["pivot_mean_square"]
    relative = math.sqrt(greatest / pivot) if pivot else None
    return {**tensor, "moves": moves, "greatest": greatest, "relative": relative}


def _depth(tensors: Iterable[Mapping[str, Any]], targets: Sequence[str]) -> list[dict[str, Any]]:
    """For each block, the mean squared delta of each target over all its elements."""
    sums: dict[str, dict[str, list[float]]] = {}
    for tensor in tensors:
        for target, numbers in tensor["targets"].items() if tensor["block"] is not None else ():
            total = sums.setdefault(tensor["block"], {}).setdefault(target, [0.0, 0.0])
            total[0] += numbers["mean_squared_delta"] * tensor["elements"]
            total[1] += tensor["elements"]

    def mean(total: list[float] | None) -> float | None:
        return float(f"{total[0] / total[1]:.4g}") if total and total[1] else None

    def point(block: str) -> dict[str, Any]:
        stack, _, number = block.rpartition(".")
        return {"stack": stack, "number": number, "means": [mean(sums[block].get(target)) for target in targets]}

    return [point(block) for block in sorted(sums, key=natural_order)]


def _agreement(agreement: Mapping[str, Any], targets: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Cosines and sign conflicts as matrices, the targets' distances from the pivot, and the extremes in words."""
    pairs = {frozenset(pair["targets"]): pair for pair in agreement["pairs"]}

    def matrix(key: str) -> list[list[float | None]]:
        return [
            [None if row == column else pairs[frozenset((row, column))][key] for column in targets]
            for row in targets
        ]

    def named(pair: Mapping[str, Any]) -> str:
        return f"{' and '.join(names[targets.index(name)] for name in pair['targets'])} ({pair['cosine']:.2f})"

    ranked = sorted(agreement["pairs"], key=lambda pair: float(pair["cosine"]))
    extremes = f"{named(ranked[-1])} moved most alike, {named(ranked[0])} least." if len(pairs) > 1 else ""
    distances = [agreement["relative_distance"][target] for target in targets]
    matrices = {key: matrix(key) for key in ("cosine", "sign_conflicts")}
    return {**matrices, "words": extremes, "distances": distances}
