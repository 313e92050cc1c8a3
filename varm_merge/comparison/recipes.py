"""The recipes that are compared: files of the user, and recipes written for merge methods."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods import BasePolicy, MergeMethodSpec
from pydantic import TypeAdapter, ValidationError

from varm_common.errors import UserError, did_you_mean, listed
from varm_common.files import read_text, write_file
from varm_common.tables import short_names
from varm_merge.merging.method import METHOD_NAME
from varm_merge.merging.weights import Granularity
from varm_merge.recipes import recipe_file
from varm_merge.recipes.check import check as check_recipe
from varm_merge.recipes.problems import Looked

__all__ = ["PUBLISHED", "Entry", "Family", "check", "entries", "family", "sound"]


@dataclass
class Entry:
    """A recipe of the comparison.

    Attributes:
        name: Its name in the report and in file names.
        path: Its file.
        text: Its content.
        settings: Where the settings of a method come from; empty for a recipe of the user.
        problems: Why it cannot be merged.
        bytes: The approximate size of the merged model.
    """

    name: str
    path: Path
    text: str
    settings: str = ""
    problems: list[str] = field(default_factory=list)
    bytes: int = 0

    @property
    def content(self) -> dict[str, Any]:
        """The recipe as a mapping; empty if the text is no recipe."""
        try:
            content = yaml.safe_load(self.text)
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def method(self) -> str:
        return str(self.content.get("merge_method", "?"))

    @property
    def models(self) -> list[str]:
        """The models whose weights are read, base models included; the base model of the recipe first."""
        base = _named(self.content.get("base_model"))
        return list(dict.fromkeys([*([] if base is None else [base]), *_models(self.content, bases=True)]))

    @property
    def tokenizers(self) -> list[str]:
        """More models that the tokenizer, or the embedding of a token, is taken from."""
        names = [_named(source) for _, source, _ in recipe_file.tokenizers(self.content)]
        return [name for name in dict.fromkeys(names) if name is not None and name not in self.models]


@dataclass(frozen=True)
class Family:
    """The pivot and the targets that the recipes merge, as the recipes name them."""

    pivot: str
    targets: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.pivot, *self.targets)


DROPPED = {"weight": 1.0, "density": 0.5, "normalize": True}
PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({"weight": 1.0}, "equal shares"),
    "multislerp": ({"weight": 1.0}, "equal shares, without a base model"),
    "nuslerp": ({"weight": 1.0}, "equal shares, without a base model"),
    "slerp": ({"t": 0.5}, "halfway"),
    "nearswap": ({"t": 0.0001}, "t of the merge it was published with (QuartetAnemoi-70B-t0.0001)"),
    "task_arithmetic": (
        {"weight": 0.4},
        "0.4 of each task vector, as Yadav et al. 2023 use it without validation",
    ),
    "ties": ({"weight": 1.0, "density": 0.2}, "the top 20 % of each task vector, λ = 1: Yadav et al. 2023"),
    "sce": ({"select_topk": 0.1}, "the top 10 % of the elements: FuseChat-7B v2"),
    **dict.fromkeys(
        ("dare_ties", "dare_linear"),
        (DROPPED, "half of each task vector dropped, weights normalised: FuseChat-7B v1; equal shares"),
    ),
    **dict.fromkeys(("della", "della_linear"), (DROPPED, "density as for DARE; equal shares")),
    **dict.fromkeys(
        ("breadcrumbs", "breadcrumbs_ties"),
        (
            {"weight": 1.0, "density": 0.9, "gamma": 0.01, "normalize": True},
            "density and gamma that mergekit's guide recommends; equal shares",
        ),
    ),
}
"""The parameters that the recipe of a method gets, and who published them; the other methods get none."""
WITHOUT_BASE = {"multislerp", "nuslerp"}
"""With a base model, these merge task vectors, which is another method."""
INPUTS = {"merge_method", "base_model", "models", "slices", "modules", "parameters", "name"}
"""Keys of a recipe that ``--methods`` replaces; the others (dtype, tokenizer) are kept."""


def entries(
    recipes: Sequence[Path], methods: Sequence[str], base: str | None, models: Sequence[str], folder: Path
) -> list[Entry]:
    """The recipes of a comparison; a recipe for each of ``methods`` is written into ``folder``.

    Args:
        recipes: Files of the user.
        methods: Names of mergekit's methods, with parameters of theirs: ``della:density=0.6:epsilon=0.1``.
            ``varm:layer`` is VaRM at a granularity.
        base: The pivot for the methods; default that of the one recipe.
        models: The targets for the methods; default those of the one recipe.
        folder: For the recipes of the methods.

    Raises:
        UserError: A file cannot be read, two recipes have one name, a method is unknown, or it has no models.
    """
    all_entries = [Entry(name, path, read_text(path)) for name, path in zip(_stems(recipes), recipes, strict=True)]
    if methods:
        kept: dict[str, Any] = {}
        if not models:
            if len(all_entries) != 1:
                raise UserError("--methods needs models: name them with --base and --models, or give one recipe")
            kept = {key: value for key, value in all_entries[0].content.items() if key not in INPUTS}
            own = family(all_entries, base)
            base, models = own.pivot, own.targets
        elif base is None:
            raise UserError("--models needs --base: the pivot that the models were fine-tuned from")
        all_entries += [_method_entry(method, base, models, kept, folder) for method in dict.fromkeys(methods)]
    names = [entry.name for entry in all_entries]
    if twice := sorted(name for name in names if names.count(name) > 1):
        raise UserError(f"more than one recipe is called `{twice[0]}`; rename one of the files")
    if not all_entries:
        raise UserError("nothing to compare: give recipes, or --methods with --base and --models")
    return all_entries


def check(entry: Entry, cache_dir: str | None) -> None:
    """Store in an entry why it cannot be merged, and the size of its model."""
    looked = Looked()
    problems = check_recipe(entry.text, every=True, looked=looked, cache_dir=cache_dir)
    entry.bytes = looked.estimate.get("written_bytes", 0)
    entry.problems = [f"line {problem.line}: {problem.message}" for problem in problems]
    if entry.method == "slerp":
        more = "; multislerp and karcher merge more than two"
        entry.problems = [text + more if "requires exactly 2" in text else text for text in entry.problems]


def sound(entries: Sequence[Entry], cache_dir: str | None) -> list[Entry]:
    """Check all entries, and return those that can be merged.

    Raises:
        UserError: None can.
    """
    for entry in entries:
        check(entry, cache_dir)
    mergeable = [entry for entry in entries if not entry.problems]
    if not mergeable:
        problems = [f"{entry.name}: {problem}" for entry in entries for problem in entry.problems]
        raise UserError(f"no recipe can be merged:{listed(problems)}")
    return mergeable


def family(entries: Sequence[Entry], base: str | None = None) -> Family:
    """The pivot and all targets of some recipes.

    The pivot is ``base``, or else the only base_model that is not itself among the models of its recipe (a SLERP
    of two targets has one of them as its base_model).

    Raises:
        UserError: There is no pivot or more than one, or there is no target.
    """
    if base is None:
        named = [(_named(entry.content.get("base_model")), list(_models(entry.content))) for entry in entries]
        bases = [name for name, _ in named if name is not None]
        outside = [name for name, models in named if name is not None and name not in models]
        candidates = list(dict.fromkeys(outside or bases))
        if len(candidates) != 1:
            several = f"the pivot is one of {', '.join(candidates[:-1])} or {candidates[-1]}" if candidates else ""
            reason = several or "the recipes name no base_model"
            raise UserError(f"{reason}: give the model that the targets were fine-tuned from with --base")
        base = candidates[0]
    targets: dict[Any, str] = {}
    for model in (model for entry in entries for model in _models(entry.content)):
        targets.setdefault(_identity(model), model)
    targets.pop(_identity(base), None)
    if not targets:
        raise UserError("the recipes merge no model besides the pivot")
    return Family(base, tuple(targets.values()))


def _stems(recipes: Sequence[Path]) -> list[str]:
    """The names of the files, with those of their folders if they are needed to tell them apart.

    Raises:
        UserError: The name of a file cannot be that of a folder in ``models``.
    """
    whole = [(path.parent.resolve() / path.name).with_suffix("") for path in recipes]
    names = [_file_name(name) for name in short_names([str(path) for path in whole])]
    for recipe, path, name in zip(recipes, whole, names, strict=True):
        if not name or name.startswith(".") or path.name.startswith(".") or "\\" in name:
            raise UserError(
                f"the recipe `{recipe}` would be called `{path.name}`, which cannot be the folder of a merged "
                "model; rename the file so that its name has no dot at the start and no backslash"
            )
    return names


def _file_name(name: str) -> str:
    return name.strip("/").replace("/", "-").replace(":", "-")


def _method_entry(method: str, base: str, models: Sequence[str], kept: Mapping[str, Any], folder: Path) -> Entry:
    name, *options = method.split(":")
    granularity = options.pop(0) if options and "=" not in options[0] else ""
    known = {registered.spec.name: registered.spec for registered in merge_methods.registered_methods()}
    if name not in known:
        hint = did_you_mean(name, sorted(known), list_known=True)
        raise UserError(f"mergekit knows no method `{name}`{hint}")
    if granularity and (name != METHOD_NAME or granularity not in get_args(Granularity)):
        levels = ", ".join(get_args(Granularity))
        raise UserError(f"`{method}` is not a method: a granularity is given as varm:LEVEL, one of {levels}")
    given = _given_parameters(known[name], options)
    content = {**_merged_models(known[name], base, models), **kept}
    parameters, source = PUBLISHED.get(name, ({}, "mergekit's own defaults"))
    if name == METHOD_NAME:
        parameters, source = {"granularity": granularity or "matrix"}, ""
    if given:
        parameters = {**parameters, **given}
        source = "; ".join(filter(None, [source, f"{', '.join(given)} from the command line"]))
    if parameters:
        content["parameters"] = parameters
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    path = folder / f"{_file_name(method)}.yaml"
    if source:
        text = f"# {method}: {source}.\n{text}"
    write_file(path, text)
    return Entry(_file_name(method), path, text, source)


def _given_parameters(spec: MergeMethodSpec, options: Sequence[str]) -> dict[str, Any]:
    """The values of ``key=value`` options, as the method declares its parameters.

    Raises:
        UserError: The method has no such parameter, or it does not take the value.
    """
    declared = {parameter.name: parameter.value_type for parameter in spec.parameters}
    given: dict[str, Any] = {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in declared:
            known = did_you_mean(key, declared, list_known=True) if declared else "; it has none"
            raise UserError(f"--methods: `{spec.name}` has no parameter `{key}`{known}")
        try:
            given[key] = TypeAdapter(declared[key]).validate_python(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"--methods: `{spec.name}` does not take {key}=`{text}`: {reason}") from error
    return given


def _merged_models(spec: MergeMethodSpec, base: str, models: Sequence[str]) -> dict[str, Any]:
    """The models as a method takes them. A method for exactly two merges the two targets, without the pivot."""
    content: dict[str, Any] = {"merge_method": spec.name, "models": [{"model": model} for model in models]}
    contract = spec.contract
    if contract.base in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN) or spec.name in WITHOUT_BASE:
        return content
    takes_two = contract.min_inputs == contract.max_inputs == 2
    return {**content, "base_model": models[0] if takes_two and len(models) == 2 else base}


def _models(content: Any, bases: bool = False) -> Iterator[str]:
    """The models that a recipe merges, in slices and modules as well; with ``bases`` the base models too."""
    if isinstance(content, dict):
        for key, value in content.items():
            if (key == "model" or (bases and key == "base_model")) and (name := _named(value)) is not None:
                yield name
            elif key in ("models", "slices", "sources"):
                yield from _models(value, bases)
            elif key == "modules" and isinstance(value, dict):
                yield from _models(list(value.values()), bases)
    elif isinstance(content, list):
        for item in content:
            yield from _models(item, bases)


def _named(model: Any) -> str | None:
    """The name of a model in a recipe; None if there is none."""
    try:
        return None if model is None else str(ModelReference.model_validate(model))
    except (ValueError, RuntimeError):
        return None


def _identity(name: str) -> Any:
    """The same for two names of one model."""
    try:
        return recipe_file.identity(ModelReference.model_validate(name))
    except (ValueError, RuntimeError):
        return name
