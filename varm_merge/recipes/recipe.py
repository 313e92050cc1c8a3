"""One recipe under check: what it says, where it says it, and what was found."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethodSpec
from mergekit.options import MergeOptions
from pydantic import BaseModel

from varm_merge.merging.lineage import Place
from varm_merge.merging.method import SPEC
from varm_merge.recipes.locate import Hub
from varm_merge.recipes.problems import Looked, Problem
from varm_merge.recipes.recipe_file import identity, model_names
from varm_merge.recipes.yaml_lines import Definition
from varm_merge.recipes.yaml_lines import Path as TreePath

__all__ = ["Family", "Recipe"]


class Family(NamedTuple):
    """A list of models that are merged.

    Attributes:
        path: Of the list.
        base: The base model; the first model if the method has none.
        models: All models that are merged.
        has_base: Whether the method compares the models with the base model.
    """

    path: TreePath
    base: ModelReference
    models: list[ModelReference]
    has_base: bool


@dataclass
class Recipe:
    """A recipe, the run that it is meant for (its options, its file, its output folder), and the findings.

    Attributes:
        kind: ``yaml``, ``multi`` or ``raw``: which of mergekit's programs reads it.
        names: Of all recipes in the same file; a model may be the result of one of them.
        config: The recipe as mergekit reads it, with one spelling for each model; None if mergekit refuses it.
    """

    document: dict[str, Any]
    lines: Mapping[TreePath, int]
    kind: str
    names: set[str]
    looked: Looked
    hub: Hub
    options: MergeOptions
    by_name: bool = False
    path: Path | None = None
    out: Path | None = None
    problems: list[Problem] = field(default_factory=list)
    spec: MergeMethodSpec = SPEC
    families: list[Family] = field(default_factory=list)
    config: Any = None

    def add(self, path: TreePath, message: str) -> None:
        """Add a problem."""
        self.problems.append(self._problem(path, message))

    def remark(self, path: TreePath, message: str) -> None:
        """Add a remark."""
        self.looked.remarks.append(self._problem(path, message))

    def add_if_varm(self, path: TreePath, message: str) -> None:
        """Add a problem of a ``varm`` recipe; for other methods, which mergekit runs all the same, a remark."""
        (self.add if self.spec is SPEC else self.remark)(path, message)

    def _problem(self, path: TreePath, message: str) -> Problem:
        while path and path not in self.lines:
            path = path[:-1]
        return Problem(message, self.lines.get(path, 1), path)

    @property
    def definition(self) -> Definition:
        """mergekit's definition of this kind of recipe."""
        if self.kind != "raw":
            return MergeConfiguration  # type: ignore[no-any-return]
        from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

        return RawPyTorchMergeConfig  # type: ignore[no-any-return]

    def at(self, path: TreePath) -> Any:
        """A part of ``config``."""
        node: Any = self.config
        for part in path:
            node = getattr(node, str(part)) if isinstance(node, BaseModel) else node[part]
        return node

    def reference(self, value: Any) -> ModelReference:
        """A model as mergekit reads it: mergekit-pytorch takes the path of a file as it stands."""
        return ModelReference.model_validate({"model": {"path": value}} if self.kind == "raw" else value)

    def place(self, reference: ModelReference) -> Place:
        """The folder or Hub id of a model."""
        return Place(reference.model.path, reference.model.revision, self.options.transformers_cache)

    def place_of(self, model: ModelReference | None) -> TreePath:
        """Where the recipe first names a model; its ``merge_method`` for None."""
        for path, value in model_names(self.document):
            with suppress(RuntimeError, ValueError):
                if model is not None and identity(self.reference(value))[:2] == identity(model)[:2]:
                    return path
        return ("merge_method",)
