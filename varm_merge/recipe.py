"""Checks a ``varm`` recipe before any weight is read, and reports every problem at once with its line.

mergekit ignores keys and parameters it does not know (``granularty: layer`` merges at the default granularity
and exits 0). For its own recipes the plugin refuses them. Recipes of other methods are none of its business when
they are merged; ``varm-merge check`` asks for them as well.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pydantic
import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    MergeConfiguration,
)
from mergekit.merge_methods import BasePolicy, MergeMethodSpec
from mergekit.merge_methods.base import ParameterScope
from mergekit.options import MergeOptions
from pydantic import BaseModel

from varm_merge import by_name, headers, recipe_models
from varm_merge.errors import VarmError
from varm_merge.lineage import FUSION, Place, base_models_told, foreign_targets
from varm_merge.method import METHOD_NAME, SPEC
from varm_merge.presence import Hub, means_otherwise, near
from varm_merge.recipe_tree import DEFINITIONS, DUPLICATE, TOP, lines_of, nodes, plainly
from varm_merge.recipe_tree import Path as TreePath

__all__ = [
    "KINDS",
    "Looked",
    "Problem",
    "check",
    "line_of",
    "one_spelling",
    "read",
    "refuse",
    "uses_varm",
]

KINDS = {"run_yaml": "yaml", "multimerge": "multi", "merge_raw_pytorch": "raw"}
"""The kind of recipe that each of mergekit's programs reads, by the module of the program."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
TOLD_BEFORE = ("merge_method", "dtype", "out_dtype")
"""Keys that are judged before mergekit's definition is asked."""
NO_RECIPE = "no recipe: a recipe is a mapping with `merge_method`"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe; ``line`` counts from 1, ``path`` is that of the key or item."""

    message: str
    line: int
    path: tuple[str | int, ...] = field(default=(), compare=False)


@dataclass
class Looked:
    """What the headers of a recipe's models tell: filled by ``check``.

    Attributes:
        models: The header of each model.
        remarks: What a merge survives.
        estimate: Bytes read, written, held (``headers.estimate``); empty if there is a problem.
        width: How many models are merged at most, base included.
        has_base: Whether one of them is a base to the method.
    """

    models: dict[ModelReference, headers.Model] = field(default_factory=dict)
    remarks: list[Problem] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    width: int = 0
    has_base: bool = False
    lines: dict[ModelReference, int] = field(default_factory=dict)

    def line_of(self, model: ModelReference) -> int:
        """The line that first names a model."""
        return self.lines.get(model, 1)


class _Family(NamedTuple):
    """A list of models that are merged: its place, the model the others are compared with, all of it.

    ``has_pivot``: that model is the pivot; for a method without one it is the first.
    """

    path: TreePath
    base: ModelReference
    models: list[ModelReference]
    has_pivot: bool


def read(path: Path) -> str:
    """The text of a recipe, in any encoding that YAML allows (YAML 1.2, section 5.2).

    Raises:
        VarmError: It cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
        return content.decode(json.detect_encoding(content))
    except OSError as error:
        raise VarmError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"the byte 0x{content[error.start]:02x} is no UTF-8"
        refuse([Problem(f"{byte}: save the recipe as UTF-8", line)], path, "cannot be read")
        raise AssertionError from error


