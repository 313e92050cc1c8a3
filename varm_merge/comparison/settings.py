"""What a comparison is asked for, and what it has found out about each model."""

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varm_common.errors import UserError
from varm_merge.comparison.cache import model_files
from varm_merge.comparison.recipes import Entry
from varm_merge.comparison.scores import HeldOut, Tasks

__all__ = [
    "FORMAT",
    "MODELS",
    "PLAIN",
    "SPARE",
    "VERSION",
    "Row",
    "Settings",
    "layers_of",
    "mergekit_command",
    "reason_of",
    "size_of_folder",
    "with_header",
]

FORMAT, VERSION = "varm-merge comparison", 1
MODELS = "models"
PLAIN = ("--quiet", "--no-write-model-card")
"""Without the card: for it mergekit asks the Hub after each model."""
SPARE = 1.02
"""Of the disk: a model's other files."""


@dataclass(frozen=True)
class Settings:
    """How recipes are compared.

    Attributes:
        out: The folder of the report.
        repeat: How many times each is merged.
        keep: Whether the merged models stay there.
        device: ``cpu``, ``cuda``; default mergekit's, and for evaluation an accelerator if there is one.
        seed: Of methods that drop at random.
        mergekit: More options of mergekit-yaml.
        held_out: Text to score the models on.
        tasks: Of lm-evaluation-harness.
        cache_dir: Of models from the Hub.
        trust_remote_code: Whether code of the models' repositories may run.
        quiet: Tell nothing of the progress.
    """

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


@dataclass
class Row:
    """A model of the comparison: what was found of it, and what went wrong."""

    name: str
    role: str
    folder: Path
    entry: Entry | None = None
    fingerprint: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def file(self) -> str:
        return f"{self.role}-{self.name}"


def mergekit_command() -> list[str]:
    """The stock program of this environment, or ours where start-up hooks are switched off."""
    if os.environ.get("VARM_MERGE_AUTOLOAD") == "0":
        return [sys.executable, "-c", "from varm_merge.cli import main; main()", "yaml"]
    beside = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("mergekit-yaml")
    if found is None:
        raise UserError("no mergekit-yaml beside this Python; see `varm-merge doctor`")
    return [found]


def with_header(command: list[str], log: Path) -> list[str]:
    """The command, written into its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"$ {shlex.join(command)}\n")
    return command


def reason_of(message: str) -> str:
    """Of what a failed program said last: its error, or its last line."""
    lines = [line for line in message.splitlines() if line.strip()]
    told = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    return " ".join(line.strip() for line in lines[told[-1] :]).removeprefix("Error: ") if told else lines[-1]


def layers_of(folder: Path) -> int | None:
    """The number of layers in a model's config; None if it names none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = (config.get("text_config") or config).get("num_hidden_layers")
        return int(found) if found is not None else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def size_of_folder(folder: Path) -> int:
    """Bytes of a model's files in a folder."""
    return sum(file.stat().st_size for file in model_files(folder))
