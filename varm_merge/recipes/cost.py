"""The cost of a merge on this machine: memory by a formula, disk space, downloads."""

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
"""Memory of Python with mergekit, torch and transformers."""
SHARD_BYTES = 5_000_000_000
"""mergekit keeps an output shard in memory until it is full."""
COPIES = {"varm": 0.25, "linear": 1.0, "task_arithmetic": 1.0, "passthrough": 1.0}
"""Memory in units of the largest tensor of all models and the output; measured with mergekit 0.1.5."""
OTHER_COPIES = 4.0
"""ties, sce and similar methods work in float32, with masks."""


def estimate(recipe: Mapping[str, Any], looked: Looked, cache_dir: str | None = None) -> dict[str, Any]:
    """``looked.estimate``, and ``memory_bytes`` (anonymous, at the peak) and ``download_bytes``."""
    sizes = looked.estimate
    copies = COPIES.get(str(recipe.get("merge_method")), OTHER_COPIES)
    shard_bytes = min(sizes["written_bytes"], SHARD_BYTES)
    download_bytes = sum(
        model.bytes
        for reference, model in looked.models.items()
        if not Path(reference.model.path).is_dir()
        and not Place(reference.model.path, reference.model.revision, cache_dir).weights()
    )
    memory_bytes = START_BYTES + shard_bytes + round(copies * sizes["largest_tensor_bytes"])
    return {**sizes, "memory_bytes": memory_bytes, "download_bytes": download_bytes}


def obstacles(sizes: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Why the merge cannot be written to ``out``: the folder cannot be made or written, or has no room."""
    absolute = Path(os.path.abspath(out))  # noqa: PTH100  resolve() fails in a folder that cannot be entered
    nearest = next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".varm-merge-"):
            pass
    except OSError as error:
        yield f"`{out}` cannot be written: `{nearest}`: {error.strerror}"
        return
    free, needed = shutil.disk_usage(nearest).free, sizes.get("written_bytes", 0)
    if free < needed:
        yield f"`{out}` has {size(free)} free, and the merge writes {size(needed)}"


def shortages(sizes: Mapping[str, Any]) -> Iterator[str]:
    """A remark if this machine has less memory than the merge needs; it may still succeed, slowly."""
    available, needed = psutil.virtual_memory().available, sizes["memory_bytes"]
    if available < needed:
        yield (
            f"the merge holds about {size(needed)} in memory, and {size(available)} are free here; "
            "mergekit-yaml --out-shard-size 1B holds less of the output"
        )
