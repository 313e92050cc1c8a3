"""The numbers of a recipe that are searched: which, within which range, and how the recipe gets them."""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods import MergeMethodSpec, ParameterScope
from mergekit.merge_methods.base import ParameterSpec

from varm_common.errors import UserError, did_you_mean
from varm_common.tables import short_names
from varm_merge.merging.method import METHOD_NAME
from varm_merge.recipes import recipe_file

__all__ = ["DEFAULTS", "Number", "Parameter", "numbers", "parameters", "written"]

SYNTAX = re.compile(r"(?P<name>\w+)(?P<by>:target|:depth)?(?:=(?P<low>[^:]+):(?P<high>[^:]+))?")
DEFAULTS = ("lambda", "t", "select_topk", "weight:target")
"""What is searched by default: the first that the method has."""
RANGES = {
    "lambda": (0.0, 2.0),
    "t": (0.0, 1.0),
    "select_topk": (0.01, 1.0),
    "density": (0.05, 1.0),
    "gamma": (0.001, 0.1),
    "epsilon": (0.01, 0.3),
    "alpha": (0.0, 1.0),
    "r": (0.01, 1.0),
}
SHARES, LENGTHS = (0.125, 8.0), (0.0, 2.0)
"""Ranges of ``weight``: where the weights are made to sum to 1, and where they are not."""
STARTS = {"weight": 1.0, "t": 0.5}
"""Where a search starts if neither the recipe nor the method has a value."""
PLACES = ("first layer", "middle", "last layer")
"""Where the three values of a parameter by depth hold; mergekit interpolates between them."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method that is searched: one number, or ``by`` target or depth several.

    Its range is the usual one, or ``given`` by the user.
    """

    name: str
    by: str
    low: float
    high: float
    given: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.by}" if self.by else self.name


@dataclass(frozen=True)
class Number:
    """One number that is searched.

    Attributes:
        label: Its name in reports.
        parameter: It is a value of this parameter.
        index: The index of the recipe's model, or the place in the depth; 0 for a single number.
        start: Its value in the recipe.
        fixed: Whether it keeps its value, because only ratios to it matter.
    """

    label: str
    parameter: Parameter
    index: int
    start: float
    fixed: bool = False


def parameters(content: Mapping[str, Any], given: Sequence[str]) -> list[Parameter]:
    """The parameters to search in a recipe; ``given`` as ``NAME[:target|:depth][=LOW:HIGH]``.

    Raises:
        UserError: The method has no such parameter, or it cannot be searched.
    """
    spec = merge_methods.get(str(content["merge_method"])).spec
    known = {parameter.name: parameter for parameter in spec.parameters if _is_number(parameter)}
    if not given:
        default = next((name for name in DEFAULTS if name.partition(":")[0] in known), None)
        if default is None:
            advice = f"name one of {', '.join(known)} with --parameter" if known else "it has no number to search"
            raise UserError(f"{spec.name} has no parameter that is searched by default: {advice}")
        given = [default]
    searched = [_parameter(text, known, spec, content) for text in given]
    names = [parameter.name for parameter in searched]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--parameter names `{twice[0]}` twice")
    return searched


def numbers(content: Mapping[str, Any], searched: Sequence[Parameter]) -> list[Number]:
    """Every number that is searched, with its value in the recipe.

    Raises:
        UserError: The recipe gives a parameter more than the one value that is searched.
    """
    spec = merge_methods.get(str(content["merge_method"])).spec
    scales = _normalises(spec, content) or any(parameter.name == "lambda" for parameter in searched)
    return [number for parameter in searched for number in _numbers(content, parameter, spec, scales)]


def written(content: Mapping[str, Any], values: Mapping[Number, float]) -> dict[str, Any]:
    """The recipe with other values of the searched numbers."""
    result: dict[str, Any] = copy.deepcopy(dict(content))
    for number, value in values.items():
        name, by = number.parameter.name, number.parameter.by
        place = result["models"][number.index] if by == "target" else result
        own = place["parameters"] = dict(place.get("parameters") or {})
        own[name] = [*(own[name] if number.index else []), value] if by == "depth" else value
    return result


def _is_number(parameter: ParameterSpec) -> bool:
    try:
        return parameter.value_type is not bool and isinstance(parameter.validate(0.5), float)
    except ValueError:
        return False


