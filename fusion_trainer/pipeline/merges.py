"""The merges of a pipeline: their recipes, which ``varm-merge check`` checks, and their stages."""

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

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
        builder: The pipeline's.
        targets: The names of all targets.
        pairwise: The targets that a merge takes by default.
    """
    recipes: dict[str, Settings] = {}
    accepted = True
    for name, given in builder.config.merges.items():
        before = len(builder.problems)
        merged = _targets(builder, name, given, targets, pairwise)
        recipe = _recipe(builder, name, given, merged)
        if len(builder.problems) > before:
            continue
        recipes[name] = recipe
        path, output = builder.work / "recipes" / f"{name}.yaml", builder.work / "merges" / name
        options = builder.config.merge_options
        command = [*MERGEKIT, str(path), str(output), *options]
        text = f"# {shlex.join(command)}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}"
        settings = {**given, "targets": merged, "options": options}
        needs = [f"train {target}" for target in merged]
        models = {"pivot": builder.pivot}
        builder.stages.append(Stage("merge", name, output, command, {path: text}, settings, needs, models, {}))
        # an earlier run has checked the recipes that it wrote
        accepted = accepted and path.is_file() and path.read_text(encoding="utf-8") == text
    if not accepted:
        _check_recipes(builder, recipes)
        _check_options(builder)


def _targets(builder: Builder, name: str, given: Settings, targets: list[str], pairwise: list[str]) -> list[str]:
    """The names of the targets to merge."""
    where, method = f"merges.{name}", given.get("merge_method")
    builder.check_name(where, name)
    merged = builder.texts(f"{where}.targets", given["targets"]) if "targets" in given else pairwise
    for unknown in [target for target in merged if target not in targets]:
        builder.wrong(f"{where}.targets", f"no target `{unknown}`; there are {', '.join(targets)}")
    if not merged:
        builder.wrong(f"{where}.targets", "there is no target to merge")
    if method in BETWEEN_TWO and len(merged) != 2:
        builder.wrong(where, f"{method} merges exactly two targets, not {len(merged)}; name two in `targets`")
    return merged


def _recipe(builder: Builder, name: str, given: Settings, targets: list[str]) -> Settings:
    """The content of a recipe."""
    where, method = f"merges.{name}", given.get("merge_method")
    if not isinstance(method, str):
        builder.wrong(where, "names no `merge_method`")
    if "models" in given:
        builder.wrong(f"{where}.models", "is set by the pipeline itself; name `targets`")
    parameters = given.get("model_parameters") or {}
    if not isinstance(parameters, dict):
        builder.wrong(f"{where}.model_parameters", "is not a mapping of targets to parameters")
        parameters = {}
    for unknown in [target for target in parameters if target not in targets]:
        builder.wrong(f"{where}.model_parameters.{unknown}", f"no target `{unknown}` in this merge")
    models = []
    for target in targets:
        own = {"parameters": parameters[target]} if target in parameters else {}
        models.append({"model": _reference(builder.work / "targets" / target), **own})
    recipe = {key: value for key, value in given.items() if key not in ("targets", "model_parameters")}
    if method in BETWEEN_TWO and models:
        recipe.setdefault("base_model", models[0]["model"])
    elif method not in WITHOUT_PIVOT:
        recipe.setdefault("base_model", _pivot(builder.config))
    base = recipe.get("base_model")
    if isinstance(base, str) and Path(base) != Path(builder.config.pivot):
        builder.check_model(f"{where}.base_model", base)
    return {**recipe, "models": models}


def _check_recipes(builder: Builder, recipes: Mapping[str, Settings]) -> None:
    """Note what ``varm-merge check --offline`` finds wrong with the recipes."""
    if not recipes:
        return
    with tempfile.TemporaryDirectory(prefix="fusion-trainer-") as folder:
        paths = [Path(folder) / f"{name}.yaml" for name in recipes]
        for path, recipe in zip(paths, recipes.values(), strict=True):
            path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        checked = json.loads(output_of(["varm-merge", "check", "--offline", "--json", *map(str, paths)]))
    for name, result in zip(recipes, checked if isinstance(checked, list) else [checked], strict=True):
        for problem in result["problems"]:
            builder.wrong(".".join(["merges", name, *map(str, problem["path"])]), problem["message"])


def _check_options(builder: Builder) -> None:
    """Let mergekit-yaml parse its options."""
    if not builder.config.merge_options:
        return
    from mergekit.scripts.run_yaml import main

    try:
        main.make_context("mergekit-yaml", ["recipe.yaml", "out", *builder.config.merge_options])
    except click.ClickException as error:
        builder.wrong("merge_options", f"mergekit-yaml does not accept them: {error.format_message()}")
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
