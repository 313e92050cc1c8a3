"""The merges of a pipeline: their recipes, checked by varm-merge, and their stages."""

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from fusion_trainer.pipeline.builder import Builder, Settings, demand_model, demand_name, folder_name, reference
from fusion_trainer.pipeline.processes import MERGEKIT, output_of
from fusion_trainer.pipeline.stage import Stage

__all__ = [
    "demand_options",
    "merge_stages",
]

WITHOUT_PIVOT = ("linear",)
"""Merge methods that take no base model."""
BETWEEN_TWO = ("slerp",)
"""Merge methods whose base model is one of the two they merge."""


def merge_stages(builder: Builder, trained: list[str], pairwise: list[str]) -> None:
    """Add the stage of every merge. ``pairwise`` are the targets that a merge takes by default."""
    config, work = builder.config, builder.config.work
    recipes: dict[str, Settings] = {}
    for name, given in config.merges.items():
        where, before = f"merges.{name}", len(builder.problems)
        demand_name(builder, where, name)
        targets = builder.texts(f"{where}.targets", given["targets"]) if "targets" in given else pairwise
        for unknown in [target for target in targets if target not in trained]:
            builder.wrong(f"{where}.targets", f"no target `{unknown}`; there are {', '.join(trained)}")
        if not targets:
            builder.wrong(f"{where}.targets", "there is no target to merge")
        own = given.get("model_parameters") or {}
        if not isinstance(own, dict):
            builder.wrong(f"{where}.model_parameters", "is no mapping of targets to parameters")
            own = {}
        for unknown in [target for target in own if target not in targets]:
            builder.wrong(f"{where}.model_parameters.{unknown}", f"no target `{unknown}` in this merge")
        if "models" in given:
            builder.wrong(f"{where}.models", "is set by the pipeline itself; name `targets`")
        method = given.get("merge_method")
        if not isinstance(method, str):
            builder.wrong(where, "names no `merge_method`")
            continue
        folders = {target: work / "targets" / target for target in targets}
        content = {key: value for key, value in given.items() if key not in ("targets", "model_parameters")}
        if method in BETWEEN_TWO and len(targets) != 2:
            builder.wrong(where, f"{method} is between two targets, not {len(targets)}; name them in `targets`")
        if method in BETWEEN_TWO and targets:
            content.setdefault("base_model", folder_name(folders[targets[0]]))
        elif method not in WITHOUT_PIVOT:
            content.setdefault("base_model", reference(config))
        content["models"] = [
            {"model": folder_name(folder), **({"parameters": own[target]} if target in own else {})}
            for target, folder in folders.items()
        ]
        if len(builder.problems) == before:
            recipes[where] = content
        recipe = work / "recipes" / f"{name}.yaml"
        output = work / "merges" / name
        text = f"# mergekit-yaml {recipe} {output}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"
        command = [*MERGEKIT, str(recipe), str(output), *config.merge_options]
        needs = [f"train {target}" for target in targets]
        settings = {**given, "targets": targets, "options": config.merge_options}
        pivot = {"pivot": (config.pivot, config.pivot_revision)}
        builder.stages.append(Stage("merge", name, output, command, {recipe: text}, settings, needs, pivot, {}))
    _demand_recipes(builder, recipes)


def _demand_recipes(builder: Builder, recipes: Mapping[str, Settings]) -> None:
    """See that mergekit takes the recipes, which are named by their place in the pipeline's file."""
    for where, content in recipes.items():
        if isinstance(base := content.get("base_model"), str) and Path(base) != Path(builder.config.pivot):
            demand_model(builder, f"{where}.base_model", base, [builder.config.work])
    texts = tuple(yaml.safe_dump(content, sort_keys=False) for content in recipes.values())
    for where, problems in zip(recipes, _problems_of_recipes(texts), strict=True):
        for problem in problems:
            builder.wrong(".".join([where, *map(str, problem["path"])]), problem["message"])


@functools.cache
def _problems_of_recipes(texts: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """What ``varm-merge check`` finds wrong with each recipe, without a look at its models."""
    import mergekit.scripts.run_yaml  # noqa: F401  takes seconds; the fork that checks need not do it again

    if not texts:
        return []
    with tempfile.TemporaryDirectory(prefix="fusion-trainer-") as folder:
        paths = [Path(folder) / f"{number}.yaml" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        checked = json.loads(output_of("varm-merge", ["check", "--offline", "--json", *map(str, paths)]))
    return [recipe["problems"] for recipe in (checked if texts[1:] else [checked])]


def demand_options(builder: Builder) -> None:
    """See that mergekit-yaml takes the options."""
    from mergekit.scripts.run_yaml import main

    try:
        main.make_context("mergekit-yaml", ["recipe.yaml", "out", *builder.config.merge_options])
    except click.ClickException as error:
        builder.wrong("merge_options", f"mergekit-yaml does not take them: {error.format_message()}")
    except click.exceptions.Exit:
        builder.wrong("merge_options", "with these mergekit-yaml does not merge")
