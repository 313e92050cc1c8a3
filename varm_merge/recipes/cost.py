"""What a merge needs on this machine: memory by a formula, space on the disk, downloads."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from varm_common.tables import size
from varm_merge.merging.lineage import Place
from varm_merge.recipes.problems import Looked

__all__ = ["estimate", "obstacles", "shortages"]

START_BYTES = 310_000_000
"""Of Python with mergekit, torch and transformers."""
SHARD_BYTES = 5_000_000_000
"""mergekit keeps an output shard in memory until it is full."""
COPIES = {"varm": 0.25, "linear": 1.0, "task_arithmetic": 1.0, "passthrough": 1.0}
"""Of the largest tensor, for every model and the output; measured with mergekit 0.1.5."""
OTHER_COPIES = 4.0
"""ties, sce and their kin work in float32, with masks."""


def estimate(recipe: Mapping[str, Any], looked: Looked, cache_dir: str | None = None) -> dict[str, Any]:
    """The estimate that ``check`` prints.

    Args:
        recipe: A sound one.
        looked: Its models' headers.
        cache_dir: Of models from the Hub.

    Returns:
        ``looked.estimate``, and ``memory_bytes`` (anonymous, at the peak) and ``download_bytes``.
    """
    sizes = looked.estimate
    copies = COPIES.get(str(recipe.get("merge_method")), OTHER_COPIES)
    held = min(sizes["written_bytes"], SHARD_BYTES)
    away = [
        model
        for reference, model in looked.models.items()
        if not Path(reference.model.path).is_dir()
        and not Place(reference.model.path, reference.model.revision, cache_dir).weights()
    ]
    return {
        **sizes,
        "memory_bytes": START_BYTES + held + round(copies * sizes["largest_tensor_bytes"]),
        "download_bytes": sum(model.bytes for model in away),
    }


def obstacles(found: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Why the merge cannot be written to ``out``: the folder cannot be made or written, or has no room."""
    nearest = _existing(out)
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".varm-merge-"):
            pass
    except OSError as error:
        yield f"`{out}` cannot be written: `{nearest}`: {error.strerror}"
        return
    if found:
        free, needed = shutil.disk_usage(nearest).free, found["written_bytes"]
        if free < needed:
            yield f"`{out}` has {size(free)} free, and the merge writes {size(needed)}"


def shortages(found: Mapping[str, Any]) -> Iterator[str]:
    """What this machine has less of in memory than the merge needs; a merge survives it, slowly, or not."""
    available, needed = psutil.virtual_memory().available, found["memory_bytes"]
    if available < needed:
        yield (
            f"the merge holds about {size(needed)} in memory, and {size(available)} are free here; "
            "mergekit-yaml --out-shard-size 1B holds less of the output"
        )


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    here = Path(os.path.abspath(path))  # noqa: PTH100  a folder that cannot be entered is no error here
    return next(one for one in (here, *here.parents) if os.path.lexists(one))
