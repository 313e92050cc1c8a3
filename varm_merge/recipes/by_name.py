"""How to merge by the names of tensors what mergekit's definition of an architecture does not cover."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from varm_merge.merging.experts import PLAIN, matrices
from varm_merge.recipes.headers import Model
from varm_merge.recipes.yaml_lines import Path as TreePath
from varm_merge.recipes.yaml_lines import nodes

__all__ = ["next_step", "obstacles"]


def obstacles(document: Mapping[str, Any]) -> Iterator[tuple[TreePath, str]]:
    """Places of a recipe that ask for layers, which a merge by names does not know, and why."""
    for key in ("slices", "modules"):
        if document.get(key) is not None:
            yield (key,), f"`{key}`: a merge by names takes whole models, list them under `models`"
    for path, node, _ in nodes(document):
        for name, setting in (node.get("parameters") or {}).items():
            entries = setting if isinstance(setting, list) else [setting]
            values = [one.get("value") if isinstance(one, dict) else one for one in entries]
            if any(isinstance(value, list) for value in values) or (
                isinstance(setting, list) and not any(isinstance(one, dict) for one in setting)
            ):
                yield (
                    (*path, "parameters", name),
                    f"`{name}` is a gradient over layers, and a merge by names has none",
                )


def next_step(
    document: Mapping[str, Any], models: Mapping[ModelReference, Model], path: Path | None, out: Path | None
) -> str:
    """The commands that merge a recipe by names, ready to be pasted.

    Args:
        document: The recipe; it has no ``obstacles``.
        models: The header of each of its models.
        path: Its file.
        out: Where the merge will be written.
    """
    recipe, folder = shlex.quote(str(path or "recipe.yaml")), shlex.quote(str(out or "out"))
    lines = ["Merge the tensors by their names:", f"  varm-merge yaml --by-name {recipe} {folder}"]
    if (flat := _flat_recipe(document, models)) is not None:
        lines += [
            "or by mergekit-pytorch, which writes weights alone (config and tokenizer are the base model's):",
            f"  printf '%s' {shlex.quote(flat)} > by_name.yaml && mergekit-pytorch by_name.yaml {folder}",
        ]
    return "\n    ".join(lines)


def _flat_recipe(document: Mapping[str, Any], models: Mapping[ModelReference, Model]) -> str | None:
    """The recipe for mergekit-pytorch, which reads one file of each model; None where it cannot merge them alike.

    It knows no configs, and so not where in a packed tensor each expert's matrices lie.
    """
    from mergekit.scripts.merge_raw_pytorch import InputModelDefinition, RawPyTorchMergeConfig

    files = {str(reference): {*model.files.values()} for reference, model in models.items()}
    names = [model.tensors.keys() for model in models.values()]
    keys = {*document} - {"name"}
    if (
        any(len(own) != 1 for own in files.values())
        or any(matrices(name, shape, PLAIN) for m in models.values() for name, (shape, _) in m.tensors.items())
        or any(reference.lora is not None for reference in models)
        or any(own != names[0] for own in names)
        or not keys <= RawPyTorchMergeConfig.model_fields.keys()
        or any(not {*entry} <= InputModelDefinition.model_fields.keys() for entry in document["models"])
    ):
        return None

    def file(name: Any) -> str:
        reference = str(ModelReference.model_validate(name))
        found = next((own for known, own in files.items() if _same(known, reference)), None)
        return str(next(iter(found))) if found else reference

    flat = {key: value for key, value in document.items() if key in keys}
    flat["models"] = [{**entry, "model": file(entry["model"])} for entry in document["models"]]
    if document.get("base_model") is not None:
        flat["base_model"] = file(document["base_model"])
    return json.dumps(flat, ensure_ascii=False)  # which is YAML, on one line


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
