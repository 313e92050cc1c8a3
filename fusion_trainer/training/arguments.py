"""Checks arguments of transformers' ``TrainingArguments`` and peft's ``LoraConfig`` without importing them.

Importing these libraries takes seconds. Names, types and choices are read from their source code instead.
"""

import ast
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from varm_common.errors import did_you_mean

__all__ = ["checked", "declared"]

SOURCES = {
    "TrainingArguments": ("transformers", ("training_args.py", "trainer_utils.py"), ()),
    "LoraConfig": ("peft", ("config.py", "tuners/lora/config.py"), ("PeftConfigMixin", "PeftConfig")),
}
"""By class: its package, the files that declare its arguments and their choices, and its base classes."""
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_MERGED = {
    "alora_invocation_tokens": "adapters that depend on the text cannot be merged into a target",
    "inference_mode": "it trains nothing",
    "layer_replication": "a target has the pivot's layers",
}
"""Arguments of a LoraConfig with which there is no target."""
TYPES = {"int": int, "float": float, "bool": bool}


@functools.cache
def declared(name: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The type of each argument of a class, as its source code writes it, and the values of each enumeration."""
    package, files, bases = SOURCES[name]
    spec = find_spec(package)
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    trees = [ast.parse((folder / file).read_text(encoding="utf-8")) for file in files]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    types = {argument: type_ for each in (*bases, name) for argument, type_ in _fields(classes[each])}
    return types, {name: _values(node) for name, node in classes.items()}


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass that are arguments, not ``field(init=False)``, with their types."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            keywords = field.value.keywords if isinstance(field.value, ast.Call) else []
            if "init=False" not in {f"{word.arg}={ast.unparse(word.value)}" for word in keywords}:
                yield field.target.id, ast.unparse(field.annotation)


def _values(node: ast.ClassDef) -> list[str]:
    values = [member.value for member in node.body if isinstance(member, ast.Assign)]
    return [str(value.value) for value in values if isinstance(value, ast.Constant)]


def checked(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a class, with their types corrected: YAML reads ``5e-6`` as a text and ``no`` as false.

    Raises:
        PydanticCustomError: Arguments are unknown, or have a wrong type or value. Lists all of them.
    """
    types, enumerations = declared(name)
    unknown = [(key, did_you_mean(key, types)) for key in given if key not in types]
    wrong: list[tuple[str, str]] = []
    result: dict[str, Any] = {}
    for key, value in given.items():
        type_ = types.get(key, "")
        choices = enumerations.get(type_.partition(" ")[0], [])
        result[key] = "no" if value is False and "no" in choices else value
        if isinstance(value, str) and "float" in type_:
            result[key] = _number(value)
        problem = None
        if type_ in TYPES:
            try:
                result[key] = TypeAdapter(TYPES[type_]).validate_python(result[key])
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
        if choices and result[key] is not None and result[key] not in choices:
            problem = f"choose one of {', '.join(choices)}"
        if problem is None and key in AT_LEAST_ONE and result[key] < 1:
            problem = "it is at least 1"
        if problem is None and key in NOT_MERGED and result[key]:
            problem = NOT_MERGED[key]
        if problem:
            wrong.append((key, f"`{key}` cannot be {value!r}: {problem}"))
    if unknown or wrong:
        raise PydanticCustomError("arguments", "arguments", {"of": name, "unknown": unknown, "wrong": wrong})
    return result


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
