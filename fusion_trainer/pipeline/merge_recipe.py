"""The mergekit recipe that merges targets of one pivot by VaRM.

The recipe is the only thing this package tells ``varm_merge``, which checks it (and the targets' ``fusion.json``)
once more when it merges.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from varm_common.errors import UserError, listed
from varm_common.files import read_json
from varm_common.models import weights_fingerprint

__all__ = ["recipe"]

FUSION = "fusion.json"
OF_THE_PIVOT = ("weights", "config", "tokenizer")


def recipe(
    targets: Sequence[Path], *, pivot: str | None = None, granularity: str = "matrix", dtype: str | None = None
) -> str:
    """The YAML of a recipe.

    Args:
        targets: Folders that ``fusion-trainer train`` made.
        pivot: Where their pivot is now, if it has moved.
        granularity: Of VaRM.
        dtype: Of the merged model; default the targets'.

    Raises:
        UserError: A folder is no target, or they come of different pivots.
    """
    told = [_told(target) for target in targets]
    first = told[0]["pivot"]
    others = [
        f"`{target}`: {one['pivot']['model']} (weights {one['pivot']['weights'][:12]}…)"
        for target, one in zip(targets, told, strict=True)
    ]
    if any(one["pivot"][name] != first[name] for one in told for name in OF_THE_PIVOT):
        raise UserError(f"these targets were trained from different pivots:{listed(others)}\nMerge them apart.")
    content = {
        "merge_method": "varm",
        "base_model": _reference(first, pivot),
        "models": [{"model": _path(target)} for target in targets],
        "parameters": {"granularity": granularity},
        "dtype": _dtype(targets),
    }
    if dtype and dtype != content["dtype"]:
        content["out_dtype"] = dtype  # `dtype` would round the targets before they are merged
    head = "# mergekit-yaml recipe.yaml out/\n# Targets, and what each was fused of:\n"
    for target, one in zip(targets, told, strict=True):
        sources = [store["model"] for store in one["stores"] if store.get("kind")]
        head += f"#   {target}: {', '.join(sources) or 'its pivot and the gold tokens alone'}\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def _told(target: Path) -> dict[str, Any]:
    path = target / FUSION
    if not path.is_file():
        begun = " yet: its training is not finished" if (target / "training.json").is_file() else ""
        raise UserError(f"`{target}` has no {FUSION}{begun}; give folders that `fusion-trainer train` made")
    try:
        told = dict(read_json(path))
        wanted = [told["pivot"][name] for name in (*OF_THE_PIVOT, "model")]
        if not all(isinstance(value, str) for value in wanted) or not isinstance(told["stores"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{path}` is not what `fusion-trainer train` writes; train that target again") from error
    return told


def _reference(pivot: dict[str, Any], moved: str | None) -> str:
    """The pivot as mergekit names models."""
    place = moved or pivot["model"]
    if Path(place).is_dir():
        if weights_fingerprint(Path(place), place) != pivot["weights"]:
            raise UserError(f"`{place}` is not the pivot these targets were trained from: its weights differ")
        return _path(Path(place))
    was_a_folder = moved is None and not pivot.get("revision")
    if was_a_folder or place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise UserError(f"the pivot's folder `{place}` is not there any more; name it with --pivot")
    return f"{place}@{pivot['revision']}" if pivot.get("revision") and moved is None else place


def _path(folder: Path) -> str:
    """A folder in a form that mergekit does not take for a Hub id.

    Raises:
        UserError: mergekit would read its name as something else.
    """
    text = os.fspath(folder)
    if found := [sign for sign in "+@" if sign in text]:
        raise UserError(f"mergekit takes the `{found[0]}` in `{text}` for a sign of its own; rename that folder")
    return text if text.startswith((".", "/", "~")) else f"./{text}"


def _dtype(targets: Sequence[Path]) -> str:
    config = read_json(targets[0] / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
