"""A recipe as YAML has it: its mappings with the kind of keys that mergekit reads in each, and their lines."""

from collections.abc import Iterator
from typing import Any

import pydantic
import yaml
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.tokenizer.config import TokenizerConfig

__all__ = ["DEFINITIONS", "DUPLICATE", "TOP", "Path", "lines_of", "nodes", "plainly"]

Path = tuple[str | int, ...]
"""Of a key or an item."""

TOP = "top-level key"
DEFINITIONS: dict[str, type[pydantic.BaseModel]] = {
    "key of a model": InputModelDefinition,
    "key of a slice": OutputSliceDefinition,
    "key of a source": InputSliceDefinition,
    "key of a module": OutputModuleDefinition,
    "key of the tokenizer": TokenizerConfig,
}
_CHILDREN = {
    TOP: {
        "models": "key of a model",
        "slices": "key of a slice",
        "modules": "key of a module",
        "tokenizer": "key of the tokenizer",
    },
    "key of a module": {"models": "key of a model", "slices": "key of a slice"},
    "key of a slice": {"sources": "key of a source"},
}
"""What mergekit reads under which key; whatever else is nested in a recipe is an unknown key and left alone."""


def nodes(mapping: Any, path: Path = (), what: str = TOP) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """(path, mapping, what its keys are) of a recipe and every model, slice, source and module in it."""
    if not isinstance(mapping, dict):
        return
    yield path, mapping, what
    for key, child_what in _CHILDREN.get(what, {}).items():
        child = mapping.get(key)
        if isinstance(child, list):
            children: list[tuple[Path, Any]] = [((*path, key, index), item) for index, item in enumerate(child)]
        elif key == "modules" and isinstance(child, dict):
            children = [((*path, key, name), item) for name, item in child.items()]
        else:
            children = [((*path, key), child)]
        for child_path, item in children:
            yield from nodes(item, child_path, child_what)


DUPLICATE = "<duplicate>"


def lines_of(root: yaml.Node) -> dict[Path, int]:
    """The line (from 1) of every key and item of a YAML tree, by its path."""
    lines: dict[Path, int] = {(): root.start_mark.line + 1}

    def walk(path: Path, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here: Path = (*path, key.value)
                if here in lines and key.value != "<<":
                    second: Path = (*here, DUPLICATE)
                    lines[second] = key.start_mark.line + 1
                lines[here] = key.start_mark.line + 1
                walk(here, value)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                item: Path = (*path, index)
                lines[item] = value.start_mark.line + 1
                walk(item, value)

    walk((), root)
    return lines


KINDS = {
    "list_type": "a list",
    "tuple_type": "a list of two",
    "dict_type": "a mapping",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
}
"""What is expected, by pydantic's name for what is wrong."""


def plainly(path: Path, kind: str, message: str, value: Any) -> str:
    """What mergekit's definition of a recipe has against it, in words that do not need its source."""
    where = ".".join(str(part) for part in path)
    if kind == "missing":
        return f"no `{path[-1]}`" + (f" in `{'.'.join(str(part) for part in path[:-1])}`" if path[1:] else "")
    if kind.startswith(("model_", "dataclass_")):
        a_model = path[-1] in ("model", "base_model", "ModelReference")
        expected = "a model: a folder or the id of one on the Hub" if a_model else "a mapping"
        return f"`{where}` is `{value}`, not {expected}"
    if kind in KINDS:
        return f"`{where}` is `{value}`, not {KINDS[kind]}"
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message