def check(
    text: str,
    *,
    kind: str = "yaml",
    models: bool = True,
    cache_dir: str | None = None,
    every: bool = False,
    looked: Looked | None = None,
    options: MergeOptions | None = None,
    by_name: bool = False,
    path: Path | None = None,
    out: Path | None = None,
) -> list[Problem]:
    """All problems of the ``varm`` recipes in ``text`` (of ``every`` method's), in the order of their lines.

    If nothing else is wrong mergekit plans the merge, without reading a weight, and its plan is judged.

    Args:
        text: One recipe or several.
        kind: ``yaml`` (mergekit-yaml), ``multi`` (several named recipes, mergekit-multi) or ``raw``
            (mergekit-pytorch).
        models: Whether to look at the models, too: their folders must exist, and a Hub id must be in the cache or
            answer on the Hub.
        cache_dir: Of models from the Hub; default that of ``options``.
        every: Whether recipes of other methods are checked as well.
        looked: Filled with what the headers of the models tell.
        options: Of the run.
        by_name: Whether tensors are merged by their names (``varm-merge yaml --by-name``).
        path: The file of the recipe, for commands that are suggested.
        out: Where the merge will be written.
    """
    try:
        roots = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        documents = list(yaml.safe_load_all(text))
        lines = [lines_of(root) for root in roots]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if not every and not re.search(rf"merge_method:.*\b{METHOD_NAME}\b", text, re.IGNORECASE):
            return []
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        return [Problem(f"not valid YAML: {reason}", mark.line + 1 if mark else 1)]
    options = options or MergeOptions(transformers_cache=cache_dir)
    names = {str(document["name"]) for document in documents if isinstance(document, dict) and "name" in document}
    problems: list[Problem] = []
    if not documents and (every or kind == "yaml"):
        problems.append(Problem(NO_RECIPE, 1))
    hub = Hub()
    for document_lines, document in zip(lines, documents, strict=True):
        if not isinstance(document, dict) and (every or kind == "yaml"):
            problems.append(Problem(NO_RECIPE, document_lines[()]))
        elif isinstance(document, dict) and (every or _means_varm(document)):
            checker = _Checker(document, document_lines, kind, names if kind == "multi" else set(), hub=hub)
            checker.looked, checker.options = looked or Looked(), options
            checker.by_name, checker.path, checker.out = by_name, path, out
            checker.run(models)
            problems += checker.problems
            if len(documents) > 1 and kind != "multi":
                line = roots[1].start_mark.line + 1
                problems.append(Problem("a second recipe in one file: that is for mergekit-multi", line))
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.line)


def line_of(text: str, key: str) -> int:
    """The line of a top-level key of the first recipe in ``text``; 1 if it is not there."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return lines_of(root).get((key,), 1) if root else 1


def one_spelling(config: MergeConfiguration) -> MergeConfiguration:
    """The recipe with one path for each folder, the base model's first: two paths to a folder are one model."""
    known: dict[Any, ModelReference] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, ModelReference):
            return known.setdefault(_identity(value), value)
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: replaced(part) for name, part in value})
        if isinstance(value, dict):
            return {key: replaced(part) for key, part in value.items()}
        return [replaced(part) for part in value] if isinstance(value, list) else value

    if config.base_model is not None:
        replaced(config.base_model)
    result: MergeConfiguration = replaced(config)
    return result


def _identity(reference: ModelReference) -> tuple[Any, ...]:
    """What a reference refers to, however it is spelled."""
    parts = [reference.model, reference.lora]
    return (
        *((_real(part.path), part.revision) if part is not None else None for part in parts),
        reference.override_architecture,
    )


