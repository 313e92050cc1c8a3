"""The weights of a ``varm`` merge without the merge: what each granularity would do, and how the targets differ.

Every tensor is loaded once, as the merge would load it (slices, LoRA, vocabulary changes), reduced to a few sums
and dropped. All granularities follow from those sums but ``parameter``, whose weights are averaged over a tensor's
elements.
"""

import itertools
import json
import math
import operator
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import TensorGroup
from mergekit.options import MergeOptions
from tqdm import tqdm

from varm_common.errors import UserError
from varm_common.tables import short_names
from varm_common.versions import versions
from varm_merge.merging import mergekit_io, method, planning, tensor_math
from varm_merge.merging.weight_log import FILE_NAME, natural_order, recipe_fingerprint
from varm_merge.merging.weights import Granularity, Settings, UnitStatistics, submodule_of, unit_of
from varm_merge.recipes import recipe_file, rounding
from varm_merge.recipes.check import check
from varm_merge.recipes.problems import Looked, refuse

__all__ = ["FORMAT", "RECIPE", "inspect", "tables"]

FORMAT, VERSION = "varm-merge inspection", 1
RECIPE = "recipe"
"""The granularities that the recipe itself asks for, beside the five."""


@dataclass(frozen=True)
class _Measured:
    """One tensor, or one expert's matrix (``name``), reduced."""

    tensor: planning.PlannedTensor
    name: str
    elements: int
    targets: Sequence[Hashable]
    agreement: tensor_math.Agreement
    statistics: UnitStatistics
    element_weights: Sequence[float]


def inspect(
    path: Path, options: MergeOptions, granularities: Sequence[str] = (), *, by_name: bool = False
) -> dict[str, Any]:
    """Everything there is to tell about a recipe's weights, or about those of a finished merge.

    Args:
        path: A recipe; or a merged model's folder or its ``varm_weights.json``, which tells the units of that
            merge and nothing else.
        options: Of the run; a cache for adapters is made and removed if there is none.
        granularities: Those to show beside the recipe's own; default all five.
        by_name: Whether tensors are merged by their names.

    Returns:
        JSON: ``base_model``, ``targets``; ``units`` by granularity, each with its tensors, elements and for each
        target the statistic and the weight; ``tensors`` with the mean squared delta of each target, and the
        ``agreement`` of the targets over all tensors (cosine of the task vectors, share of elements that two
        targets moved in opposite directions), and ``remarks``.

    Raises:
        UserError: The recipe cannot be merged; all that is wrong with it is told.
    """
    if path.is_dir() or path.suffix == ".json":
        return _of_a_merge(path, granularities)
    text = recipe_file.read(path)
    with ExitStack() as stack:
        if options.lora_merge_cache is None:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="varm-merge-"))
            options = options.model_copy(update={"lora_merge_cache": cache})
        looked = Looked()
        problems = check(text, options=options, by_name=by_name, path=path, looked=looked)
        refuse(problems, path, "cannot be inspected")
        _demand(path, text, options.device)
        content = yaml.safe_load(text)
        config = recipe_file.one_spelling(MergeConfiguration.model_validate(content))
        if by_name:
            stack.enter_context(planning.by_name())
        stack.enter_context(mergekit_io.as_merged(options))
        tensors = planning.planned_tensors(config, options)
        tally = rounding.Tally(looked)
        measured = [
            part
            for tensor in tqdm(tensors, unit="tensor", desc="measure", disable=options.quiet)
            for part in _measure(tensor, tally)
        ]
    if not measured:
        raise UserError(f"{path}: no tensor of the output model is merged of two models or more")
    targets = list(dict.fromkeys(target for one in measured for target in one.targets))
    wanted: list[Any] = [RECIPE, *(granularities or get_args(Granularity))]
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "recipe": {"path": str(path), "sha256": recipe_fingerprint(content), "content": content},
        "base_model": str(config.base_model),
        "targets": [str(target) for target in targets],
        "units": {name: _units(measured, None if name == RECIPE else name) for name in wanted},
        "tensors": [_described(one) for one in measured],
        "agreement": _agreement(measured, targets),
        "remarks": [remark.message for remark in looked.remarks] + tally.remarks(content),
    }


def _demand(path: Path, text: str, device: str | None) -> None:
    """The recipe is one of varm, and the device is there."""
    if not recipe_file.uses_varm(text):
        raise UserError(
            f"{path} does not merge by `varm`: weights are given for `merge_method: varm` alone. "
            "`varm-merge check` tells what there is to say of other methods, and of misspelt ones"
        )
    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"nothing can be measured on the device `{device}`: {reason}") from error


