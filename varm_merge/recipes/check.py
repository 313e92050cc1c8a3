"""Checks a ``varm`` recipe before any weight is read, and reports every problem at once with its line.

mergekit ignores keys and parameters it does not know (``granularty: layer`` merges at the default granularity
and exits 0). For its own recipes the plugin refuses them. Recipes of other methods are none of its business when
they are merged; ``varm-merge check`` asks for them as well."""

import re
from pathlib import Path

import yaml
from mergekit.options import MergeOptions

from varm_merge.merging.method import METHOD_NAME
from varm_merge.recipes.locate import Hub
from varm_merge.recipes.model_checks import Checker
from varm_merge.recipes.problems import Looked, Problem
from varm_merge.recipes.recipe_file import means_varm
from varm_merge.recipes.structure import NO_RECIPE
from varm_merge.recipes.yaml_lines import lines_of

__all__ = [
    "KINDS",
    "check",
]

KINDS = {"run_yaml": "yaml", "multimerge": "multi", "merge_raw_pytorch": "raw"}
"""The kind of recipe that each of mergekit's programs reads, by the module of the program."""


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
    """All problems of the ``varm`` recipes in ``text`` (of ``every`` method's), in the order of their lines.

    If nothing else is wrong mergekit plans the merge, without reading a weight, and its plan is judged.

    Args:
        text: One recipe or several.
        kind: ``yaml`` (mergekit-yaml), ``multi`` (several named recipes, mergekit-multi) or ``raw``
            (mergekit-pytorch).
        models: Whether to look at the models, too: their folders must exist, and a Hub id must be in the cache or
            answer on the Hub.
        cache_dir: Of models from the Hub; default that of ``options``.
        every: Whether recipes of other methods are checked as well.
        looked: Filled with what the headers of the models tell.
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
    options = options or MergeOptions(transformers_cache=cache_dir)
    names = {str(document["name"]) for document in documents if isinstance(document, dict) and "name" in document}
    problems: list[Problem] = []
    if not documents and (every or kind == "yaml"):
        problems.append(Problem(NO_RECIPE, 1))
    hub = Hub()
    for document_lines, document in zip(lines, documents, strict=True):
        if not isinstance(document, dict) and (every or kind == "yaml"):
            problems.append(Problem(NO_RECIPE, document_lines[()]))
        elif isinstance(document, dict) and (every or means_varm(document)):
            checker = Checker(document, document_lines, kind, names if kind == "multi" else set(), hub=hub)
            checker.looked, checker.options = looked or Looked(), options
            checker.by_name, checker.path, checker.out = by_name, path, out
            checker.run(models)
            problems += checker.problems
            if len(documents) > 1 and kind != "multi":
                line = roots[1].start_mark.line + 1
                problems.append(Problem("a second recipe in one file: that is for mergekit-multi", line))
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.line)
