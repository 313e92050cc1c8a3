"""The models of one list that is merged: what mergekit takes of them, judged as it judges."""

import importlib.resources as resources
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jinja2
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import BasePolicy, MergeMethodSpec
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from varm_merge.recipes.yaml_lines import Path as TreePath

__all__ = ["amounts", "in_all", "repeated", "required", "tokenizers", "why_no_template"]

Found = Iterator[tuple[TreePath, str]]
"""Places and what is wrong there."""
Settings = Sequence[Mapping[str, Any] | None]
"""The `parameters` that hold for a model, its own first."""


def amounts(
    path: TreePath, spec: MergeMethodSpec, models: Sequence[ModelReference], base: ModelReference | None
) -> Found:
    """As many models as the method takes."""
    contract, others = spec.contract, set(models)
    if contract.base is BasePolicy.IGNORED or base is None:
        total = without = len(others)
    else:
        total, without = len(others | {base}), len(others - {base})
    for count, least, most, what in (
        (total, contract.min_inputs, contract.max_inputs, "models, base_model included"),
        (without, contract.min_non_base, contract.max_non_base, "models beside a base_model"),
    ):
        if not (least or 0) <= count <= (math.inf if most is None else most):
            limits = (
                f"exactly {least}"
                if least == most
                else f"at least {least}"
                if most is None
                else f"{least} to {most}"
            )
            yield path, f"{spec.name} merges {limits} {what}, not {count}"


def repeated(path: TreePath, models: Sequence[ModelReference]) -> Found:
    """No model twice."""
    for index, model in enumerate(models):
        if model in models[:index]:
            yield (*path, index), f"{model} is listed twice"


def required(
    path: TreePath,
    spec: MergeMethodSpec,
    models: Sequence[ModelReference],
    base: ModelReference | None,
    given: Sequence[Settings],
) -> Found:
    """Every parameter without a default is given, for the whole or for each model."""
    for one, index in _needed(spec, models, base):
        if index is None:
            if not _settings(one, given[0][1:]):
                yield path, f"{spec.name} needs the parameter `{one.name}`"
        elif not _settings(one, given[index]):
            told = "; it is the base_model, and is merged as well" if models[index] == base else ""
            yield (*path, index), f"{models[index]} has no `{one.name}`, which {spec.name} needs{told}"


def in_all(entries: Sequence[Mapping[str, Any]], above: Iterable[Any], count: int) -> list[Settings]:
    """The settings of each of ``count`` models, the last of which may have no entry of its own."""
    whole = [mapping.get("parameters") for mapping in above if isinstance(mapping, dict)]
    own = [entry.get("parameters") for entry in entries]
    return [(one, *whole) for one in (*own, *[None] * (count - len(own)))] or [(None, *whole)]


def _needed(
    spec: MergeMethodSpec, models: Sequence[ModelReference], base: ModelReference | None
) -> Iterator[tuple[ParameterSpec, int | None]]:
    """Each parameter without a default, for each model (its number) that needs it, or for the whole (None)."""
    for one in spec.parameters:
        if not one.required:
            continue
        if one.scope is ParameterScope.SHARED:
            yield one, None
            continue
        for index, model in enumerate(models):
            if one.scope is ParameterScope.INPUT or model != base:
                yield one, index


def _settings(one: ParameterSpec, given: Settings) -> list[Any]:
    return [mapping[one.name] for mapping in given if mapping and one.name in mapping]


def tokenizers(recipe: Mapping[str, Any]) -> Iterator[tuple[TreePath, Any, bool]]:
    """Models that a recipe takes tokens from: place, model, and whether all its tokens, not the row of one."""
    tokenizer = recipe.get("tokenizer")
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    for path, source in (
        (("tokenizer_source",), recipe.get("tokenizer_source")),
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


def why_no_template(config: MergeConfiguration) -> tuple[str, bool] | None:
    """Why a recipe's ``chat_template`` is none, and whether mergekit knows: it takes broken Jinja."""
    import mergekit.merge
    from mergekit._data import chat_templates
    from transformers.utils.chat_template_utils import render_jinja_template

    if config.chat_template == "auto":
        return None
    carrier = SimpleNamespace(chat_template="")
    try:
        mergekit.merge._set_chat_template(carrier, config)
    except RuntimeError:
        names = [one.name for one in resources.files(chat_templates).iterdir() if one.name.endswith(".jinja")]
        known = ", ".join(sorted(name.removesuffix(".jinja") for name in names))
        return f"`chat_template` is `{config.chat_template}`, neither Jinja nor one of auto, {known}", True
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        render_jinja_template([messages], chat_template=carrier.chat_template, bos_token="", eos_token="")
    except jinja2.TemplateSyntaxError as error:
        return f"`chat_template` is no sound Jinja: {error.message} (line {error.lineno} of it)", False
    except Exception:  # of whatever kind: a template may demand what this conversation has not
        return None
    return None
