"""Checks a recipe without its models: keys, parameters, dtypes, layer ranges, number of models.

mergekit ignores keys and parameters that it does not know: ``granularty: layer`` merges at the default granularity
and exits 0. Here they are problems.
"""

import re
from collections.abc import Sequence
from typing import Any, get_args

import pydantic
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, InputSliceDefinition
from mergekit.merge_methods import BasePolicy, ParameterScope
from mergekit.merge_methods.base import ParameterSpec

from varm_common.errors import did_you_mean
from varm_merge.merging.method import SPEC
from varm_merge.recipes.recipe import Family, Recipe
from varm_merge.recipes.recipe_file import one_spelling
from varm_merge.recipes.yaml_lines import DUPLICATE, KEY, nodes
from varm_merge.recipes.yaml_lines import Path as TreePath

__all__ = ["FLOATS", "check_structure"]

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The floating dtypes that mergekit takes."""
CHECKED_FIRST = ("merge_method", "dtype", "out_dtype")
"""Keys that are judged before mergekit's definition of a recipe."""


def check_structure(recipe: Recipe) -> None:
    """Add every problem of the recipe that shows without its models."""
    _method(recipe)
    for path in recipe.lines:
        if path and path[-1] == DUPLICATE:
            recipe.add(path, f"`{path[-2]}` is written twice; YAML would keep only the last")
    for path, node, definition in nodes(recipe.document, recipe.definition):
        known = tuple(definition.model_fields)
        if not path and recipe.kind == "multi":
            known = (*known, "name")
        _unknown_keys(recipe, path, node, known, KEY[definition.__name__])
        _parameters(recipe, (*path, "parameters"), node.get("parameters"), definition.__name__)
    _dtypes(recipe)
    if _mergekit_accepts(recipe):
        for path, node, definition in nodes(recipe.document, recipe.definition):
            for key in {"models", "sources"} & definition.model_fields.keys():
                if node.get(key) is not None:
                    _inputs(recipe, (*path, key))


# Keys and parameters


def _method(recipe: Recipe) -> None:
    method = recipe.document.get("merge_method")
    known = {registered.spec.name: registered.spec for registered in merge_methods.registered_methods()}
    if isinstance(method, str) and method in known:
        recipe.spec = known[method]
    elif method is None:
        recipe.add((), "no `merge_method`")
    else:
        hint = did_you_mean(str(method).lower(), known, list_known=True)
        recipe.add(("merge_method",), f"mergekit knows no method `{method}`{hint}")


def _unknown_keys(recipe: Recipe, path: TreePath, node: dict[str, Any], known: Sequence[str], what: str) -> None:
    for key in node:
        if key not in known:
            recipe.add((*path, key), f"unknown {what} `{key}`{did_you_mean(str(key), known, list_known=True)}")


def _parameters(recipe: Recipe, path: TreePath, parameters: Any, definition: str) -> None:
    if recipe.spec.name != recipe.document.get("merge_method"):
        return  # the method is unknown, and so are its parameters
    specs = {spec.name: spec for spec in recipe.spec.parameters}
    for name, setting in parameters.items() if isinstance(parameters, dict) else ():
        where = (*path, name)
        if name not in specs:
            hint = did_you_mean(str(name), specs, list_known=True) if specs else "; it has none"
            recipe.add(where, f"unknown parameter `{name}` of {recipe.spec.name}{hint}")
        elif definition.startswith("Input") and specs[name].scope is ParameterScope.SHARED:
            message = f"`{name}` is a parameter of the whole merge: write it under the recipe's `parameters`"
            recipe.add(where, f"{message}, with a `filter` if it is for some tensors only")
        else:
            _setting(recipe, where, specs[name], setting)


def _setting(recipe: Recipe, path: TreePath, spec: ParameterSpec, setting: Any) -> None:
    if isinstance(setting, list):
        if not setting:
            recipe.add(path, f"`{spec.name}` has an empty list")
        for index, item in enumerate(setting):
            _setting(recipe, (*path, index), spec, item)
        _unused_entries(recipe, path, spec.name, setting)
    elif isinstance(setting, dict):
        if not isinstance(setting.get("filter"), str | None):
            recipe.add((*path, "filter"), f"the `filter` of `{spec.name}` is `{setting['filter']}`, not text")
        _unknown_keys(recipe, path, setting, tuple(ConditionalParameter.model_fields), f"key of `{spec.name}`")
        if "value" in setting:
            _setting(recipe, (*path, "value"), spec, setting["value"])
        else:
            recipe.add(path, f"this entry of `{spec.name}` has no `value`")
    elif message := _why_invalid(spec, setting):
        recipe.add(path, message)


