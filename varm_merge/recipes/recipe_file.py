"""The text of a recipe: read, its lines, the models that it names."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import (
    MergeConfiguration,
)
from pydantic import BaseModel

from varm_common.errors import UserError
from varm_merge.merging.method import METHOD_NAME
from varm_merge.recipes import inputs as recipe_models
from varm_merge.recipes.problems import Problem, refuse
from varm_merge.recipes.yaml_lines import Path as TreePath
from varm_merge.recipes.yaml_lines import lines_of, nodes

__all__ = [
    "identity",
    "line_of",
    "means_varm",
    "model_names",
    "one_spelling",
    "overwritten",
    "read",
    "uses_varm",
]


def read(path: Path) -> str:
    """The text of a recipe, in any encoding that YAML allows (YAML 1.2, section 5.2).

    Raises:
        UserError: It cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
        return content.decode(json.detect_encoding(content))
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"the byte 0x{content[error.start]:02x} is no UTF-8"
        refuse([Problem(f"{byte}: save the recipe as UTF-8", line)], path, "cannot be read")
        raise AssertionError from error


def line_of(text: str, key: str) -> int:
    """The line of a top-level key of the first recipe in ``text``; 1 if it is not there."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return lines_of(root).get((key,), 1) if root else 1


def one_spelling(config: MergeConfiguration) -> MergeConfiguration:
    """The recipe with one path for each folder, the base model's first: two paths to a folder are one model."""
    known: dict[Any, ModelReference] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, ModelReference):
            return known.setdefault(identity(value), value)
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: replaced(part) for name, part in value})
        if isinstance(value, dict):
            return {key: replaced(part) for key, part in value.items()}
        return [replaced(part) for part in value] if isinstance(value, list) else value

    if config.base_model is not None:
        replaced(config.base_model)
    result: MergeConfiguration = replaced(config)
    return result


def identity(reference: ModelReference) -> tuple[Any, ...]:
    """What a reference refers to, however it is spelled."""
    parts = [reference.model, reference.lora]
    return (
        *((_real(part.path), part.revision) if part is not None else None for part in parts),
        reference.override_architecture,
    )


def _real(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def overwritten(document: Mapping[str, Any], out: Path, raw: bool) -> Iterator[tuple[TreePath, str]]:
    """Models that a merge into ``out`` would write over, or write into."""
    place = out.resolve()
    for path, value in model_names(document):
        for part in [value] if raw else value.split("+"):
            here = Path(part if raw else part.split("@")[0])
            model = here.resolve()
            if here.exists() and (place in (model, *model.parents) or model in place.parents):
                yield path, f"the merge would be written to `{out}`, where `{part}` lies: name another folder"
                continue
            for file in here.iterdir() if here.is_dir() else ():
                if file.is_symlink() and place in file.resolve().parents:
                    message = f"`{file}` links to a file in `{out}`, where the merge would be written"
                    yield path, f"{message}: name another folder"
    for adapter in [out / "adapter_config.json"] if (out / "adapter_config.json").is_file() and not raw else []:
        message = "transformers would load that adapter with the merge: move it, or name another folder"
        yield ("merge_method",), f"`{adapter}` is there, and {message}"


def model_names(document: Mapping[str, Any]) -> Iterator[tuple[TreePath, str]]:
    """Every place of a recipe that names a model, and the name."""
    for path, node, _ in nodes(document):
        for key in ("base_model", "model"):
            value = node.get(key)
            with suppress(RuntimeError, ValueError):
                if isinstance(value, dict):
                    value = str(ModelReference.model_validate(value))
            if isinstance(value, str):
                yield (*path, key), value
    for path, source, _ in recipe_models.tokenizers(document):
        if isinstance(source, str):
            yield path, source


def uses_varm(text: str) -> bool:
    """Whether any recipe in ``text`` merges by ``varm``."""
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        documents = yaml.safe_load_all(text)
        return any(isinstance(document, dict) and means_varm(document) for document in documents)
    return False


def means_varm(document: Mapping[str, Any]) -> bool:
    """Whether a recipe merges by ``varm``, or tries to."""
    name = document.get("merge_method")
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return re.search(rf"\b{METHOD_NAME}\b", text, re.IGNORECASE) is not None
