"""How a stage is started: what `launch` names, and which of its settings decide the result."""

import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fusion_trainer.config import NOT_OF_THE_RESULT
from fusion_trainer.pipeline.processes import OWN

__all__ = [
    "accelerate_config",
    "divides_work",
    "launched",
    "of_the_result",
]

ACCELERATE = (".yaml", ".yml")
HARMLESS = {
    "workers",
    "batch_tokens",
    "output",
    "dialogues",
    "maps",
    "source_store",
    "pivot_store",
    "aligned_stores",
}
"""Settings that do not change what a stage makes, or are places of what it depends on."""


def launched(launch: str | None) -> list[str]:
    """The beginning of the command that runs a stage."""
    if not launch:
        return OWN
    if config := accelerate_config(launch):
        head = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    else:
        head = _words(launch)
    return [*head, "-m", "fusion_trainer"]


def divides_work(launch: str) -> dict[str, Any]:
    """What of a launch decides a target: in what precision, and how many processes share an update."""
    found: dict[str, Any] = {}
    words = _words(launch)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.endswith(ACCELERATE):
            with suppress(OSError, yaml.YAMLError, AttributeError):  # that it is not there is told elsewhere
                content = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
                found |= {name: content.get(name) for name in ("num_processes", "mixed_precision")}
        elif named := re.search(r"(num_processes|mixed_precision)(=.*)?$", word, re.IGNORECASE):
            found[named[1].lower()] = (named[2] or following).lstrip("=")
    return found


def _words(command: str) -> list[str]:
    """As a shell reads it; what it cannot read is one word, and no program."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def accelerate_config(launch: str) -> str | None:
    """The file, if that is what is named; a command may end with one, too."""
    words = _words(launch)
    return words[0] if len(words) == 1 and words[0].endswith(ACCELERATE) else None


def of_the_result(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a stage makes."""
    found = {name: value for name, value in settings.items() if name not in HARMLESS}
    if "training" in found:
        training = found["training"]
        found["training"] = {
            k: v for k, v in training.items() if k not in NOT_OF_THE_RESULT and k[-6:] != "_token"
        }
    for name in ("data", "pivot", "model"):  # they are known by their content
        found.pop(name, None)
    return found
