"""The text of a recipe, and the models that it names."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from pydantic import BaseModel

from varm_common.errors import UserError
from varm_merge.merging.method import METHOD_NAME
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
    "tokenizers",
    "uses_varm",
]


def read(path: Path) -> str:
    """The text of a recipe, in any encoding that YAML allows (YAML 1.2, section 5.2).

    Raises:
        UserError: It cannot be read, or has another encoding.
    """
    try:
        content = path.read_bytes()
        return content.decode(json.detect_encoding(content))
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"the byte 0x{content[error.start]:02x} is not UTF-8: save the recipe as UTF-8"
        refuse([Problem(message, line)], path, "cannot be read")
        raise AssertionError from error


def line_of(text: str, key: str) -> int:
    """The line of a top-level key of the first recipe in ``text``; 1 if the key is missing."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return lines_of(root).get((key,), 1) if root else 1


def uses_varm(text: str) -> bool:
    """Whether any recipe in ``text`` merges by ``varm``."""
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        return any(isinstance(document, dict) and means_varm(document) for document in yaml.safe_load_all(text))
    return False


def means_varm(document: Mapping[str, Any]) -> bool:
    """Whether a recipe merges by ``varm``, also where the name is misspelt (``VaRM``, ``[varm]``)."""
    name = document.get("merge_method")
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return re.search(rf"\b{METHOD_NAME}\b", text, re.IGNORECASE) is not None


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
    yield from ((path, source) for path, source, _ in tokenizers(document) if isinstance(source, str))


def tokenizers(document: Mapping[str, Any]) -> Iterator[tuple[TreePath, Any, bool]]:
    """The models that tokens come from: (path, model, whether it gives the whole tokenizer or one token's row)."""
    tokenizer = document.get("tokenizer")
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    for path, source in (
        (("tokenizer_source",), document.get("tokenizer_source")),
        (("tokenizer", "source"), tokenizer.get("source")),
    ):
        if source not in (None, "union", "base"):
            yield path, source, True
    tokens = tokenizer.get("tokens")
    for token, setting in tokens.items() if isinstance(tokens, dict) else ():
        source = setting.get("source") if isinstance(setting, dict) else None
        where: TreePath = ("tokenizer", "tokens", token, "source")
        if isinstance(source, dict) and "kind" in source:
            where, source = (*where, "model"), source.get("model")
        if source is not None:
            yield where, source, False


def identity(reference: ModelReference) -> tuple[Any, ...]:
    """The model that a reference means; equal for two paths to the same folder."""
    paths = [
        part and (str(Path(part.path).resolve()) if Path(part.path).exists() else part.path, part.revision)
        for part in (reference.model, reference.lora)
    ]
    return (*paths, reference.override_architecture)


def one_spelling(config: Any) -> Any:
    """The recipe with one path for each folder (the base model's, if it has one): mergekit compares paths."""
    known: dict[Any, ModelReference] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, ModelReference):
            return known.setdefault(identity(value), value)
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: replaced(part) for name, part in value})
        if isinstance(value, dict):
            return {key: replaced(part) for key, part in value.items()}
        return [replaced(part) for part in value] if isinstance(value, list) else value

    replaced(config.base_model)
    return replaced(config)


def overwritten(document: Mapping[str, Any], out: Path, raw: bool) -> Iterator[tuple[TreePath, str]]:
    """Models whose files a merge into ``out`` would replace, and an adapter there that would be loaded with it."""
    target = out.resolve()
    for path, value in model_names(document):
        for name in [value] if raw else [part.split("@")[0] for part in value.split("+")]:
            model = Path(name).resolve()
            if Path(name).exists() and (target in (model, *model.parents) or model in target.parents):
                yield path, f"the merge would be written to `{out}`, where `{name}` is: name another folder"
                continue
            for file in Path(name).iterdir() if Path(name).is_dir() else ():
                if file.is_symlink() and target in file.resolve().parents:
                    message = f"`{file}` links to a file in `{out}`, where the merge would be written"
                    yield path, f"{message}: name another folder"
    adapter = out / "adapter_config.json"
    if adapter.is_file() and not raw:
        message = "transformers would load that adapter with the merge: move it, or name another folder"
        yield ("merge_method",), f"`{adapter}` is there, and {message}"
