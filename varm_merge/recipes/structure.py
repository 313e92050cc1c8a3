"""Checks what a recipe says by itself: keys, parameters, dtypes, layer ranges.

mergekit ignores keys and parameters that it does not know: ``granularty: layer`` merges at the default granularity
and exits 0. Here they are problems."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pydantic
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    MergeConfiguration,
)
from mergekit.merge_methods import BasePolicy, MergeMethodSpec
from mergekit.merge_methods.base import ParameterScope
from mergekit.options import MergeOptions

from varm_merge.merging.method import SPEC
from varm_merge.recipes import inputs as recipe_models
from varm_merge.recipes.locate import Hub
from varm_merge.recipes.problems import Family, Looked, Problem
from varm_merge.recipes.recipe_file import identity
from varm_merge.recipes.yaml_lines import DEFINITIONS, TOP, nodes, plainly
from varm_merge.recipes.yaml_lines import Path as TreePath

__all__ = [
    "NO_RECIPE",
    "StructureChecker",
    "last_part",
]

FLOATS = ("float16", "bfloat16", "float32", "float64")
TOLD_BEFORE = ("merge_method", "dtype", "out_dtype")
"""Keys that are judged before mergekit's definition is asked."""
NO_RECIPE = "no recipe: a recipe is a mapping with `merge_method`"


