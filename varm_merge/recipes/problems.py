"""Results of the check of a recipe: problems, remarks, and the headers of its models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from varm_common.errors import UserError
from varm_merge.recipes.headers import Model

__all__ = ["Looked", "Problem", "refuse"]


@dataclass(frozen=True)
class Problem:
    """A problem or a remark. ``line`` counts from 1; ``path`` leads to the key or item in the recipe."""

    message: str
    line: int
    path: tuple[str | int, ...] = field(default=(), compare=False)


@dataclass
class Looked:
    """Results of the check other than the problems.

    Attributes:
        models: The header of each model, the base model's first.
        lines: The line that first names each model.
        remarks: What the user should know; the merge runs all the same.
        estimate: Number of parameters, and bytes read and written (``headers.estimate``); empty if there are
            problems.
        has_base: Whether the method compares the models with a base model.
    """

    models: dict[ModelReference, Model] = field(default_factory=dict)
    lines: dict[ModelReference, int] = field(default_factory=dict)
    remarks: list[Problem] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    has_base: bool = False


def refuse(problems: Sequence[Problem], path: Path | None = None, outcome: str = "was not merged") -> None:
    """Raise one ``UserError`` that lists ``problems``, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  line {problem.line}: {problem.message}" for problem in problems)
        raise UserError(f"{path or 'the recipe'} {outcome}, it has {count}:\n{lines}")
