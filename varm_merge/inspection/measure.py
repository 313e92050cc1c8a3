"""The weights of a ``varm`` merge without the merge: at each granularity, and how far the targets agree.

Every tensor is loaded once, as the merge would load it (slices, LoRA, vocabulary changes), reduced to a few sums
and dropped. The weights at all granularities follow from those sums; only those of ``parameter`` are averaged over
the elements of a tensor while it is loaded.
"""

import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import TensorGroup
from mergekit.options import MergeOptions
from tqdm import tqdm

from varm_common.errors import UserError
from varm_common.versions import versions
from varm_merge.merging import mergekit_io, method, planning, tensor_math
from varm_merge.merging.weight_log import FILE_NAME, natural_order, recipe_fingerprint, scaled, with_prior
from varm_merge.merging.weights import Granularity, Settings, UnitStatistics, conflict, submodule_of, unit_of
from varm_merge.recipes import recipe_file, rounding
from varm_merge.recipes.check import check
from varm_merge.recipes.problems import Looked, refuse

__all__ = ["RECIPE", "inspect"]

FORMAT, VERSION = "varm-merge inspection", 1
RECIPE = "recipe"
"""The key of the units at the recipe's own granularities, beside the five."""


@dataclass(frozen=True)
class _Measured:
    """The sums of one tensor, or of one expert's matrix ``name`` in it."""

    tensor: planning.PlannedTensor
    name: str
    elements: int
    targets: Sequence[Hashable]
    agreement: tensor_math.Agreement
    statistics: UnitStatistics
    element_weights: Mapping[Hashable, float]


def inspect(
    path: Path, options: MergeOptions, granularities: Sequence[str] = (), *, by_name: bool = False
) -> dict[str, Any]:
    """The weights of a recipe, or those of a finished merge.

    Args:
        path: A recipe; or a merged model's folder or its ``varm_weights.json``, which has only the units of that
            merge.
        options: mergekit's options of the run.
        granularities: Those to show beside the recipe's own; default all five.
        by_name: Whether tensors are merged by their names.

    Returns:
        JSON: ``base_model``, ``targets``; ``units`` by granularity, each with its tensors, elements and for each
        target the statistic and the weight; ``tensors`` with the mean squared delta of each target, and the
        ``agreement`` of the targets over all tensors (cosine of the task vectors, share of elements that two
        targets moved in opposite directions), and ``remarks``.

    Raises:
        UserError: The recipe cannot be merged; every problem is listed.
    """
    if path.is_dir() or path.suffix == ".json":
        return _finished_merge(path, granularities)
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
        tensors = tqdm(planning.planned_tensors(config, options), "measure", unit="tensor", disable=options.quiet)
        tally = rounding.Tally(looked)
        measured = [part for tensor in tensors for part in _measure(tensor, tally)]
    if not measured:
        raise UserError(f"{path}: nothing to inspect, because no output tensor combines two or more models")
    targets = list(dict.fromkeys(target for part in measured for target in part.targets))
    wanted: list[Any] = [RECIPE, *(granularities or get_args(Granularity))]
    units = {name: _units(measured, None if name == RECIPE else name) for name in wanted}
    remarks = [*(remark.message for remark in looked.remarks), *tally.remarks(content), *added_up(units[RECIPE])]
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "recipe": {"path": str(path), "sha256": recipe_fingerprint(content), "content": content},
        "base_model": str(config.base_model),
        "targets": [str(target) for target in targets],
        "units": units,
        "tensors": [_described(part) for part in measured],
        "agreement": _agreement(measured, targets),
        "remarks": remarks,
    }


def _demand(path: Path, text: str, device: str | None) -> None:
    """Refuse a recipe of another method, and a device that is not there."""
    if not recipe_file.uses_varm(text):
        raise UserError(
            f"{path} does not merge by `varm`: only `merge_method: varm` has weights to inspect. "
            "`varm-merge check` checks recipes of other methods, and finds misspelt ones"
        )
    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"the device `{device}` cannot be used: {reason}") from error


