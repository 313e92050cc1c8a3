"""The merges of a pipeline: their recipes, which ``varm-merge check`` checks, and their stages."""

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from fusion_trainer.pipeline.builder import Builder, PipelineConfig, Settings
from fusion_trainer.pipeline.processes import MERGEKIT, output_of
from fusion_trainer.pipeline.stage import Stage

__all__ = ["add_merges"]

WITHOUT_PIVOT = ("linear",)
"""Merge methods without a base model."""
BETWEEN_TWO = ("slerp",)
"""Merge methods that merge two models, one of which is the base model."""


def add_merges(builder: Builder, targets: list[str], pairwise: list[str]) -> None:
    """Add the stage of every merge, and check the recipes.

    Args:
        builder: Of the pipeline.
        targets: The names of all targets.
        pairwise: The targets that a merge takes by default.
    """
    recipes: dict[str, Settings] = {}
    for name, given in builder.config.merges.items():
        before = len(builder.problems)
        merged = _targets(builder, name, given, targets, pairwise)
        recipe = _recipe(builder, name, given, merged)
        if len(builder.problems) == before:
            recipes[name] = recipe
            builder.stages.append(_stage(builder, name, given, merged, recipe))
    stages = {stage.name: stage for stage in builder.stages if stage.kind == "merge"}
    if all(_is_accepted(path, text) for stage in stages.values() for path, text in stage.inputs.items()):
        return
    for name, problems in _problems(recipes).items():
        for problem in problems:
            builder.wrong(".".join(["merges", name, *map(str, problem["path"])]), problem["message"])
    if builder.config.merge_options:
        _check_options(builder)


def _targets(builder: Builder, name: str, given: Settings, targets: list[str], pairwise: list[str]) -> list[str]:
    """The names of the targets to merge; problems are noted."""
    where = f"merges.{name}"
    builder.check_name(where, name)
    merged = builder.texts(f"{where}.targets", given["targets"]) if "targets" in given else pairwise
    for unknown in [target for target in merged if target not in targets]:
        builder.wrong(f"{where}.targets", f"no target `{unknown}`; there are {', '.join(targets)}")
    if not merged:
        builder.wrong(f"{where}.targets", "there is no target to merge")
    if given.get("merge_method") in BETWEEN_TWO and len(merged) != 2:
        method = given["merge_method"]
        builder.wrong(where, f"{method} is between two targets, not {len(merged)}; name them in `targets`")
    return merged


def _recipe(builder: Builder, name: str, given: Settings, targets: list[str]) -> Settings:
    """The content of a recipe; problems are noted."""
    where, method = f"merges.{name}", given.get("merge_method")
    parameters = given.get("model_parameters") or {}
    if not isinstance(parameters, dict):
        builder.wrong(f"{where}.model_parameters", "is not a mapping of targets to parameters")
        parameters = {}
    for unknown in [target for target in parameters if target not in targets]:
        builder.wrong(f"{where}.model_parameters.{unknown}", f"no target `{unknown}` in this merge")
    if "models" in given:
        builder.wrong(f"{where}.models", "is set by the pipeline itself; name `targets`")
    if not isinstance(method, str):
        builder.wrong(where, "names no `merge_method`")
    models: list[Settings] = [{"model": _reference(builder.work / "targets" / target)} for target in targets]
    for target, model in zip(targets, models, strict=True):
        if target in parameters:
            model["parameters"] = parameters[target]
    recipe = {key: value for key, value in given.items() if key not in ("targets", "model_parameters")}
    if method in BETWEEN_TWO and models:
        recipe.setdefault("base_model", models[0]["model"])
    elif method not in WITHOUT_PIVOT:
        recipe.setdefault("base_model", _pivot(builder.config))
    base = recipe.get("base_model")
    if isinstance(base, str) and Path(base) != Path(builder.config.pivot):
        builder.check_model(f"{where}.base_model", base)
    return {**recipe, "models": models}


def _stage(builder: Builder, name: str, given: Settings, targets: list[str], recipe: Settings) -> Stage:
    path, output = builder.work / "recipes" / f"{name}.yaml", builder.work / "merges" / name
    options = builder.config.merge_options
    command = [*MERGEKIT, str(path), str(output), *options]
    text = f"# {shlex.join(command)}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}"
    settings = {**given, "targets": targets, "options": options}
    needs = [f"train {target}" for target in targets]
    return Stage("merge", name, output, command, {path: text}, settings, needs, {"pivot": builder.pivot}, {})


def _is_accepted(recipe: Path, text: str) -> bool:
    """Whether an earlier run has checked and written just this recipe."""
    return recipe.is_file() and recipe.read_text(encoding="utf-8") == text


def _problems(recipes: Mapping[str, Settings]) -> dict[str, list[dict[str, Any]]]:
    """What ``varm-merge check --offline`` finds wrong with each recipe."""
    if not recipes:
        return {}
    with tempfile.TemporaryDirectory(prefix="fusion-trainer-") as folder:
        paths = [Path(folder) / f"{name}.yaml" for name in recipes]
        for path, recipe in zip(paths, recipes.values(), strict=True):
            path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        checked = json.loads(output_of(["varm-merge", "check", "--offline", "--json", *map(str, paths)]))
    results = checked if isinstance(checked, list) else [checked]
    return {name: result["problems"] for name, result in zip(recipes, results, strict=True)}


def _check_options(builder: Builder) -> None:
    """Let mergekit-yaml parse its options."""
    from mergekit.scripts.run_yaml import main

    try:
        main.make_context("mergekit-yaml", ["recipe.yaml", "out", *builder.config.merge_options])
    except click.ClickException as error:
        builder.wrong("merge_options", f"mergekit-yaml does not take them: {error.format_message()}")
    except click.exceptions.Exit:
        builder.wrong("merge_options", "with these options mergekit-yaml does not merge")


def _reference(folder: Path) -> str:
    """A folder in a form that mergekit does not read as a Hub id."""
    return str(folder) if folder.is_absolute() else f"./{folder}"


def _pivot(config: PipelineConfig) -> str:
    """The pivot as a recipe names it: a folder, or a Hub id with its revision."""
    if Path(config.pivot).is_dir():
        return _reference(Path(config.pivot))
    return f"{config.pivot}@{config.pivot_revision}" if config.pivot_revision else config.pivot
