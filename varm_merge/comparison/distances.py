"""How far a merged model is from its pivot and targets, over all tensors, in float64."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from varm_common.errors import UserError
from varm_merge.merging import tensor_math

__all__ = ["distances", "moved_layers"]

MOST_NAMED = 5
"""How many of the tensors that are not compared are named."""


def distances(merged: Path, pivot: Path, targets: Mapping[str, Path], quiet: bool = True) -> dict[str, Any]:
    """Compare a model with the models it was merged from.

    Args:
        merged: The folder of the merged model.
        pivot: The folder of the pivot.
        targets: The folders of the targets, by name.
        quiet: Show no progress bar.

    Returns:
        JSON. ``pivot``: ‖merged − pivot‖ / ‖pivot‖. For each of ``targets``: ``distance``, ‖merged − target‖ /
        ‖pivot‖; ``cosine`` of merged − pivot with the task vector; ``sign_agreement``, the share of the elements
        moved by the target that the merged model moved in the same direction. A number is None if it is 0 / 0 or
        the target contains NaN. ``tensors`` and ``elements`` were compared. ``not_compared``: the number of
        tensors that do not have one shape in all models, and the names of some.

    Raises:
        UserError: There is nothing to compare, a file is damaged, or the merged model or the pivot contains NaN
            or Inf.
    """
    try:
        folders = (pivot, merged, *targets.values())
        loaders = [LazyTensorLoader(ShardedTensorIndex.from_disk(str(folder))) for folder in folders]
        return _compare(loaders, list(targets), quiet)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises many kinds of errors
        raise UserError(f"the distances cannot be measured: {error}") from error


def _compare(loaders: Sequence[LazyTensorLoader], targets: Sequence[str], quiet: bool) -> dict[str, Any]:
    files = loaders[0].index.tensor_paths
    names = [set(loader.index.tensor_paths) for loader in loaders]
    in_all = set.intersection(*names)
    left_out = set.union(*names) - in_all
    models, pairs, tensors, elements = np.zeros(2), np.zeros((len(targets), 5)), 0, 0
    in_order_of_files = sorted(in_all, key=lambda name: (files[name], name))  # each shard is opened once
    for name in tqdm(in_order_of_files, unit="tensor", desc="distances", disable=quiet, leave=False):
        loaded = [loader.get_tensor(name) for loader in loaders]
        if not all(tensor.is_floating_point() for tensor in loaded):
            continue  # a mask or a counter
        if len({tensor.shape for tensor in loaded}) > 1:
            left_out.add(name)
            continue
        own_models, own_pairs = _sums(loaded[0], loaded[1], loaded[2:])
        for model, square in zip(("pivot", "model"), own_models, strict=True):
            if not math.isfinite(square):
                raise UserError(f"NaN or Inf in the tensor `{name}` of the {model}")
        models, pairs = models + own_models, pairs + own_pairs
        tensors, elements = tensors + 1, elements + loaded[0].numel()
    if not tensors:
        raise UserError("no tensor has the same name and shape in the merged model, the pivot and the targets")
    pivot_size, delta_size = (math.sqrt(square) for square in models)
    numbers = (_numbers(pivot_size, delta_size, *map(float, row)) for row in pairs)
    return {
        "pivot": _ratio(delta_size, pivot_size),
        "targets": dict(zip(targets, numbers, strict=True)),
        "tensors": tensors,
        "elements": elements,
        "not_compared": {"tensors": len(left_out), "some": sorted(left_out)[:MOST_NAMED]},
    }


def _sums(pivot: Tensor, merged: Tensor, targets: Sequence[Tensor]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Squares of the pivot and of merged − pivot; for each target a row of the sums that ``_numbers`` takes."""
    both = tensor_math.agreement(pivot, [merged, *targets])
    rows = [
        (
            tensor_math.agreement(target, [merged]).squares[0],
            both.squares[1 + number],
            both.products[number],  # the first pairs are those of the merged model with each target
            float(torch.count_nonzero(target != pivot)),
            both.moved[number] - both.opposite[number],
        )
        for number, target in enumerate(targets)
    ]
    return np.array([both.pivot, both.squares[0]]), np.array(rows).reshape(-1, 5)


def _numbers(
    pivot_size: float, delta_size: float, apart: float, square: float, product: float, moved: float, same: float
) -> dict[str, float | None]:
    return {
        "distance": _ratio(math.sqrt(apart), pivot_size),
        "cosine": _ratio(product, delta_size * math.sqrt(square)),
        "sign_agreement": _ratio(same, moved) if math.isfinite(square) else None,
    }


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom and math.isfinite(top / bottom) else None


def moved_layers(recipe: Mapping[str, Any], layers: int | None) -> str | None:
    """Why the layers of a recipe's output are not those of its pivot, which has ``layers``; None if they are."""
    modules = recipe["modules"].values() if isinstance(recipe.get("modules"), dict) else ()
    for output in (recipe, *modules):
        slices, place = output.get("slices"), 0
        for part in slices or ():
            ranges = [source["layer_range"] for source in part["sources"]]
            if any(first != place for first, _ in ranges):
                return f"its slices do not have the pivot's layer {place} in its place"
            place += ranges[0][1] - ranges[0][0]
        if slices and output is recipe and layers is not None and place != layers:
            return f"it has {place} layers, the pivot {layers}"
    return None
