"""The mergekit recipe that merges targets of one pivot with VaRM.

The recipe is all that ``varm_merge`` gets from this package. It checks the recipe and the targets' ``fusion.json``
again when it merges.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from varm_common.errors import UserError, listed
from varm_common.files import read_json
from varm_common.models import is_path, weights_fingerprint

__all__ = ["recipe"]

FUSION = "fusion.json"
IDENTITY = ("weights", "config", "tokenizer")
"""Hashes that are the same for targets of one pivot."""


def recipe(
    targets: Sequence[Path], *, pivot: str | None = None, granularity: str = "matrix", dtype: str | None = None
) -> str:
    """The YAML text of a recipe.

    Args:
        targets: Folders that ``fusion-trainer train`` has written.
        pivot: Where their pivot is now, if it has moved.
        granularity: Granularity of VaRM.
        dtype: Dtype of the merged model. Default: the targets'.

    Raises:
        UserError: A folder is not a target, or the targets have different pivots.
    """
    fusions = {target: _fusion(target) for target in targets}
    pivots = {target: fusion["pivot"] for target, fusion in fusions.items()}
    first = pivots[targets[0]]
    if any(other[name] != first[name] for other in pivots.values() for name in IDENTITY):
        rows = [f"`{path}`: {each['model']} (weights {each['weights'][:12]}…)" for path, each in pivots.items()]
        raise UserError(f"these targets were trained from different pivots:{listed(rows)}\nMerge them separately.")
    config = read_json(targets[0] / "config.json")
    content = {
        "merge_method": "varm",
        "base_model": _reference(first, pivot),
        "models": [{"model": _path(target)} for target in targets],
        "parameters": {"granularity": granularity},
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
    }
    if dtype and dtype != content["dtype"]:
        content["out_dtype"] = dtype  # `dtype` would round the targets before they are merged
    head = "# mergekit-yaml recipe.yaml out/\n# Targets, and the sources each was fused with:\n"
    for target, fusion in fusions.items():
        sources = [store["model"] for store in fusion["stores"] if store.get("kind")]
        head += f"#   {target}: {', '.join(sources) or 'none, only the pivot and the chats'}\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def _fusion(target: Path) -> dict[str, Any]:
    path = target / FUSION
    if not path.is_file():
        yet = " yet: its training is not finished" if (target / "training.json").is_file() else ""
        raise UserError(f"`{target}` has no {FUSION}{yet}; give folders that `fusion-trainer train` has written")
    try:
        fusion = dict(read_json(path))
        needed = [fusion["pivot"][name] for name in (*IDENTITY, "model")]
        if not all(isinstance(value, str) for value in needed) or not isinstance(fusion["stores"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{path}` is not what `fusion-trainer train` writes; train that target again") from error
    return fusion


def _reference(pivot: dict[str, Any], moved: str | None) -> str:
    """The pivot as mergekit names models: a folder, or a Hub id with its revision."""
    place = moved or pivot["model"]
    if Path(place).is_dir():
        if weights_fingerprint(Path(place), place) != pivot["weights"]:
            raise UserError(f"`{place}` is not the pivot that these targets were trained from: its weights differ")
        return _path(Path(place))
    was_a_folder = moved is None and not pivot.get("revision")
    if was_a_folder or is_path(place):
        raise UserError(f"the pivot's folder `{place}` does not exist; give its new folder with --pivot")
    return f"{place}@{pivot['revision']}" if pivot.get("revision") and moved is None else place


def _path(folder: Path) -> str:
    """A folder in a form that mergekit does not read as a Hub id.

    Raises:
        UserError: mergekit would read a part of its name as something else.
    """
    text = os.fspath(folder)
    if signs := [sign for sign in "+@" if sign in text]:
        raise UserError(f"mergekit gives the `{signs[0]}` in `{text}` a meaning of its own; rename the folder")
    return text if text.startswith((".", "/", "~")) else f"./{text}"
