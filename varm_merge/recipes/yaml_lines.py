"""A recipe as YAML: the mappings that mergekit reads in it, and the line of every key."""

from collections.abc import Iterator
from typing import Any, get_args

import yaml
from mergekit.config import MergeConfiguration
from pydantic import BaseModel

__all__ = ["DUPLICATE", "KEY", "Definition", "Path", "lines_of", "nodes"]

Path = tuple[str | int, ...]
"""The keys and indices that lead to a key or an item."""
Definition = type[BaseModel]
"""mergekit's definition of a mapping: the keys that it may have."""

KEY = {
    "MergeConfiguration": "top-level key",
    "RawPyTorchMergeConfig": "top-level key",
    "InputModelDefinition": "key of a model",
    "OutputSliceDefinition": "key of a slice",
    "InputSliceDefinition": "key of a source",
    "OutputModuleDefinition": "key of a module",
    "TokenizerConfig": "key of the tokenizer",
}
"""The name of each definition's keys in messages; the mappings of other definitions are not visited."""
DUPLICATE = "<duplicate>"
"""Last part of the path of a key that is written a second time."""


def nodes(
    mapping: Any, definition: Definition = MergeConfiguration, path: Path = ()
) -> Iterator[tuple[Path, dict[str, Any], Definition]]:
    """The recipe and every model, slice, source and module in it: (path, mapping, mergekit's definition)."""
    if not isinstance(mapping, dict):
        return
    yield path, mapping, definition
    for key, field in definition.model_fields.items():
        child, child_definition = mapping.get(key), _definition_in(field.annotation)
        if child_definition is None:
            continue
        if isinstance(child, list):
            children: list[tuple[Path, Any]] = [((*path, key, index), item) for index, item in enumerate(child)]
        elif key == "modules" and isinstance(child, dict):
            children = [((*path, key, name), item) for name, item in child.items()]
        else:
            children = [((*path, key), child)]
        for child_path, item in children:
            yield from nodes(item, child_definition, child_path)


def _definition_in(annotation: Any) -> Definition | None:
    """The definition in a type such as ``list[InputModelDefinition] | None``."""
    if getattr(annotation, "__name__", None) in KEY:
        return annotation  # type: ignore[no-any-return]
    return next(filter(None, map(_definition_in, get_args(annotation))), None)


def lines_of(root: yaml.Node) -> dict[Path, int]:
    """The line (from 1) of every key and item of a YAML tree, by its path."""
    lines: dict[Path, int] = {(): root.start_mark.line + 1}

    def walk(path: Path, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            children = [(key.value, key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            children = [(index, value, value) for index, value in enumerate(node.value)]
        else:
            return
        for part, start, child in children:
            here: Path = (*path, part)
            line = start.start_mark.line + 1
            if here in lines and part != "<<":
                duplicate: Path = (*here, DUPLICATE)
                lines[duplicate] = line
            lines[here] = line
            walk(here, child)

    walk((), root)
    return lines
