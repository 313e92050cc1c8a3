"""What a merge takes on this machine: memory by a formula, time by short measurements.

The time is that of mergekit-yaml on the CPU with its defaults: to start, to read the models, to merge, to write.
Each speed is measured here and now: on a few megabytes of the models' own files, on two random tensors merged by
the recipe's method with its settings, and on one file written. On a busy machine the estimate is longer, and so is
the merge. Not in it: downloads, GPUs, and what grows with the number of tensors rather than with their size.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_state_dicts
from safetensors import safe_open
from safetensors.torch import save_file

from varm_merge.lineage import Place
from varm_merge.recipe import Looked
from varm_merge.tables import size
from varm_merge.weights import SPANNING

__all__ = ["estimate", "obstacles", "shortages"]

START_BYTES = 310_000_000
"""Of Python with mergekit, torch and transformers."""
SHARD_BYTES = 5_000_000_000
"""mergekit keeps an output shard in memory until it is full."""
COPIES = {"varm": 0.25, "linear": 1.0, "task_arithmetic": 1.0, "passthrough": 1.0}
"""Of the largest tensor, for every model and the output; measured with mergekit 0.1.5."""
OTHER_COPIES = 4.0
"""ties, sce and their kin work in float32, with masks."""
READ_BYTES, WRITE_BYTES, SIDE = 32_000_000, 32_000_000, 2048
REPEATS, ENOUGH_S = 5, 2.0
"""Of the merge of random tensors: the shortest counts, since what else the machine does only makes it longer."""
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def estimate(
    recipe: Mapping[str, Any],
    looked: Looked,
    start_s: float,
    out: Path | None = None,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """The estimate that ``check`` prints.

    Args:
        recipe: A sound one.
        looked: Its models' headers.
        start_s: How long this program took to import what mergekit-yaml imports.
        out: Where the merge would be written, if known.
        cache_dir: Of models from the Hub.

    Returns:
        ``looked.estimate``, and ``memory_bytes`` (anonymous, at the peak), ``download_bytes``, and ``seconds``:
        ``start``, ``read``, ``merge``, ``write``, ``total``; None if it could not be measured,
        for the reason in ``not_measured``.
    """
    sizes = looked.estimate
    copies = COPIES.get(str(recipe.get("merge_method")), OTHER_COPIES)
    held = min(sizes["written_bytes"], SHARD_BYTES)
    places = [Place(one.model.path, one.model.revision, cache_dir) for one in looked.models]
    here = [place.weights() for place in places]
    away = [
        model
        for place, model, weights in zip(places, looked.models.values(), here, strict=True)
        if not weights and not Path(place.path).is_dir()
    ]
    seconds = _seconds(recipe, looked, [weights for weights in here if weights], start_s, out)
    return {
        **sizes,
        "memory_bytes": START_BYTES + held + round(copies * sizes["largest_tensor_bytes"]),
        "download_bytes": sum(model.bytes for model in away),
        "seconds": None if isinstance(seconds, str) else seconds,
        **({"not_measured": seconds} if isinstance(seconds, str) else {}),
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


# Time


def _seconds(
    recipe: Mapping[str, Any], looked: Looked, weights: Sequence[Sequence[Path]], start_s: float, out: Path | None
) -> dict[str, float] | str:
    """How long each part takes, or why that could not be measured."""
    sizes = looked.estimate
    try:
        read_s = sizes["read_bytes"] * _read_s(weights) * _passes(recipe, sizes["read_bytes"])
        merge_s = sizes["parameters"] * _merge_s(recipe, looked)
        write_s = sizes["written_bytes"] * _write_s(_existing(out) if out else None)
    except Exception as error:  # a method that does not take a tensor of ours: no estimate is no problem
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    parts = {"start": start_s, "read": read_s, "merge": merge_s, "write": write_s}
    return {**parts, "total": sum(parts.values())}


def _passes(recipe: Mapping[str, Any], size: int) -> int:
    """How often files are read from the disk: statistics of a unit are taken in a pass of their own."""
    granularity = (recipe.get("parameters") or {}).get("granularity")
    spans = isinstance(granularity, list | dict) or granularity in SPANNING
    cached = psutil.virtual_memory().available > size
    return 2 if recipe.get("merge_method") == "varm" and spans and not cached else 1


def _read_s(models: Sequence[Sequence[Path]]) -> float:
    """Seconds for a byte: tensors of each model, copied out of the mapped file as a merge does; their median."""
    return median([_read_one_s(weights[len(weights) // 2]) for weights in models] or [0.0])


def _read_one_s(path: Path) -> float:
    read, begun = 0, time.perf_counter()
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  no mapping
            tensor = file.get_tensor(name)
            read += tensor.view(-1)[: READ_BYTES // tensor.element_size()].clone().nbytes
            if read >= READ_BYTES:
                break
    return (time.perf_counter() - begun) / max(read, 1)


def _merge_s(recipe: Mapping[str, Any], looked: Looked) -> float:
    """Seconds for an element of the output: random tensors, merged by the method."""
    method = merge_methods.get(str(recipe["merge_method"]))
    dtype = DTYPES.get(str(recipe.get("dtype")), torch.float32)
    generator = torch.Generator().manual_seed(0)
    pivot = torch.randn(SIDE, SIDE, generator=generator)
    tensors = [
        (pivot + 0.01 * number * torch.randn(SIDE, SIDE, generator=generator)).to(dtype)
        for number in range(looked.width)
    ]
    parameters = _parameters(recipe, method.spec)

    def merge(side: int) -> float:
        half = side // 2  # of one block: two tensors that may share a unit
        models = [dict(zip(NAMES, (tensor[:half], tensor[half:side]), strict=True)) for tensor in tensors]
        begun = time.perf_counter()
        with torch.no_grad():
            merge_state_dicts(models, method, parameters=parameters, base=0 if looked.has_base else None)
        return time.perf_counter() - begun

    merge(16)
    took = [merge(SIDE)]
    while len(took) < REPEATS and sum(took) < ENOUGH_S:
        took.append(merge(SIDE))
    return min(took) / SIDE**2


def _parameters(recipe: Mapping[str, Any], spec: Any) -> dict[str, Any]:
    """One setting of each of the method's parameters, as the recipe has it somewhere."""
    inputs = recipe.get("models") or [{}]
    given = {**(inputs[-1].get("parameters") or {}), **(recipe.get("parameters") or {})}
    found = {one.name: _scalar(given.get(one.name)) for one in spec.parameters}
    required = {one.name: 0.5 for one in spec.parameters if one.required}
    return required | {name: value for name, value in found.items() if value is not None}


def _scalar(setting: Any) -> Any:
    while isinstance(setting, list | dict):
        setting = (setting.get("value") if isinstance(setting, dict) else setting[-1]) if setting else None
    return setting


def _write_s(folder: Path | None) -> float:
    """Seconds for a byte: a file of safetensors, as mergekit writes them."""
    tensor = torch.ones(WRITE_BYTES // 2, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".varm-merge-") as place:
        begun = time.perf_counter()
        save_file({"x": tensor}, Path(place) / "x.safetensors")
        return (time.perf_counter() - begun) / tensor.nbytes