def _unused_entries(recipe: Recipe, path: TreePath, name: str, entries: Sequence[Any]) -> None:
    """mergekit uses the first entry whose filter fits a tensor; remark on entries that are never the first."""
    if not all(isinstance(entry, dict) for entry in entries):
        return
    filters = [entry.get("filter") for entry in entries]
    for index, own in enumerate(filters):
        for earlier, other in enumerate(filters[:index]):
            takes_all = other in (None, "*")
            if takes_all or (isinstance(own, str) and isinstance(other, str) and other in own):
                reason = "has no `filter`" if takes_all else f"has the filter `{other}`"
                message = f"this entry of `{name}` is never used: entry {earlier + 1} {reason}"
                recipe.remark((*path, index), f"{message}; write it after this")
                break


def _why_invalid(spec: ParameterSpec, value: Any) -> str | None:
    is_misread = isinstance(value, bool) and spec.value_type is not bool and spec in SPEC.parameters
    try:
        spec.validate(str(value) if is_misread else value)  # pydantic takes true for the number 1
    except pydantic.ValidationError as error:
        choices = [choice for choice in get_args(spec.value_type) if isinstance(choice, str)]
        hint = did_you_mean(str(value), choices)
        return f"`{spec.name}` is `{value}`, not {_expected(error.errors()[0]['msg'])}{hint}"
    return None


def _expected(message: str) -> str:
    """The expected value in a message such as "Input should be a valid number, unable to parse string"."""
    return message.removeprefix("Input should be ").partition(", unable")[0]


def _dtypes(recipe: Recipe) -> None:
    for key in ("dtype", "out_dtype"):
        value = recipe.document.get(key)
        if value is not None and str(value).removeprefix("torch.") not in FLOATS:
            word = re.sub(r"^(b?)f(p?)(?=\d)", r"\1float", str(value).lower())  # bf16, fp32
            hint = did_you_mean(word, FLOATS)
            recipe.add((key,), f"`{key}` is `{value}`, not one of {', '.join(FLOATS)}{hint}")


# Structure


def _mergekit_accepts(recipe: Recipe) -> bool:
    """Let mergekit read the recipe; its errors are added as problems."""
    content = {key: value for key, value in recipe.document.items() if key != "name"}  # mergekit-multi's
    try:
        recipe.config = one_spelling(recipe.definition.model_validate(content))
    except pydantic.ValidationError as error:
        for detail in error.errors(include_url=False):
            path = tuple(detail["loc"])
            if path[0] in CHECKED_FIRST or ("parameters" in path and recipe.problems):
                continue
            if "layer_range" in path and (detail["type"], path[-1]) != ("missing", "layer_range"):
                _layer_range(recipe, path[: path.index("layer_range") + 1])
            else:
                recipe.add(path, _explained(path, detail["type"], detail["msg"], detail["input"]))
        return False
    except (RuntimeError, TypeError) as error:
        recipe.add((), str(error))
        return False
    for path, _, definition in nodes(recipe.document):
        if definition is InputSliceDefinition:
            _layer_range(recipe, (*path, "layer_range"))
    return True


def _explained(path: TreePath, kind: str, message: str, value: Any) -> str:
    """An error of pydantic without the names of classes."""
    where = ".".join(map(str, path))
    if kind == "missing":
        return f"no `{path[-1]}`" + (f" in `{where.rpartition('.')[0]}`" if path[1:] else "")
    expected = _expected(message)
    if kind.startswith(("model_", "dataclass_")):
        is_model = path[-1] in ("model", "base_model", "ModelReference")
        expected = "a model: a folder or the id of one on the Hub" if is_model else "a mapping"
    elif expected == message:
        return f"{where}: {message[0].lower()}{message[1:]}" if where else message
    return f"`{where}` is `{value}`, not {expected}"


