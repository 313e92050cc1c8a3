"""The result of ``inspect`` as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from varm_common.tables import short_names
from varm_merge.inspection.grid import Unit
from varm_merge.inspection.measure import RECIPE

__all__ = ["tables"]

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""
MANY_UNITS = 24
"""If there are more units, only the least, median and greatest weights are shown."""


def tables(inspection: Mapping[str, Any], top: int = 5) -> Iterator[Table]:
    """The tables, one after the other.

    Args:
        inspection: The result of ``measure.inspect``.
        top: How many of the most and of the least moved tensors are listed.
    """
    targets: list[str] = inspection["targets"]
    names = short_names(targets)
    if agreement := inspection.get("agreement"):
        distances = [f"{agreement['relative_distance'][target]:.3g}" for target in targets]
        yield "‖Δ‖ / ‖pivot‖", ["", *names], [["all tensors", *distances]]
        pairs = []
        for pair in agreement["pairs"]:
            both = " – ".join(names[targets.index(target)] for target in pair["targets"])
            pairs.append([both, f"{pair['cosine']:.3f}", f"{pair['sign_conflicts']:.1%}"])
        yield "agreement", ["targets", "cosine", "sign conflicts"], pairs
    own = list(dict.fromkeys(unit["granularity"] for unit in inspection["units"][RECIPE]))
    for granularity, units in inspection["units"].items():
        if granularity == RECIPE and len(inspection["units"]) > 1:
            if len(own) == 1 and own[0] in inspection["units"]:
                continue  # it has a table under its own name
            granularity = f"{RECIPE} ({', '.join(own)})"
        elif own == [granularity]:
            granularity += ", as the recipe says"
        if len(units) > MANY_UNITS:
            yield f"weights, {granularity}: {len(units)} units", ["", *names], _spread(units, targets)
        else:
            rows = [[unit["unit"], *_weights(unit, targets)] for unit in units]
            yield f"weights, {granularity}", ["unit", *names], rows
    if ranked := sorted(inspection.get("tensors", []), key=_greatest_move, reverse=True):
        for which, shown in (("most", ranked[:top]), ("least", ranked[top:][-top:] if top else [])):
            rows = [[tensor["tensor"], *_moves(tensor, targets)] for tensor in shown]
            yield f"{which} moved, mean squared delta", ["tensor", *names], rows


def _weights(unit: Unit, targets: Sequence[str]) -> list[str]:
    if "problem" in unit:
        return ["?"] * len(targets)
    return [f"{numbers['weight']:.3f}" if (numbers := unit["targets"].get(name)) else "–" for name in targets]


def _spread(units: Sequence[Unit], targets: Sequence[str]) -> list[list[str]]:
    columns = [[unit["targets"][name]["weight"] for unit in units if name in unit["targets"]] for name in targets]
    summaries: dict[str, Any] = {"least": min, "median": median, "greatest": max}
    return [
        [name, *(f"{summary(weights):.3f}" if weights else "–" for weights in columns)]
        for name, summary in summaries.items()
    ]


def _moves(tensor: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    own = [tensor["targets"].get(name) for name in targets]
    return [f"{numbers['mean_squared_delta']:.3g}" if numbers else "–" for numbers in own]


def _greatest_move(tensor: Mapping[str, Any]) -> float:
    return max(float(numbers["mean_squared_delta"]) for numbers in tensor["targets"].values())
