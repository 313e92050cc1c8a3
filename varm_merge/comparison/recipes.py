"""What is compared: recipes from files, and recipes written for merge methods by their published settings."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import BasePolicy, MergeMethodSpec
from pydantic import BaseModel

from varm_common.errors import UserError
from varm_common.files import write_whole
from varm_merge.merging.method import METHOD_NAME
from varm_merge.merging.weights import Granularity
from varm_merge.recipes.check import check as check_recipe
from varm_merge.recipes.problems import Looked

__all__ = ["PUBLISHED", "Entry", "Family", "check", "entries", "family", "short_names", "sound"]


@dataclass
class Entry:
    """One recipe of the comparison.

    Attributes:
        name: In the report, and of its files.
        path: Of the recipe.
        text: Its content.
        settings: Where the settings of a method come from; empty for a recipe of the user's.
        problems: What keeps it from being merged.
        bytes: Of the merged model, about.
    """

    name: str
    path: Path
    text: str
    settings: str = ""
    problems: list[str] = field(default_factory=list)
    bytes: int = 0

    @property
    def content(self) -> dict[str, Any]:
        """The recipe; empty if it is none."""
        try:
            found = yaml.safe_load(self.text)
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def method(self) -> str:
        return str(self.content.get("merge_method", "?"))

    @property
    def models(self) -> list[str]:
        """All whose weights it reads, the base_model of a slice as well; its own base_model first."""
        base = _named(self.content.get("base_model"))
        return list(dict.fromkeys([*([] if base is None else [base]), *_models(self.content, bases=True)]))

    @property
    def tokenizers(self) -> list[str]:
        """The models beside them that its tokenizer, or the embedding of a token, is taken from."""
        try:
            config = MergeConfiguration.model_validate(self.content)
        except (ValueError, RuntimeError):
            return []
        found = dict.fromkeys(map(str, _references([config.tokenizer_source, config.tokenizer])))
        return [model for model in found if model not in self.models]


@dataclass(frozen=True)
class Family:
    """The pivot and the targets that the recipes merge, as the recipes name them."""

    pivot: str
    targets: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.pivot, *self.targets)


@dataclass(frozen=True)
class _Published:
    """Settings of a method, and who published them."""

    parameters: Mapping[str, Any]
    source: str


PUBLISHED = {
    "linear": _Published({"weight": 1.0}, "equal shares"),
    "multislerp": _Published({"weight": 1.0}, "equal shares, without a base model"),
    "nuslerp": _Published({"weight": 1.0}, "equal shares, without a base model"),
    "slerp": _Published({"t": 0.5}, "halfway"),
    "nearswap": _Published({"t": 0.0001}, "t of the merge it was published with (QuartetAnemoi-70B-t0.0001)"),
    "task_arithmetic": _Published(
        {"weight": 0.4}, "0.4 of each task vector, as Yadav et al. 2023 use it without validation"
    ),
    "ties": _Published(
        {"weight": 1.0, "density": 0.2}, "the top 20 % of each task vector, λ = 1: Yadav et al. 2023"
    ),
    "sce": _Published({"select_topk": 0.1}, "the top 10 % of the elements: FuseChat-7B v2"),
    **dict.fromkeys(
        ("dare_ties", "dare_linear"),
        _Published(
            {"weight": 1.0, "density": 0.5, "normalize": True},
            "half of each task vector dropped, weights normalised: FuseChat-7B v1; equal shares",
        ),
    ),
    **dict.fromkeys(
        ("della", "della_linear"),
        _Published({"weight": 1.0, "density": 0.5, "normalize": True}, "density as for DARE; equal shares"),
    ),
    **dict.fromkeys(
        ("breadcrumbs", "breadcrumbs_ties"),
        _Published(
            {"weight": 1.0, "density": 0.9, "gamma": 0.01, "normalize": True},
            "density and gamma that mergekit's guide recommends; equal shares",
        ),
    ),
}
"""What a method is given that a recipe would have to say; methods that are not here need nothing said."""
WITHOUT_BASE = {"multislerp", "nuslerp"}
"""Here a base model is optional and makes another method of them, one of task vectors."""
INPUTS = {"merge_method", "base_model", "models", "slices", "modules", "parameters", "name"}
"""Keys of a recipe that ``--methods`` replaces; the others (dtype, tokenizer) are kept."""


def entries(
    recipes: Sequence[Path], methods: Sequence[str], base: str | None, models: Sequence[str], folder: Path
) -> list[Entry]:
    """The recipes of a comparison, those of ``methods`` written into ``folder``.

    Args:
        recipes: Files of the user's.
        methods: Names of mergekit's methods; ``varm:layer`` is VaRM at a granularity.
        base: The pivot of the methods' recipes; default that of the one recipe.
        models: Their targets; default those of the one recipe.
        folder: For the recipes of the methods.

    Raises:
        UserError: A file cannot be read, names collide, a method is unknown, or there are no models for it.
    """
    found = [Entry(name, path, _read(path)) for name, path in zip(_stems(recipes), recipes, strict=True)]
    if methods:
        kept: dict[str, Any] = {}
        if not models:
            if len(found) != 1:
                raise UserError("--methods needs models: name them with --base and --models, or give one recipe")
            kept = {key: value for key, value in found[0].content.items() if key not in INPUTS}
            own = family(found, base)
            base, models = own.pivot, own.targets
        elif base is None:
            raise UserError("--models needs --base: the pivot that the models were fine-tuned from")
        found += [_of_method(method, base, models, kept, folder) for method in dict.fromkeys(methods)]
    names = [entry.name for entry in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"more than one recipe is called `{twice[0]}`; rename one of the files")
    if not found:
        raise UserError("nothing to compare: give recipes, or --methods with --base and --models")
    return found


def check(entry: Entry, cache_dir: str | None) -> None:
    """Note what keeps an entry from being merged, before anything runs."""
    looked = Looked()
    problems = check_recipe(entry.text, every=True, looked=looked, cache_dir=cache_dir)
    entry.bytes = looked.estimate.get("written_bytes", 0)
    entry.problems = [f"line {problem.line}: {problem.message}" for problem in problems]
    if entry.method == "slerp":
        more = "; multislerp and karcher merge more than two"
        entry.problems = [one + more if "merges exactly 2" in one else one for one in entry.problems]


def sound(found: Sequence[Entry], cache_dir: str | None) -> list[Entry]:
    """Check all entries; those that can be merged.

    Raises:
        UserError: None can.
    """
    for entry in found:
        check(entry, cache_dir)
    mergeable = [entry for entry in found if not entry.problems]
    if not mergeable:
        told = "\n".join(f"  {entry.name}: {problem}" for entry in found for problem in entry.problems)
        raise UserError(f"no recipe can be merged:\n{told}")
    return mergeable


def family(found: Sequence[Entry], base: str | None = None) -> Family:
    """The pivot and all targets of some recipes.

    The pivot is ``base``, or else the one base_model that is not itself among the models of its recipe (a SLERP of
    two targets has one of them as its base_model).

    Raises:
        UserError: That tells none or several, or there is no target.
    """
    if base is None:
        inputs = [(_named(entry.content.get("base_model")), list(_models(entry.content))) for entry in found]
        bases = [of for of, _ in inputs if of is not None]
        outside = [of for of, models in inputs if of is not None and of not in models]
        candidates = list(dict.fromkeys(outside or bases))
        if len(candidates) != 1:
            told = "the recipes name no base_model" if not candidates else f"the pivot is one of {_or(candidates)}"
            raise UserError(f"{told}: say with --base which model the targets were fine-tuned from")
        base = candidates[0]
    targets: list[str] = []
    for model in dict.fromkeys(model for entry in found for model in _models(entry.content)):
        if not any(_same(model, known) for known in (base, *targets)):
            targets.append(model)
    if not targets:
        raise UserError("the recipes merge no model beside the pivot")
    return Family(base, tuple(targets))


def short_names(models: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """For each model the fewest last parts of its path that tell it from the others and from names ``taken``."""
    used = set(taken)
    parts = [model.rstrip("/").split("/") for model in models]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names) and not used.intersection(names):
            return names
    return list(models)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _stems(recipes: Sequence[Path]) -> list[str]:
    """The files' names, with their folders' where that is needed to tell them apart.

    Raises:
        UserError: A file has a name that can be no folder's below ``models``.
    """
    whole = [(path.parent.resolve() / path.name).with_suffix("") for path in recipes]
    names = [_file_name(name) for name in short_names([str(path) for path in whole])] if recipes else []
    for recipe_file, path, name in zip(recipes, whole, names, strict=True):
        if not name or any(one.startswith(".") for one in (name, path.name)) or "\\" in name:
            raise UserError(
                f"the recipe `{recipe_file}` would be called `{path.name}`, which can be no folder of a merged "
                "model; rename the file so that its name begins with no dot and holds no backslash"
            )
    return names


def _file_name(name: str) -> str:
    return name.strip("/").replace("/", "-").replace(":", "-")


def _of_method(method: str, base: str, models: Sequence[str], kept: Mapping[str, Any], folder: Path) -> Entry:
    name, _, granularity = method.partition(":")
    known = {one.spec.name: one.spec for one in merge_methods.registered_methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        told = f"did you mean `{near[0]}`?" if near else f"it knows {', '.join(sorted(known))}"
        raise UserError(f"mergekit knows no method `{name}`; {told}")
    if granularity and (name != METHOD_NAME or granularity not in get_args(Granularity)):
        raise UserError(
            f"`{method}` is no method: a granularity is given as varm:LEVEL, "
            f"one of {', '.join(get_args(Granularity))}"
        )
    content = {**_inputs(known[name], base, models), **kept}
    published = PUBLISHED.get(name, _Published({}, "mergekit's own defaults" if name != METHOD_NAME else ""))
    parameters = {"granularity": granularity or "matrix"} if name == METHOD_NAME else dict(published.parameters)
    if parameters:
        content["parameters"] = parameters
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    path = folder / f"{_file_name(method)}.yaml"
    if published.source:
        text = f"# {method}: {published.source}.\n{text}"
    write_whole(path, text)
    return Entry(_file_name(method), path, text, published.source)


def _inputs(spec: MergeMethodSpec, base: str, models: Sequence[str]) -> dict[str, Any]:
    """The models as a method takes them: one of exactly two merges the only two targets, without the pivot."""
    listed = [{"model": model} for model in models]
    content: dict[str, Any] = {"merge_method": spec.name, "models": listed}
    if spec.contract.base in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN) or spec.name in WITHOUT_BASE:
        return content
    return {**content, "base_model": models[0] if _is_of_two(spec) and len(models) == 2 else base}


def _is_of_two(spec: MergeMethodSpec) -> bool:
    return bool(spec.contract.min_inputs == spec.contract.max_inputs == 2)


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


def _references(content: Any) -> Iterator[ModelReference]:
    """Every model that a part of mergekit's configuration names."""
    if isinstance(content, ModelReference):
        yield content
    elif isinstance(content, BaseModel):
        yield from _references([getattr(content, name) for name in type(content).model_fields])
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _references(item)


def _named(model: Any) -> str | None:
    """A model of a recipe in words; None if it names none."""
    try:
        return None if model is None else str(ModelReference.model_validate(model))
    except (ValueError, RuntimeError):
        return None


def _same(one: str, other: str) -> bool:
    """Whether two names are of one model."""
    if one == other:
        return True
    try:
        paths = [Path(ModelReference.model_validate(name).model.path) for name in (one, other)]
        return "+" not in one + other and paths[0].is_dir() and paths[0].samefile(paths[1])
    except (OSError, ValueError, RuntimeError):
        return False


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
