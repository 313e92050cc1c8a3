"""The settings of a comparison, and the row of each model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varm_merge.comparison.recipes import Entry
from varm_merge.comparison.scores import HeldOut
from varm_merge.comparison.tasks import Tasks

__all__ = ["Row", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How recipes are compared: the options of ``varm-merge compare``."""

    out: Path
    repeat: int = 1
    keep: bool = True
    device: str | None = None
    seed: int = 0
    mergekit: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    tasks: Tasks | None = None
    cache_dir: str | None = None
    trust_remote_code: bool = False
    quiet: bool = False

    def merge_options(self) -> list[str]:
        """The options of mergekit-yaml. It writes no model card, because for one it queries the Hub."""
        cache = ["--transformers-cache", self.cache_dir] if self.cache_dir else []
        trust = ["--trust-remote-code"] if self.trust_remote_code else []
        device = ["--cuda"] if self.device == "cuda" else []
        plain = ["--quiet", "--no-write-model-card", "--random-seed", str(self.seed)]
        return [*plain, *device, *cache, *trust, *self.mergekit]


@dataclass
class Row:
    """A model of the comparison.

    Attributes:
        name: Its name in the report.
        role: ``pivot``, ``target`` or ``merge``.
        folder: The folder of the model.
        entry: The recipe of a merge.
        inputs: What a merge depends on.
        fingerprint: Of the model's files; empty if it is not there.
        results: The results of the steps, by kind.
        problems: What went wrong.
        is_new: Whether its weights were written in this run.
    """

    name: str
    role: str
    folder: Path
    entry: Entry | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_new: bool = False

    @property
    def file(self) -> str:
        """The name of its files."""
        return f"{self.role}-{self.name}"
