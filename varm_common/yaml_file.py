"""A YAML file of settings, with the line of every key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from varm_common.errors import UserError

__all__ = ["read_yaml"]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line of each key: ``training.learning_rate``, ``sources[1].model``.

    Raises:
        UserError: The file cannot be read, is not YAML, is not a mapping, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"cannot read the config `{path}`: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a mapping of settings but a {type(settings).__name__}")
    lines: dict[str, int] = {}
    for name, line in _keys(root) if root else ():
        if name in lines:
            raise UserError(f"{path}, line {line}: `{name}` was already set")
        lines[name] = line
    return settings, lines


def _keys(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The path and line of every key and list item in a node."""
    if isinstance(node, yaml.MappingNode):
        dot = "." if prefix else ""
        inner = [(f"{prefix}{dot}{key.value}", key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(f"{prefix}[{number}]", item, item) for number, item in enumerate(node.value)]
    else:
        inner = []
    for name, marked, value in inner:
        yield name, marked.start_mark.line + 1
        yield from _keys(value, name)