def _parameter(
    text: str, known: Mapping[str, ParameterSpec], spec: MergeMethodSpec, content: Mapping[str, Any]
) -> Parameter:
    if (match := SYNTAX.fullmatch(text)) is None:
        raise UserError(f"--parameter `{text}` is not NAME, NAME:target or NAME:depth, with or without =LOW:HIGH")
    name, by = match["name"], (match["by"] or "").removeprefix(":")
    if name not in known:
        hint = did_you_mean(name, known, list_known=True) if known else "; it has none"
        raise UserError(f"{spec.name} has no number `{name}` to search{hint}")
    if by == "target" and known[name].scope is ParameterScope.SHARED:
        raise UserError(f"`{name}` of {spec.name} is one for all targets; search `{name}` or `{name}:depth`")
    normalises = _normalises(spec, content)
    if name == "weight" and by != "target" and normalises:
        raise UserError(
            f"{spec.name} makes the weights sum to 1, so one for all has no effect: search weight:target"
        )
    ranges = {**RANGES, "weight": SHARES if normalises else LENGTHS}
    if match["low"] is None:
        if name not in ranges:
            raise UserError(f"`{name}` has no usual range: give one, as --parameter {text}=LOW:HIGH")
        return Parameter(name, by, *ranges[name])
    try:
        low, high = float(match["low"]), float(match["high"])
        for bound in (low, high):
            known[name].validate(bound)
    except ValueError as error:
        raise UserError(f"the range of --parameter `{text}` is not one of `{name}`: {error}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"the range of --parameter `{text}` has to go from a lower to a higher number")
    return Parameter(name, by, low, high, given=True)


def _normalises(spec: MergeMethodSpec, content: Mapping[str, Any]) -> bool:
    """Whether a method makes the weights of the models sum to 1, so that only their ratios matter."""
    if spec.name in (METHOD_NAME, "nuslerp"):
        return True
    given = content.get("parameters") or {}
    flags = [own for own in spec.parameters if own.name in ("normalize", "normalize_weights")]
    return any(given.get(flag.name, flag.default) is True for flag in flags)


def _numbers(
    content: Mapping[str, Any], parameter: Parameter, spec: MergeMethodSpec, scales: bool
) -> Iterator[Number]:
    name, by = parameter.name, parameter.by
    own = next(own for own in spec.parameters if own.name == name)
    entries = content.get("models") or []
    default = STARTS.get(name, (parameter.low + parameter.high) / 2) if own.required else own.default
    shared = (content.get("parameters") or {}).get(name, default)
    _demand_one_place(content, parameter)
    if by == "target":
        pivot = content.get("base_model") if own.scope is ParameterScope.NON_BASE else None
        targets = [index for index, entry in enumerate(entries) if not _same(entry["model"], pivot)]
        names = short_names([str(entries[index]["model"]) for index in targets])
        given = [(entries[index].get("parameters") or {}).get(name, shared) for index in targets]
        starts = [_values(value, parameter, 1)[0] for value in given]
        parameter = _with_range_of(parameter, starts)
        fixed = next((place for place, start in enumerate(starts) if start), 0) if scales else None
        for place, (index, label) in enumerate(zip(targets, names, strict=True)):
            yield Number(f"{name} of {label}", parameter, index, starts[place], place == fixed)
    else:
        starts = _values(shared, parameter, len(PLACES) if by else 1)
        parameter = _with_range_of(parameter, starts)
        for index, start in enumerate(starts):
            yield Number(f"{name}, {PLACES[index]}" if by else name, parameter, index, start)


def _with_range_of(parameter: Parameter, starts: Sequence[float]) -> Parameter:
    """The parameter with a range that has the recipe's values: the usual range is widened."""
    low, high = min(parameter.low, *starts), max(parameter.high, *starts)
    if parameter.given and (low, high) != (parameter.low, parameter.high):
        outside = next(start for start in starts if not parameter.low <= start <= parameter.high)
        raise UserError(
            f"the recipe's value {outside:g} of `{parameter.name}` lies outside the range of --parameter, "
            f"{parameter.low:g} to {parameter.high:g}: give a wider range, or change the recipe"
        )
    return replace(parameter, low=low, high=high)


def _values(given: Any, parameter: Parameter, count: int) -> list[float]:
    """The recipe's values, from which a search starts."""
    values = given if isinstance(given, list) and len(given) == count > 1 else [given] * count
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(
            f"the recipe gives `{parameter.name}` by filters or a gradient, which the search would replace: write "
            "one number, or leave it out"
        )
    return [float(value) for value in values]


def _demand_one_place(content: Mapping[str, Any], parameter: Parameter) -> None:
    """Refuse a recipe that gives a parameter where the search does not write it, and where it would win."""
    if parameter.by == "target" and not content.get("models"):
        raise UserError(f"`{parameter}` needs a recipe with `models`; this one has slices or modules")
    deeper = {key: content[key] for key in ("models", "slices", "modules") if key in content}
    if parameter.by != "target" and _has(deeper, parameter.name):
        raise UserError(
            f"the recipe gives `{parameter.name}` for single models, slices or modules: write one number under "
            f"the recipe's `parameters`, or search {parameter.name}:target"
        )


def _has(node: Any, name: str) -> bool:
    if isinstance(node, Mapping):
        return name in (node.get("parameters") or {}) or any(_has(value, name) for value in node.values())
    return isinstance(node, list) and any(_has(item, name) for item in node)


def _same(model: Any, other: Any) -> bool:
    if other is None:
        return False
    first, second = (recipe_file.identity(ModelReference.model_validate(name)) for name in (model, other))
    return first == second