@dataclass
class StructureChecker:
    """What is wrong with a recipe by itself, whatever its models are."""

    document: dict[str, Any]
    lines: Mapping[TreePath, int]
    kind: str
    names: set[str]
    problems: list[Problem] = field(default_factory=list)
    spec: MergeMethodSpec = SPEC
    looked: "Looked" = field(default_factory=lambda: Looked())
    families: list["Family"] = field(default_factory=list)
    hub: Hub = field(default_factory=Hub)
    options: MergeOptions = field(default_factory=MergeOptions)
    by_name: bool = False
    path: Path | None = None
    out: Path | None = None
    spelled: dict[tuple[Any, ...], ModelReference] = field(default_factory=dict)

    @property
    def cache_dir(self) -> str | None:
        folder: str | None = self.options.transformers_cache
        return folder

    def _method(self) -> None:
        """Find what mergekit knows of the method."""
        method = self.document.get("merge_method")
        known = {one.spec.name: one.spec for one in merge_methods.registered_methods()}
        if isinstance(method, str) and method in known:
            self.spec = known[method]
        elif method is None:
            self.add((), "no `merge_method`")
        else:
            self.add(
                ("merge_method",),
                f"mergekit knows no method `{method}`{_suggest(str(method).lower(), tuple(known))}",
            )

    def add(self, path: TreePath, message: str) -> None:
        while path and path not in self.lines:
            path = path[:-1]
        self.problems.append(Problem(message, self.lines.get(path, 1), path))

    def _keys_of(self, what: str) -> tuple[str, ...]:
        if what != TOP:
            return tuple(DEFINITIONS[what].model_fields)
        keys = tuple(self._configuration().model_fields)
        return (*keys, "name") if self.kind == "multi" else keys

    def _configuration(self) -> Any:
        """mergekit's own definition of the recipe."""
        if self.kind != "raw":
            return MergeConfiguration
        from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

        return RawPyTorchMergeConfig

    def _reference(self, value: Any) -> ModelReference:
        """A model as mergekit will read it: mergekit-pytorch takes a file's path as it stands."""
        return ModelReference.model_validate({"model": {"path": value}} if self.kind == "raw" else value)

    def _known(self, value: Any) -> ModelReference:
        """A model, spelled as where the recipe names it first."""
        reference = self._reference(value)
        return self.spelled.setdefault(identity(reference), reference)

    def _known_keys(self, path: TreePath, mapping: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
        for key in mapping:
            if key not in known:
                self.add((*path, key), f"unknown {what} `{key}`{_suggest(str(key), known)}")

    def _parameters(self, path: TreePath, parameters: Any, what: str) -> None:
        if self.spec.name != self.document.get("merge_method"):
            return  # unknown, and told
        specs = {spec.name: spec for spec in self.spec.parameters}
        for name, setting in parameters.items() if isinstance(parameters, dict) else ():
            where = (*path, name)
            if name not in specs:
                hint = _suggest(str(name), tuple(specs)) if specs else "; it has none"
                self.add(where, f"unknown parameter `{name}` of {self.spec.name}{hint}")
            elif what in ("key of a model", "key of a source") and specs[name].scope is ParameterScope.SHARED:
                self.add(
                    where,
                    f"`{name}` is a parameter of the whole merge: write it under the recipe's `parameters`, "
                    "with a `filter` if it is for some tensors only",
                )
            else:
                self._setting(where, specs[name], setting)

    def _setting(self, path: TreePath, spec: Any, setting: Any) -> None:
        if isinstance(setting, list):
            if not setting:
                self.add(path, f"`{spec.name}` has an empty list")
            for index, item in enumerate(setting):
                self._setting((*path, index), spec, item)
            self._unreached(path, spec.name, setting)
        elif isinstance(setting, dict):
            if not isinstance(setting.get("filter"), str | None):
                self.add((*path, "filter"), f"the `filter` of `{spec.name}` is `{setting['filter']}`, not text")
            self._known_keys(path, setting, tuple(ConditionalParameter.model_fields), f"key of `{spec.name}`")
            if "value" in setting:
                self._setting((*path, "value"), spec, setting["value"])
            else:
                self.add(path, f"this entry of `{spec.name}` has no `value`")
        elif message := _why_invalid(spec, setting):
            self.add(path, message)

    def _unreached(self, path: TreePath, name: str, entries: Sequence[Any]) -> None:
        """Entries whose tensors an earlier entry has taken: the first that fits is used."""
        filters = [one.get("filter") if isinstance(one, dict) else "" for one in entries]
        if not all(isinstance(one, dict) for one in entries):
            return
        for index, own in enumerate(filters):
            for earlier, other in enumerate(filters[:index]):
                if other in (None, "*") or (isinstance(own, str) and isinstance(other, str) and other in own):
                    taken = "has no `filter`" if other in (None, "*") else f"has the filter `{other}`"
                    message = (
                        f"this entry of `{name}` is never used: entry {earlier + 1} {taken}; write it after this"
                    )
                    self.remark((*path, index), message)
                    break

    def tell(self, path: TreePath, message: str) -> None:
        """A problem of a ``varm`` recipe; of another method's, which mergekit merges all the same, a remark."""
        if self.spec is SPEC:
            self.add(path, message)
        else:
            self.remark(path, message)

    def remark(self, path: TreePath, message: str) -> None:
        while path and path not in self.lines:
            path = path[:-1]
        self.looked.remarks.append(Problem(message, self.lines.get(path, 1), path))

    def _dtypes(self) -> None:
        for key in ("dtype", "out_dtype"):
            value = self.document.get(key)
            try:
                sound = value is None or dtype_from_name(value).is_floating_point
            except (RuntimeError, AttributeError):
                sound = False
            if not sound:
                word = re.sub(r"^(b?)f(p?)(?=\d)", r"\1float", str(value).lower())  # bf16, fp32
                hint = _suggest(word, FLOATS, list_known=False)
                self.add((key,), f"`{key}` is `{value}`, not one of {', '.join(FLOATS)}{hint}")

    def _structure(self) -> bool:
        """Let mergekit's own definition judge the rest; whether the inputs can be walked at all."""
        content = {key: value for key, value in self.document.items() if key != "name"}
        try:
            self._configuration().model_validate(content)
        except pydantic.ValidationError as error:
            for detail in error.errors(include_url=False):
                path = tuple(detail["loc"])
                if path[0] in TOLD_BEFORE or ("parameters" in path and self.problems):
                    continue
                absent = detail["type"] == "missing" and path[-1] == "layer_range"
                if (
                    absent
                    or "layer_range" not in path
                    or not self._wrong_range(path[: path.index("layer_range") + 1])
                ):
                    self.add(path, plainly(path, detail["type"], detail["msg"], detail["input"]))
            return False
        except (RuntimeError, TypeError) as error:
            self.add((), str(error))
            return False
        for path, _, what in nodes(self.document):
            if what == "key of a source":
                self._wrong_range((*path, "layer_range"))
        return True

    def _wrong_range(self, path: TreePath) -> bool:
        """Whether a ``layer_range`` is none: [first, end), two numbers that count from 0."""
        span = self._at(path)
        if (
            isinstance(span, list)
            and len(span) == 2
            and all(isinstance(number, int) and not isinstance(number, bool) for number in span)
            and 0 <= span[0] < span[1]
        ):
            return False
        message = (
            f"`layer_range` is {span}, not [first, end): two whole numbers, the first from 0, the end above it"
        )
        self.tell(path, message)
        return True

    def _inputs(self, path: TreePath, entries: Sequence[Mapping[str, Any]], slice_base: Any) -> None:
        """A pivot, at least one target, no model twice, one length: in one list of models that are merged."""
        base, contract = slice_base or self.document.get("base_model"), self.spec.contract
        pivot = None if base is None else self._known(base)
        models = [self._known(entry["model"]) for entry in entries]
        if base is None and contract.base is BasePolicy.REQUIRED:
            needs = "the pivot that the targets were fine-tuned from" if self.spec is SPEC else "one"
            self.add(("merge_method",), f"no base_model: {self.spec.name} needs {needs}")
            return
        if path[-1] == "models" and pivot is not None and self.spec is not SPEC and pivot not in models:
            merged = [*models, pivot]  # as mergekit does, for methods that ignore a base, too
        else:
            merged = models
        for where, message in (
            *recipe_models.required(path, self.spec, merged, pivot, self._given(path, entries, len(merged))),
            *(recipe_models.amounts(path, self.spec, merged, pivot) if self.spec is not SPEC else ()),
            *recipe_models.repeated(path, models),
        ):
            self.add(where, message)
        if (
            path[-1] == "sources"
            and len({int(e["layer_range"][1]) - int(e["layer_range"][0]) for e in entries}) > 1
        ):
            self.add(path, "the layer_ranges of the sources have different lengths")
        has_pivot = pivot is not None and contract.base is not BasePolicy.IGNORED
        if has_pivot or models:
            self.families.append(Family(path, pivot if has_pivot and pivot else models[0], merged, has_pivot))
        if self.spec is not SPEC:
            return
        if not [model for model in models if model != pivot]:
            self.add(path, f"no target: list at least one model beside the base_model {pivot}")
        if path[-1] == "sources" and pivot not in models:
            self.add(path, f"the base_model {pivot} is not among the sources, so it has no layer_range")

    def _given(
        self, path: TreePath, entries: Sequence[Mapping[str, Any]], count: int
    ) -> list[recipe_models.Settings]:
        """The settings that hold for each model of a list, the nearest first."""
        above = [self._at(path[:depth]) for depth in range(len(path) - 1, -1, -1)]
        return recipe_models.in_all(entries, above, count)

    def _at(self, path: TreePath) -> Any:
        node: Any = self.document
        for part in path:
            node = node[part]
        return node


def _why_invalid(spec: Any, value: Any) -> str | None:
    choices = [choice for choice in get_args(spec.value_type) if isinstance(choice, str)]
    if choices:
        if value in choices:
            return None
        hint = _suggest(str(value), choices, list_known=False)
        return f"`{spec.name}` is `{value}`, not one of {', '.join(choices)}{hint}"
    try:
        if isinstance(value, bool) and spec.value_type is not bool and spec in SPEC.parameters:
            raise ValueError
        spec.validate(value)
    except ValueError:
        limits = {"temperature": "a number > 0", "select_topk": "a number in (0, 1]"}
        kinds = {bool: "true or false", int: "a whole number"}
        expected = limits.get(spec.name) if spec in SPEC.parameters else None
        return f"`{spec.name}` is `{value}`, not {expected or kinds.get(spec.value_type, 'a number')}"
    return None


def last_part(name: str) -> str:
    """A model's name without its owner or folder, which differ between copies."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _suggest(word: str, known: Sequence[str], *, list_known: bool = True) -> str:
    swapped = [name for name in known if sorted(name) == sorted(word)]
    close = swapped or difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known are {', '.join(known)}" if list_known else ""
