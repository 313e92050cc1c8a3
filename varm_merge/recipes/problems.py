"""What is wrong with a recipe, and what the headers of its models say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mergekit.common import ModelReference

from varm_common.errors import UserError
from varm_merge.recipes import headers
from varm_merge.recipes.yaml_lines import Path as TreePath

__all__ = [
    "Family",
    "Looked",
    "Problem",
    "refuse",
]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe; ``line`` counts from 1, ``path`` is that of the key or item."""

    message: str
    line: int
    path: tuple[str | int, ...] = field(default=(), compare=False)


@dataclass
class Looked:
    """What ``check`` reads from the headers of a recipe's models.

    Attributes:
        models: The header of each model.
        remarks: What a merge survives.
        estimate: Bytes read, written, held (``headers.estimate``); empty if there is a problem.
        has_base: Whether one of them is a base to the method.
    """

    models: dict[ModelReference, headers.Model] = field(default_factory=dict)
    remarks: list[Problem] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    has_base: bool = False
    lines: dict[ModelReference, int] = field(default_factory=dict)

    def line_of(self, model: ModelReference) -> int:
        """The line that first names a model."""
        return self.lines.get(model, 1)


class Family(NamedTuple):
    """A list of models that are merged: its place, the model the others are compared with, all of it.

    ``has_pivot``: that model is the pivot; for a method without one it is the first.
    """

    path: TreePath
    base: ModelReference
    models: list[ModelReference]
    has_pivot: bool


def refuse(problems: Sequence[Problem], path: Path | None = None, ended: str = "was not merged") -> None:
    """Raise one ``UserError`` that lists ``problems``, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  line {problem.line}: {problem.message}" for problem in problems)
        raise UserError(f"{path or 'the recipe'} {ended}, it has {count}:\n{listed}")
