"""How a stage is started: an accelerate config, or a command to put before ``-m fusion_trainer``."""

import re
import shlex
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fusion_trainer.pipeline.processes import OWN

__all__ = ["accelerate_config", "beginning", "division"]

ACCELERATE = (".yaml", ".yml")


def accelerate_config(launch: str) -> str | None:
    """The config file, if ``launch`` is only that."""
    words = _words(launch)
    return words[0] if len(words) == 1 and words[0].endswith(ACCELERATE) else None


def beginning(launch: str | None) -> list[str]:
    """The beginning of the command that runs a stage."""
    if not launch:
        return OWN
    if config := accelerate_config(launch):
        head = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    else:
        head = _words(launch)
    return [*head, "-m", "fusion_trainer"]


def division(launch: str | None) -> dict[str, Any]:
    """The settings of a launch that change a target: the precision, and the number of processes."""
    settings: dict[str, Any] = {}
    for word, following in pairwise([*_words(launch or ""), ""]):
        if word.endswith(ACCELERATE):
            with suppress(OSError, yaml.YAMLError, AttributeError):  # a missing file is reported elsewhere
                content = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
                settings |= {name: content.get(name) for name in ("num_processes", "mixed_precision")}
        elif named := re.search(r"(num_processes|mixed_precision)(=.*)?$", word, re.IGNORECASE):
            settings[named[1].lower()] = (named[2] or following).lstrip("=")
    return settings


def _words(command: str) -> list[str]:
    """The words of a command, as a shell splits them; one word if it cannot."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]