def _of_a_merge(path: Path, granularities: Sequence[str]) -> dict[str, Any]:
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            raise UserError(
                f"`{path}` has no {FILE_NAME}: it was not merged by varm; give a recipe, or such a folder"
            )
        path = path / FILE_NAME
    if granularities:
        raise UserError(f"`{path}` tells the weights of one merge; give its recipe to see other granularities")
    text = recipe_file.read(path)
    try:
        found = json.loads(text)
        _expect_units(found["units"], found["targets"])
        return {
            "format": FORMAT,
            "version": VERSION,
            "versions": dict(found["versions"]),
            "recipe": {"path": str(path), **{key: found["recipe"][key] for key in ("sha256", "content")}},
            "base_model": found["base_model"],
            "targets": [*map(str, found["targets"])],
            "units": {RECIPE: found["units"]},
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is no {FILE_NAME} of a merge by varm: {error!r}") from error


def _expect_units(units: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> None:
    """Stumble over what is no list of units of these targets."""
    if not units or not targets:
        raise ValueError("it has no units, or no targets")
    for unit in units:
        if not (unit["unit"] and unit["granularity"] and unit["tensors"] and unit["targets"].keys() <= {*targets}):
            raise ValueError(f"{unit} is not whole")
        numbers = [
            unit["elements"],
            *(of[key] for of in unit["targets"].values() for key in ("statistic", "weight")),
        ]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{unit} has a number that is none")


# Measuring


def _measure(tensor: planning.PlannedTensor, tally: rounding.Tally) -> Iterator[_Measured]:
    """The tensor, or each expert's matrix in it, reduced."""
    group = tensor.load()
    if group is None:
        return
    tally.add(group)
    settings = tensor.settings
    for name, part, _ in method.parts_of(group, replace(settings, granularity="matrix"), tensor.layout):
        assert part.base is not None
        pivot, targets = part.base.tensor, [target.tensor for target in part.non_base]
        with torch.no_grad():
            statistics = method.tensor_statistics(part, settings)  # refuses NaN and Inf
            agreement = tensor_math.agreement(pivot, targets)
            weights = _element_weights(part, settings)
        ids = [one.id for one in part.non_base]
        yield _Measured(tensor, name, pivot.numel(), ids, agreement, statistics, weights)


def _element_weights(group: TensorGroup, settings: Settings) -> list[float]:
    """The targets' weights at parameter granularity, averaged over the elements."""
    assert group.base is not None
    pivot, targets = group.base.tensor, [target.tensor for target in group.non_base]
    _, sums = tensor_math.blend_elements(
        pivot,
        targets,
        tensor_math.ElementWeights(*settings.weighting),
        torch.empty_like(pivot, memory_format=torch.contiguous_format),
        selection=method.selection_of(group, settings),
        erase_minority=settings.erase_minority,
    )
    return [total / max(pivot.numel(), 1) for total in sums]


# Units


def _units(measured: Sequence[_Measured], granularity: Granularity | None) -> list[dict[str, Any]]:
    """The units at a granularity, or at those that the recipe gives its tensors."""
    members: dict[tuple[str, str], list[_Measured]] = {}
    for one in measured:
        chosen = granularity or one.tensor.settings.granularity
        name = one.name if chosen == "matrix" else one.tensor.name
        unit = unit_of(name, chosen, one.tensor.block)
        members.setdefault((chosen, unit), []).append(one)
    return [_unit(unit, chosen, parts) for (chosen, unit), parts in members.items()]


def _unit(name: str, granularity: str, parts: Sequence[_Measured]) -> dict[str, Any]:
    statistics = UnitStatistics()
    for part in parts:
        statistics.merge(part.statistics)
    settings = parts[0].tensor.settings
    unit: dict[str, Any] = {
        "unit": name,
        "granularity": granularity,
        "tensors": sorted({part.tensor.name for part in parts}, key=natural_order),
        "elements": max(statistics.elements.values()),
    }
    if message := method.conflict(name, {part.tensor.name: part.tensor.settings for part in parts}):
        return {**unit, "problem": message, "targets": {}}
    if granularity == "parameter":
        sizes = [part.elements for part in parts]
        columns = zip(*(part.element_weights for part in parts), strict=True)
        weights = {
            target: sum(map(operator.mul, column, sizes)) / max(sum(sizes), 1)
            for target, column in zip(parts[0].targets, columns, strict=True)
        }
    else:
        weights = statistics.weights(settings)
    means: dict[Hashable, float] = statistics.means()
    moved = any(value > 0 for value in means.values())
    told = {str(target): {"statistic": means[target], "weight": weight} for target, weight in weights.items()}
    return {**unit, "moved": moved, "targets": told}


def _described(one: _Measured) -> dict[str, Any]:
    name, block, size = one.name, one.tensor.block, max(one.elements, 1)
    return {
        "tensor": name,
        "block": block,
        "module": submodule_of(name, block) if block else name,
        "elements": one.elements,
        "pivot_mean_square": one.agreement.pivot / size,
        "targets": {
            str(target): {"mean_squared_delta": square / size}
            for target, square in zip(one.targets, one.agreement.squares, strict=True)
        },
    }


def _agreement(measured: Iterable[_Measured], targets: Sequence[Hashable]) -> dict[str, Any]:
    """Over all tensors: each target's distance from the pivot, and each pair's cosine and conflicts."""
    squares: dict[Hashable, float] = dict.fromkeys(targets, 0.0)
    sums: dict[tuple[Hashable, Hashable], list[float]] = {
        pair: [0.0, 0.0, 0.0] for pair in itertools.combinations(targets, 2)
    }
    pivot = 0.0
    for one in measured:
        pivot += one.agreement.pivot
        for target, square in zip(one.targets, one.agreement.squares, strict=True):
            squares[target] += square
        columns = zip(one.agreement.products, one.agreement.moved, one.agreement.opposite, strict=True)
        for pair, numbers in zip(itertools.combinations(one.targets, 2), columns, strict=True):
            known = sums[pair] if pair in sums else sums[pair[1], pair[0]]
            for index, number in enumerate(numbers):
                known[index] += number
    return {
        "relative_distance": {
            str(target): math.sqrt(square / pivot) if pivot else 0.0 for target, square in squares.items()
        },
        "pairs": [_pair(squares, pair, numbers) for pair, numbers in sums.items()],
    }


def _pair(
    squares: Mapping[Hashable, float], pair: tuple[Hashable, Hashable], numbers: Sequence[float]
) -> dict[str, Any]:
    product, moved, opposite = numbers
    size = math.sqrt(squares[pair[0]]) * math.sqrt(squares[pair[1]])
    return {
        "targets": [str(target) for target in pair],
        "cosine": product / size if size else 0.0,
        "sign_conflicts": opposite / moved if moved else 0.0,
    }


# Tables

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables(found: Mapping[str, Any], top: int = 5) -> Iterator[Table]:
    """What ``inspect`` has found, for a terminal.

    Args:
        found: It.
        top: How many of the most and the least moved tensors are listed.
    """
    targets: list[str] = found["targets"]
    names = short_names(targets)
    if agreement := found.get("agreement"):
        distances = [f"{agreement['relative_distance'][target]:.3g}" for target in targets]
        yield "‖Δ‖ / ‖pivot‖", ["", *names], [["all tensors", *distances]]
        pairs = []
        for pair in agreement["pairs"]:
            both = " – ".join(names[targets.index(target)] for target in pair["targets"])
            pairs.append([both, f"{pair['cosine']:.3f}", f"{pair['sign_conflicts']:.1%}"])
        yield "agreement", ["targets", "cosine", "sign conflicts"], pairs
    own = list(dict.fromkeys(unit["granularity"] for unit in found["units"][RECIPE]))
    for granularity, units in found["units"].items():
        if granularity == RECIPE and len(found["units"]) > 1:
            if len(own) == 1 and own[0] in found["units"]:
                continue  # told under its own name
            granularity = f"{RECIPE} ({', '.join(own)})"
        elif own == [granularity]:
            granularity += ", as the recipe says"
        if len(units) > MANY_UNITS:
            yield f"weights, {granularity}: {len(units)} units", ["", *names], _spread(units, targets)
        else:
            rows = [[unit["unit"], *_cells(unit, targets)] for unit in units]
            yield f"weights, {granularity}", ["unit", *names], rows
    if ranked := sorted(found.get("tensors", []), key=_moved, reverse=True):
        shown = {"most": ranked[:top], "least": ranked[top:][-top:] if top else []}
        for which, some in shown.items():
            rows = [
                [
                    one["tensor"],
                    *(
                        f"{of['mean_squared_delta']:.3g}" if (of := one["targets"].get(t)) else "–"
                        for t in targets
                    ),
                ]
                for one in some
            ]
            yield f"{which} moved, mean squared delta", ["tensor", *names], rows


MANY_UNITS = 24
"""More are told by their spread."""


def _cells(unit: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    if "problem" in unit:
        return ["?"] * len(targets)
    return [f"{of['weight']:.3f}" if (of := unit["targets"].get(target)) else "–" for target in targets]


def _spread(units: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> list[list[str]]:
    by_target = [[of["weight"] for unit in units if (of := unit["targets"].get(target))] for target in targets]
    summaries: dict[str, Any] = {"least": min, "median": median, "greatest": max}
    return [
        [name, *(f"{summary(weights):.3f}" if weights else "–" for weights in by_target)]
        for name, summary in summaries.items()
    ]


def _moved(tensor: Mapping[str, Any]) -> float:
    return max(float(of["mean_squared_delta"]) for of in tensor["targets"].values())
