"""Whether models can run tasks: their chat templates and context lengths."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from varm_common.errors import UserError
from varm_common.models import has_chat_template
from varm_merge.comparison.backends import CHAT
from varm_merge.comparison.harness import answer_tokens
from varm_merge.comparison.scores import context_length
from varm_merge.comparison.tasks import Tasks

__all__ = ["demand_template", "short_contexts"]


def demand_template(tasks: Tasks, models: Iterable[Path], recipes: Iterable[Mapping[str, Any]]) -> None:
    """Refuse chat tasks if no model has a chat template, and no recipe gives one.

    Args:
        tasks: The tasks. A server with a chat endpoint has its own templates.
        models: The folders of the pivot and the targets.
        recipes: The recipes of the merges.
    """
    chats = [task.label for task in tasks.tasks if task.chat and tasks.backend != CHAT]
    folders = list(models)
    without = folders and not any(map(has_chat_template, folders))
    if chats and without and not any(recipe.get("chat_template") for recipe in recipes):
        raise UserError(f"--tasks: {', '.join(chats)} need a chat template, and no model has one")


def short_contexts(tasks: Tasks, models: Mapping[str, Path]) -> Iterator[str]:
    """Notes on tasks whose answers are cut because a model's context is short."""
    for task in tasks.tasks:
        for name, folder in models.items():
            length = context_length(folder)
            if task.max_tokens and (most := answer_tokens(task, length)) < task.max_tokens:
                yield f"{task.label}: answers of {name} have at most {most} tokens: its context is {length}"
