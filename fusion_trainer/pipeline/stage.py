"""A stage of the pipeline: the command it runs, what it depends on, and the files that kind of stage writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BEGUN", "KINDS", "MODEL_FILES", "RECORD", "Kind", "Stage"]

RECORD = "stage.json"
"""File in the folder of a finished stage."""
BEGUN = "begun"
"""File in the folder of a merge that is not finished: mergekit itself leaves no sign that a folder is its own."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
MODEL_FILES = (*WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
STORE_FILES = ("manifest.json", "extraction.json", "shard-*.arrow")


@dataclass(frozen=True)
class Kind:
    """The files of one kind of stage, as patterns of their paths in its folder.

    Attributes:
        writes: The result. Any other file in the folder is the user's.
        first: At least one of these exists as soon as the stage has written anything.
        temporary: Regular expression of folders that are not part of the result.
        later: What may be added after the stage has finished.
    """

    writes: tuple[str, ...]
    first: tuple[str, ...]
    temporary: str = ""
    later: tuple[str, ...] = ()


KINDS = {
    "prepare": Kind(("manifest.json", "blocks.arrow"), ("manifest.json",), later=("tokens-*.arrow",)),
    "extract": Kind(STORE_FILES, STORE_FILES[:2]),
    "align": Kind(STORE_FILES, STORE_FILES[:2]),
    "train": Kind((*MODEL_FILES, "adapter/*"), ("training.json", "fusion.json"), temporary=r"checkpoint-\d+|runs"),
    "merge": Kind((*MODEL_FILES, "adapter/*", "*.md", "*.yml"), (BEGUN,), later=(BEGUN,)),
    "evaluate": Kind(("scores.json",), ("scores.json",)),
}
"""All kinds, in the order in which they run."""


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        kind: One of ``KINDS``.
        name: Its name among the stages of its kind.
        output: Its folder.
        command: The program to run and its arguments.
        inputs: Files to write for the command, with their content.
        settings: The settings that decide the result.
        needs: Titles of the stages whose results it reads.
        models: Models from outside the pipeline that it reads, each with its revision, by their role.
        files: Data from outside the pipeline that it reads, by its place in the pipeline's file.
    """

    kind: str
    name: str
    output: Path
    command: list[str]
    inputs: Mapping[Path, str]
    settings: Mapping[str, Any]
    needs: Sequence[str]
    models: Mapping[str, tuple[str, str | None]]
    files: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"
