"""Advice: how to merge by the names of tensors what mergekit's definition of an architecture does not cover."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from varm_merge.merging.experts import PLAIN, matrices
from varm_merge.recipes.headers import Model
from varm_merge.recipes.recipe_file import identity
from varm_merge.recipes.yaml_lines import Path as TreePath
from varm_merge.recipes.yaml_lines import nodes

__all__ = ["next_step", "obstacles"]


def obstacles(document: Mapping[str, Any]) -> Iterator[tuple[TreePath, str]]:
    """Settings by layer, which a merge by names cannot obey: their places, and why."""
    for key in ("slices", "modules"):
        if document.get(key) is not None:
            yield (key,), f"`{key}`: a merge by names takes whole models, list them under `models`"
    for path, node, _ in nodes(document):
        for name, setting in (node.get("parameters") or {}).items():
            entries = setting if isinstance(setting, list) else [setting]
            values = [entry["value"] for entry in entries if isinstance(entry, dict) and "value" in entry]
            is_gradient = isinstance(setting, list) and not any(isinstance(entry, dict) for entry in entries)
            if is_gradient or any(isinstance(value, list) for value in values):
                message = f"`{name}` is a gradient over layers, and a merge by names has none"
                yield (*path, "parameters", name), message


def next_step(
    document: Mapping[str, Any], models: Mapping[ModelReference, Model], path: Path | None, out: Path | None
) -> str:
    """The commands that merge a recipe without ``obstacles`` by names into ``out``, ready to be pasted."""
    recipe, folder = shlex.quote(str(path or "recipe.yaml")), shlex.quote(str(out or "out"))
    lines = ["Merge the tensors by their names:", f"  varm-merge yaml --by-name {recipe} {folder}"]
    if (flat := _flat_recipe(document, models)) is not None:
        lines += [
            "or by mergekit-pytorch, which writes weights alone (config and tokenizer are the base model's):",
            f"  printf '%s' {shlex.quote(flat)} > by_name.yaml && mergekit-pytorch by_name.yaml {folder}",
        ]
    return "\n    ".join(lines)


def _flat_recipe(document: Mapping[str, Any], models: Mapping[ModelReference, Model]) -> str | None:
    """The recipe for mergekit-pytorch, in JSON (which is YAML); None if that program would merge it differently.

    It reads one file of each model, and no config, so it does not know how packed experts are laid out.
    """
    from mergekit.scripts.merge_raw_pytorch import InputModelDefinition, RawPyTorchMergeConfig

    files = {identity(reference): {*model.files.values()} for reference, model in models.items()}
    tensors = [model.tensors for model in models.values()]
    flat = {key: value for key, value in document.items() if key != "name"}
    if (
        any(len(own) != 1 for own in files.values())
        or any(matrices(name, shape, PLAIN) for own in tensors for name, (shape, _) in own.items())
        or any(reference.lora is not None for reference in models)
        or any(own.keys() != tensors[0].keys() for own in tensors)
        or not flat.keys() <= RawPyTorchMergeConfig.model_fields.keys()
        or any(not entry.keys() <= InputModelDefinition.model_fields.keys() for entry in document["models"])
    ):
        return None

    def file(name: Any) -> str:
        (path,) = files[identity(ModelReference.model_validate(name))]
        return str(path)

    flat["models"] = [{**entry, "model": file(entry["model"])} for entry in document["models"]]
    if document.get("base_model") is not None:
        flat["base_model"] = file(document["base_model"])
    return json.dumps(flat, ensure_ascii=False)