def _layer_range(recipe: Recipe, path: TreePath) -> None:
    """A ``layer_range`` is [first, end): two whole numbers that count from 0."""
    span: Any = recipe.document
    for part in path:
        span = span[part]
    is_pair = isinstance(span, list) and len(span) == 2 and all(type(number) is int for number in span)
    if not (is_pair and 0 <= span[0] < span[1]):
        expected = "not [first, end): two whole numbers, the first from 0, the end above it"
        recipe.add_if_varm(path, f"`layer_range` is {span}, {expected}")


# Models


def _inputs(recipe: Recipe, path: TreePath) -> None:
    """Check one list of models: their number, the base model, no model twice, every required parameter."""
    spec, contract, entries = recipe.spec, recipe.spec.contract, recipe.at(path)
    base = getattr(recipe.at(path[:-1]), "base_model", None) or recipe.config.base_model
    if base is None and contract.base is BasePolicy.REQUIRED:
        needed = "the pivot that the targets were fine-tuned from" if spec is SPEC else "one"
        recipe.add(("merge_method",), f"no base_model: {spec.name} needs {needed}")
        return
    models = [recipe.reference(entry.model) for entry in entries]
    pivot = None if base is None else recipe.reference(base)
    merged = models
    if path[-1] == "models" and pivot is not None and pivot not in models:
        merged = [*models, pivot]  # as mergekit does
    _required_parameters(recipe, path, merged, pivot)
    for index, model in enumerate(models):
        if model in models[:index]:
            recipe.add((*path, index), f"{model} is listed twice")
    if path[-1] == "sources" and len({end - first for first, end in (entry.layer_range for entry in entries)}) > 1:
        recipe.add(path, "the layer_ranges of the sources have different lengths")
    has_base = pivot is not None and contract.base is not BasePolicy.IGNORED
    if spec is SPEC and not {*models} - {pivot}:
        recipe.add(path, f"no target: list at least one model beside the base_model {pivot}")
    if has_base and pivot not in merged:
        recipe.add(path, f"the base_model {pivot} is not among the sources, so it has no layer_range")
    elif spec is not SPEC:
        try:
            contract.validate_ids(list(dict.fromkeys(merged)), pivot)
        except ValueError as error:
            recipe.add(path, str(error).replace("Merge method", spec.name))
    _unused_parameters(recipe, path, models, pivot)
    if merged:
        recipe.families.append(Family(path, pivot if has_base and pivot else merged[0], merged, has_base))


def _unused_parameters(
    recipe: Recipe, path: TreePath, models: Sequence[ModelReference], pivot: ModelReference | None
) -> None:
    """Remark on parameters of the base model that only models with a task vector have."""
    names = {own.name for own in recipe.spec.parameters if own.scope is ParameterScope.NON_BASE}
    for index, (model, entry) in enumerate(zip(models, recipe.at(path), strict=True)):
        for name in (entry.parameters or {}).keys() & names if model == pivot else ():
            message = f"this `{name}` is not used: {model} is the base_model, which has no task vector"
            recipe.remark((*path, index, "parameters", name), message)


def _required_parameters(
    recipe: Recipe, path: TreePath, merged: Sequence[ModelReference], pivot: ModelReference | None
) -> None:
    """Every parameter without a default is given, for the whole merge or for each model."""
    above = [recipe.at(path[:depth]) for depth in range(len(path))]
    shared = {name for mapping in above for name in getattr(mapping, "parameters", None) or ()}
    own = [entry.parameters or {} for entry in recipe.at(path)]
    for parameter in recipe.spec.parameters:
        name = parameter.name
        if not parameter.required or name in shared:
            continue
        if parameter.scope is ParameterScope.SHARED:
            recipe.add(path, f"{recipe.spec.name} needs the parameter `{name}`")
            continue
        for index, model in enumerate(merged):
            is_needed = parameter.scope is ParameterScope.INPUT or model != pivot
            if is_needed and not (index < len(own) and name in own[index]):
                reason = "; it is the base_model, and is merged as well" if model == pivot else ""
                recipe.add((*path, index), f"{model} has no `{name}`, which {recipe.spec.name} needs{reason}")
