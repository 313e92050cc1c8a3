"""Checks a recipe before any weight is read, and reports every problem at once with its line.

mergekit's programs check ``varm`` recipes only; ``varm-merge check`` checks recipes of every method.
"""

import re
from pathlib import Path

import yaml
from mergekit.options import MergeOptions

from varm_merge.merging.method import METHOD_NAME
from varm_merge.recipes.by_name import obstacles
from varm_merge.recipes.locate import Hub
from varm_merge.recipes.problems import Looked, Problem
from varm_merge.recipes.recipe import Recipe
from varm_merge.recipes.recipe_file import means_varm, overwritten
from varm_merge.recipes.structure import check_structure
from varm_merge.recipes.yaml_lines import lines_of

__all__ = ["KINDS", "check"]

KINDS = {"run_yaml": "yaml", "multimerge": "multi", "merge_raw_pytorch": "raw"}
"""The kind of recipe that each of mergekit's programs reads, by the module of the program."""
NO_RECIPE = "no recipe: a recipe is a mapping with `merge_method`"


def check(
    text: str,
    *,
    kind: str = "yaml",
    models: bool = True,
    cache_dir: str | None = None,
    every: bool = False,
    looked: Looked | None = None,
    options: MergeOptions | None = None,
    by_name: bool = False,
    path: Path | None = None,
    out: Path | None = None,
) -> list[Problem]:
    """All problems of the ``varm`` recipes in ``text``, in the order of their lines.

    If nothing else is wrong, mergekit plans the merge without reading a weight, and its plan is judged.

    Args:
        text: One recipe or several.
        kind: ``yaml`` (mergekit-yaml), ``multi`` (several named recipes, mergekit-multi) or ``raw``
            (mergekit-pytorch).
        models: Whether to look at the models, too.
        cache_dir: Of models from the Hub; default that of ``options``.
        every: Whether recipes of other methods are checked as well.
        looked: Filled with what the headers of the models show.
        options: Of the run.
        by_name: Whether tensors are merged by their names (``varm-merge yaml --by-name``).
        path: The file of the recipe, for commands that are suggested.
        out: Where the merge will be written.
    """
    try:
        roots = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        documents = list(yaml.safe_load_all(text))
        lines = [lines_of(root) for root in roots]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if not every and not re.search(rf"merge_method:.*\b{METHOD_NAME}\b", text, re.IGNORECASE):
            return []
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        return [Problem(f"not valid YAML: {reason}", mark.line + 1 if mark else 1)]
    options, looked, hub = options or MergeOptions(transformers_cache=cache_dir), looked or Looked(), Hub()
    names = {str(document["name"]) for document in documents if isinstance(document, dict) and "name" in document}
    must_be_recipe = every or kind == "yaml"
    problems = [] if documents or not must_be_recipe else [Problem(NO_RECIPE, 1)]
    for document_lines, document in zip(lines, documents, strict=True):
        if not isinstance(document, dict):
            problems += [Problem(NO_RECIPE, document_lines[()])] if must_be_recipe else []
        elif every or means_varm(document):
            known = names if kind == "multi" else set()
            recipe = Recipe(document, document_lines, kind, known, looked, hub, options, by_name, path, out)
            problems += _problems(recipe, models)
            if len(documents) > 1 and kind != "multi":
                line = roots[1].start_mark.line + 1
                problems.append(Problem("a second recipe in one file: that is for mergekit-multi", line))
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.line)


def _problems(recipe: Recipe, models: bool) -> list[Problem]:
    check_structure(recipe)
    if recipe.out is not None:
        for where, message in overwritten(recipe.document, recipe.out, recipe.kind == "raw"):
            recipe.add(where, message)
    if recipe.by_name or recipe.kind == "raw":
        for where, message in obstacles(recipe.document):
            recipe.add(where, message)
    if models:
        from varm_merge.recipes.model_checks import check_models  # needs torch and transformers

        check_models(recipe)
    return recipe.problems