# A finished merge


def _finished_merge(path: Path, granularities: Sequence[str]) -> dict[str, Any]:
    if path.is_dir():
        path /= FILE_NAME
        if not path.exists():
            raise UserError(
                f"`{path.parent}` has no {FILE_NAME}: it was not merged by varm; give a recipe, or such a folder"
            )
    if granularities:
        raise UserError(f"`{path}` has the weights of one merge; give its recipe to see other granularities")
    text = recipe_file.read(path)
    try:
        log = json.loads(text)
        _demand_units(log["units"], log["targets"])
        return {
            "format": FORMAT,
            "version": VERSION,
            "versions": dict(log["versions"]),
            "recipe": {"path": str(path), **{key: log["recipe"][key] for key in ("sha256", "content")}},
            "base_model": log["base_model"],
            "targets": [*map(str, log["targets"])],
            "units": {RECIPE: log["units"]},
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"`{path}` is not the {FILE_NAME} of a merge by varm: {error!r}") from error


def _demand_units(units: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> None:
    """Raise an error unless this is a list of complete units of these targets."""
    if not units or not targets:
        raise ValueError("it has no units, or no targets")
    for unit in units:
        if not (unit["unit"] and unit["granularity"] and unit["tensors"] and unit["targets"].keys() <= {*targets}):
            raise ValueError(f"{unit} is incomplete")
        numbers = [target[key] for target in unit["targets"].values() for key in ("statistic", "weight")]
        if not all(map(math.isfinite, [unit["elements"], *numbers])):
            raise ValueError(f"{unit} contains NaN or Inf")


# Measuring


def _measure(tensor: planning.PlannedTensor, tally: rounding.Tally) -> Iterator[_Measured]:
    """The sums of a tensor, or of each expert's matrix in it."""
    settings = tensor.settings
    if settings.keep_pivot or (group := tensor.load()) is None:
        return
    tally.add(group)
    for name, part, _ in method.parts_of(group, replace(settings, granularity="matrix"), tensor.layout):
        pivot, targets = part.base.tensor, [target.tensor for target in part.non_base]
        with torch.no_grad():
            statistics = method.tensor_statistics(part, settings)  # refuses NaN and Inf
            agreement = tensor_math.agreement(pivot, targets)
            weights = _element_weights(part, settings)
        yield _Measured(tensor, name, pivot.numel(), list(weights), agreement, statistics, weights)


def _element_weights(part: TensorGroup, settings: Settings) -> dict[Hashable, float]:
    """The targets' weights at parameter granularity, averaged over the elements."""
    out = torch.empty_like(part.base.tensor, memory_format=torch.contiguous_format)
    return method.merge_part(part, replace(settings, scale=1.0), method.Unit("", "parameter"), out)[1]


# Units

ALONE = 0.99
"""The weight of a target that is practically alone in a unit."""
MANY = 0.5
"""Share of the elements that moved, in such units, from which on it is remarked."""
A_PART = 0.1
"""Share of them that other targets than the first have to lead in."""


def _units(measured: Sequence[_Measured], granularity: Granularity | None) -> list[dict[str, Any]]:
    """The units at a granularity, or at those that the recipe gives its tensors."""
    members: dict[tuple[str, str], list[_Measured]] = {}
    for part in measured:
        chosen = granularity or part.tensor.settings.granularity
        name = part.name if chosen == "matrix" else part.tensor.name
        unit = unit_of(name, chosen, part.tensor.block)
        members.setdefault((chosen, unit), []).append(part)
    return [_unit(unit, chosen, parts) for (chosen, unit), parts in members.items()]


def _unit(name: str, granularity: str, parts: Sequence[_Measured]) -> dict[str, Any]:
    statistics = UnitStatistics()
    for part in parts:
        statistics.merge(part.statistics)
    settings = parts[0].tensor.settings
    scales = {part.tensor.name: part.tensor.settings.scale for part in parts}
    names = sorted(scales, key=natural_order)
    elements = max(statistics.elements.values())
    lambdas = scaled([scales[tensor] for tensor in names])
    unit = {"unit": name, "granularity": granularity, "tensors": names, "elements": elements, **lambdas}
    if message := conflict(name, {part.tensor.name: part.tensor.settings for part in parts}):
        return {**unit, "problem": message, "targets": {}}
    if granularity == "parameter":
        size = max(sum(part.elements for part in parts), 1)
        weights = {
            target: sum(part.element_weights[target] * part.elements for part in parts) / size
            for target in parts[0].targets
        }
    else:
        weights = statistics.weights(settings)
    means: dict[Hashable, float] = statistics.means()
    numbers = {
        str(target): {"statistic": means[target], "weight": weight, **with_prior(settings.priors, target)}
        for target, weight in weights.items()
    }
    return {**unit, "moved": any(value > 0 for value in means.values()), "targets": numbers}


def added_up(units: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark if the targets moved in different units, so that weights of 1 add up their task vectors."""
    alone: Counter[str] = Counter()
    moved = [unit for unit in units if unit.get("moved")]
    for unit in moved:
        numbers = unit["targets"]
        leading = max(numbers, key=lambda target: numbers[target]["statistic"])
        whole = sum(target["statistic"] for target in numbers.values())
        least = min(numbers[leading]["statistic"] / whole, numbers[leading]["weight"])
        if len(numbers) > 1 and least > ALONE and max(unit.get("lambda", [1.0])) >= 1:
            alone[leading] += unit["elements"]
    share = alone.total() / max(sum(unit["elements"] for unit in moved), 1)
    if share < MANY or alone.most_common(1)[0][1] > (1 - A_PART) * alone.total():
        return []
    return [
        f"{share:.0%} of the elements that moved are in units that one target alone moved, and not always the "
        "same target. It gets the weight 1 there, so the merge adds up task vectors instead of averaging them. "
        "That is often too much: find a smaller `lambda` with `varm-merge tune`, or use a coarser `granularity`"
    ]


def _described(part: _Measured) -> dict[str, Any]:
    name, block, size = part.name, part.tensor.block, max(part.elements, 1)
    place = {"tensor": name, "block": block, "module": submodule_of(name, block) if block else name}
    sizes = {"elements": part.elements, "pivot_mean_square": part.agreement.pivot / size}
    squares = zip(part.targets, part.agreement.squares, strict=True)
    targets = {str(target): {"mean_squared_delta": square / size} for target, square in squares}
    return {**place, **sizes, "targets": targets}


def _agreement(measured: Iterable[_Measured], targets: Sequence[Hashable]) -> dict[str, Any]:
    """Over all tensors: each target's distance from the pivot, and each pair's cosine and conflicts."""
    pivot, squares = 0.0, dict.fromkeys(targets, 0.0)
    sums = {frozenset(pair): np.zeros(3) for pair in itertools.combinations(targets, 2)}
    for part in measured:
        agreement = part.agreement
        pivot += agreement.pivot
        for target, square in zip(part.targets, agreement.squares, strict=True):
            squares[target] += square
        columns = zip(agreement.products, agreement.moved, agreement.opposite, strict=True)
        for pair, numbers in zip(itertools.combinations(part.targets, 2), columns, strict=True):
            sums[frozenset(pair)] += numbers
    pairs = []
    for first, second in itertools.combinations(targets, 2):
        product, moved, opposite = map(float, sums[frozenset((first, second))])
        size = math.sqrt(squares[first]) * math.sqrt(squares[second])
        cosine = product / size if size else 0.0
        conflicts = opposite / moved if moved else 0.0
        pairs.append({"targets": [str(first), str(second)], "cosine": cosine, "sign_conflicts": conflicts})
    distances = {str(target): math.sqrt(square / pivot) if pivot else 0.0 for target, square in squares.items()}
    return {"relative_distance": distances, "pairs": pairs}