def _real(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def _overwritten(document: Mapping[str, Any], out: Path, raw: bool) -> Iterator[tuple[TreePath, str]]:
    """Models that a merge into ``out`` would write over, or write into."""
    place = out.resolve()
    for path, value in _model_names(document):
        for part in [value] if raw else value.split("+"):
            here = Path(part if raw else part.split("@")[0])
            model = here.resolve()
            if here.exists() and (place in (model, *model.parents) or model in place.parents):
                yield path, f"the merge would be written to `{out}`, where `{part}` lies: name another folder"
                continue
            for file in here.iterdir() if here.is_dir() else ():
                if file.is_symlink() and place in file.resolve().parents:
                    message = f"`{file}` links to a file in `{out}`, where the merge would be written"
                    yield path, f"{message}: name another folder"
    for adapter in [out / "adapter_config.json"] if (out / "adapter_config.json").is_file() and not raw else []:
        message = "transformers would load that adapter with the merge: move it, or name another folder"
        yield ("merge_method",), f"`{adapter}` is there, and {message}"


def _model_names(document: Mapping[str, Any]) -> Iterator[tuple[TreePath, str]]:
    """Every place of a recipe that names a model, and the name."""
    for path, node, _ in nodes(document):
        for key in ("base_model", "model"):
            value = node.get(key)
            with suppress(RuntimeError, ValueError):
                if isinstance(value, dict):
                    value = str(ModelReference.model_validate(value))
            if isinstance(value, str):
                yield (*path, key), value
    for path, source, _ in recipe_models.tokenizers(document):
        if isinstance(source, str):
            yield path, source


def uses_varm(text: str) -> bool:
    """Whether any recipe in ``text`` merges by ``varm``."""
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        documents = yaml.safe_load_all(text)
        return any(isinstance(document, dict) and _means_varm(document) for document in documents)
    return False


def _means_varm(document: Mapping[str, Any]) -> bool:
    """Whether a recipe merges by ``varm``, or tries to."""
    name = document.get("merge_method")
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return re.search(rf"\b{METHOD_NAME}\b", text, re.IGNORECASE) is not None


def refuse(problems: Sequence[Problem], path: Path | None = None, ended: str = "was not merged") -> None:
    """Raise one ``VarmError`` that lists ``problems``, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  line {problem.line}: {problem.message}" for problem in problems)
        raise VarmError(f"{path or 'the recipe'} {ended}, it has {count}:\n{listed}")


@dataclass
class _Checker:
    document: dict[str, Any]
    lines: Mapping[TreePath, int]
    kind: str
    names: set[str]
    problems: list[Problem] = field(default_factory=list)
    spec: MergeMethodSpec = SPEC
    looked: "Looked" = field(default_factory=lambda: Looked())
    families: list["_Family"] = field(default_factory=list)
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

    def run(self, models: bool) -> None:
        self._method()
        for path in self.lines:
            if path and path[-1] == DUPLICATE:
                self.add(path, f"`{path[-2]}` is written twice; YAML would keep the last")
        for path, node, what in nodes(self.document):
            self._known_keys(path, node, self._keys_of(what), what)
            self._parameters((*path, "parameters"), node.get("parameters"), what)
        self._dtypes()
        if self._structure():
            for path, node, what in nodes(self.document):
                key = "sources" if what == "key of a slice" else "models"
                if node.get(key) is not None:
                    self._inputs((*path, key), node[key], node.get("base_model") if key == "sources" else None)
        if self.out is not None:
            for path, message in _overwritten(self.document, self.out, self.kind == "raw"):
                self.add(path, message)
        if self.by_name:
            for path, message in by_name.obstacles(self.document):
                self.add(path, message)
        if models:
            self._models()
            steps = (self._headers, self._template, self._plan, self._pivots, self._tokens, self._cards)
            for step in steps if self.kind != "raw" else ():
                if not self.problems:
                    step()

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
        return self.spelled.setdefault(_identity(reference), reference)

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
            self.families.append(_Family(path, pivot if has_pivot and pivot else models[0], merged, has_pivot))
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

    def _headers(self) -> None:
        """Read the headers of all models, the base's first."""
        from varm_merge import adapters

        content = {key: value for key, value in self.document.items() if key != "name"}
        config = one_spelling(MergeConfiguration.model_validate(content))
        references = [family.base for family in self.families] + config.referenced_models()
        for reference in dict.fromkeys(self._known(reference) for reference in references):
            if reference.model.path in self.names:
                continue
            where = self._place_of(reference)
            place = Place(reference.model.path, reference.model.revision, self.cache_dir)
            if reference.lora is not None:
                cache = self.options.lora_merge_cache
                made = adapters.merged_adapter(reference, cache) if cache else None
                place = Place(str(made)) if made is not None and made.is_dir() else place
                if message := adapters.why_unfit(reference, self.options):
                    self.add(where, message)
                    continue
            try:
                model = headers.read_model(place, self.hub)
            except ValueError as error:
                self.add(where, f"{error}{'' if place.path == reference.model.path else '; remove that folder'}")
                continue
            self.looked.models[reference] = model
            self.looked.lines[reference] = self.lines.get(where, 1)
            kept = Path(place.path) if place.path != reference.model.path else None
            stale = adapters.why_stale(reference, kept, self.cache_dir) if kept else None
            for why in (stale, headers.why_quantised(model), headers.why_whole(model)):
                if why:
                    self.tell(where, why)
            for message in model.remarks:
                self.remark(where, f"{message} (`{model.name}`)")
            base = next(iter(self.looked.models.values()))
            if message := headers.other_dtypes(base, model):
                self.remark(where, message)

    def _template(self) -> None:
        """The chat template is one, and there is a tokenizer to carry it."""
        content = {key: value for key, value in self.document.items() if key != "name"}
        config = MergeConfiguration.model_validate(content)
        if not config.chat_template:
            return
        has_tokenizer = bool(config.tokenizer or config.tokenizer_source)
        if found := recipe_models.why_no_template(config):
            message, raises = found  # with a tokenizer of its own; it copies one without a word about the template
            (self.add if raises and has_tokenizer else self.tell)(("chat_template",), message)
        elif not has_tokenizer:
            model = (config.base_model or config.referenced_models()[0]).model
            if model.path in self.names:
                return
            if why := self.hub.why_no_tokenizer(model.path, model.revision, self.cache_dir):
                self.tell(("chat_template",), f"there is no tokenizer to write the `chat_template` into: {why}")

    def _plan(self) -> None:
        """Let mergekit plan the merge, and judge its plan."""
        from varm_merge.dry_plan import dry_plan
        from varm_merge.loading import patterns

        models = self.looked.models
        if self.names or not all(model.tensors for model in models.values()):
            return  # made by another recipe of the file first, or pickled on the Hub: known when they are here
        content = {key: value for key, value in self.document.items() if key != "name"}
        config = one_spelling(MergeConfiguration.model_validate(content))
        spelled = {_identity(reference): reference for reference in config.referenced_models()}
        models = {spelled.get(_identity(reference), reference): model for reference, model in models.items()}
        plan = dry_plan(config, self.options, models, by_name=self.by_name)
        for finding in plan.problems:
            self.add(self._place_of(finding.model), finding.message)
        for finding in plan.remarks:
            self.remark(self._place_of(finding.model), finding.message)
        for message in plan.faults:
            keys = ("slices", "modules", "tokenizer", "tokenizer_source", "merge_method")
            self.tell((next(key for key in keys if key in self.document),), message)
        if plan.lost:
            self.tell(
                ("merge_method",),
                f"mergekit's definition of {plan.architecture} leaves out {patterns(plan.lost)} of "
                f"`{next(iter(models))}`; the merge would load with random weights there",
            )
        if (plan.lost or plan.problems) and not self.by_name and not [*by_name.obstacles(self.document)]:
            other = dry_plan(config, self.options, models, by_name=True)
            if not (other.problems or other.faults or other.remarks or plan.mixed):
                self.tell(("merge_method",), by_name.next_step(self.document, models, self.path, self.out))
        if not plan.problems:
            self.looked.estimate = headers.estimate(list(models.values()), plan.outputs)
            self.looked.has_base = self.families[0].has_pivot
            self.looked.width = max(len(dict.fromkeys([one.base, *one.models])) for one in self.families)

    def _place_of(self, model: ModelReference | None) -> TreePath:
        """Where the recipe first names a model; its ``merge_method`` for none."""
        for path, value in _model_names(self.document):
            with suppress(RuntimeError, ValueError):
                if model is not None and _identity(self._reference(value))[:2] == _identity(model)[:2]:
                    return path
        return ("merge_method",)

    def _tokens(self) -> None:
        """Remark on models whose ids stand for other tokens."""
        if self.document.get("tokenizer") or self.document.get("tokenizer_source"):
            return
        for path, base, models, _ in self.families:
            for index, reference in enumerate(models):
                if other := headers.other_tokens(base.model.path, reference.model.path):
                    ids = "id stands" if other == 1 else "ids stand"
                    self.remark(
                        (*path, index),
                        f"{other} {ids} for other tokens in {reference} than in {base}: rows of different "
                        "tokens are merged; `tokenizer:` puts them in one order",
                    )

    def _at(self, path: TreePath) -> Any:
        node: Any = self.document
        for part in path:
            node = node[part]
        return node

    def _pivots(self) -> None:
        """Targets that tell their pivot must tell this one, unless the base_model is one of two to merge."""
        if self.spec is not None and self.spec.contract.max_inputs == 2:
            return
        for path, pivot, models, has_pivot in self.families:
            known = [i for i, m in enumerate(models) if m.model.path not in self.names and m != pivot]
            if pivot.model.path in self.names or not has_pivot:
                continue
            base, *targets = (
                Place(model.model.path, model.model.revision, self.cache_dir)
                for model in (pivot, *(models[index] for index in known))
            )
            try:
                for number, told in foreign_targets(base, targets):
                    self.add(
                        (*path, known[number]),
                        f"`{targets[number].path}` was fine-tuned from `{told}` (its {FUSION}), whose weights are "
                        f"not those of the base_model `{base.path}`; make that pivot the base_model, or remove "
                        f"{FUSION} from the target if you know they fit",
                    )
            except (ValueError, OSError) as error:
                self.add(path, f"whether the targets come from `{base.path}` cannot be told: {error}")

    def _cards(self) -> None:
        """Remark on targets without a fusion.json whose cards name another base model.

        No problem: a card may name the base of the base, or the pivot by another name; weights are not compared.
        """
        for path, pivot, models, has_pivot in self.families:
            known = {_last(pivot.model.path)}
            for index, model in enumerate(models if has_pivot and self.spec is SPEC else ()):
                place = Place(model.model.path, model.model.revision, self.cache_dir)
                if model == pivot or model.model.path in self.names or place.file(FUSION) is not None:
                    continue
                named = base_models_told(place)
                if named and not known & {_last(one) for one in named}:
                    told = ", ".join(f"`{one}`" for one in named)
                    message = (
                        f"the card of `{model}` says that it comes from {told}, and the base_model is `{pivot}`: "
                        "varm needs the model that the target was fine-tuned from"
                    )
                    self.remark((*path, index), message)

    def _models(self) -> None:
        seen: set[str] = set()
        for path, node, _ in nodes(self.document):
            for key in ("base_model", "model"):
                value = node.get(key)
                if self.kind != "raw" and isinstance(value, str) and (otherwise := means_otherwise(value)):
                    if value not in seen:
                        self.add((*path, key), otherwise)
                    seen.add(value)
                    continue
                try:
                    reference = self._reference(node[key])
                except (KeyError, RuntimeError, ValueError):
                    continue  # not there, or reported with the structure
                for part, wanted in ((reference.model, "config.json"), (reference.lora, "adapter_config.json")):
                    if part is None or str(part) in seen or part.path in self.names:
                        continue
                    seen.add(str(part))
                    if self.kind == "raw":
                        found = Path(part.path).is_file()
                        message = None if found else f"no checkpoint file `{part.path}`{near(part.path)}"
                    else:
                        message = self.hub.why_missing(part.path, part.revision, wanted, self.cache_dir)
                        folder = Path(part.path)
                        if message is None and part is reference.lora and folder.is_dir():
                            found = any(
                                (folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")
                            )
                            message = (
                                None if found else f"the adapter `{part.path}` has no adapter_model.safetensors"
                            )
                    if message:
                        self.add((*path, key), message)
        self._tokenizers()

    def _tokenizers(self) -> None:
        """Tokenizers are there, and rows of single tokens are those of models that are merged."""
        merged = {model for family in self.families for model in (family.base, *family.models)}
        for path, source, whole in recipe_models.tokenizers(self.document):
            try:
                reference = self._reference(source)
            except (RuntimeError, ValueError):
                continue  # reported with the structure
            model = reference.model
            if not whole:
                if merged and reference not in merged:
                    self.add(path, f"`{reference}` is not among the models, so it has no row for a token")
            elif model.path not in self.names and (
                message := self.hub.why_no_tokenizer(model.path, model.revision, self.cache_dir)
            ):
                self.add(path, message)


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


def _last(name: str) -> str:
    """A model's name without its owner or folder, which differ between copies."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _suggest(word: str, known: Sequence[str], *, list_known: bool = True) -> str:
    swapped = [name for name in known if sorted(name) == sorted(word)]
    close = swapped or difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known are {', '.join(known)}" if list_known else ""
