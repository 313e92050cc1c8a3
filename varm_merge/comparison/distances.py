"""How far a merged model lies from its pivot and targets, tensor by tensor, in float64."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor
from tqdm import tqdm

from varm_common.errors import UserError
from varm_merge.merging import tensor_math

__all__ = ["distances", "moved_layers"]

MOST_NAMED = 5
"""Tensors that are named of those that are not compared."""


@dataclass
class _Sums:
    """Over all tensors compared; a number for each target."""

    pivot: float = 0.0
    merged: float = 0.0
    targets: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    same_sign: list[float] = field(default_factory=list)

    def add(self, other: "_Sums") -> None:
        self.pivot += other.pivot
        self.merged += other.merged
        for name in ("targets", "apart", "products", "moved", "same_sign"):
            own = getattr(self, name) or [0.0] * len(other.targets)
            setattr(self, name, [a + b for a, b in zip(own, getattr(other, name), strict=True)])


def distances(merged: Path, pivot: Path, targets: Mapping[str, Path], quiet: bool = True) -> dict[str, Any]:
    """Compare a model with those it was merged from.

    Args:
        merged: Its folder.
        pivot: The pivot's.
        targets: Those of the targets, by name.
        quiet: Without a bar.

    Returns:
        JSON. ``pivot``: ‖merged − pivot‖ / ‖pivot‖. By target in ``targets``: ``distance``, ‖merged − target‖ /
        ‖pivot‖; ``cosine`` of the merged delta with its task vector; ``sign_agreement``, of the elements that the
        target moved the share that the merged model moved in the same direction. A number is None where it is
        0 / 0, or the target holds NaN. ``tensors`` and ``elements`` compared; ``not_compared``: how many tensors
        are not in all models in one shape, and the names of some.

    Raises:
        UserError: There is nothing to compare, a file is damaged, or the merged model or the pivot holds NaN or
            Inf.
    """
    try:
        loaders = [
            LazyTensorLoader(ShardedTensorIndex.from_disk(str(folder)))
            for folder in (pivot, merged, *targets.values())
        ]
        return _compared(loaders, list(targets), quiet)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes of its reader
        raise UserError(f"the distances cannot be measured: {error}") from error


def _compared(loaders: Sequence[LazyTensorLoader], targets: Sequence[str], quiet: bool) -> dict[str, Any]:
    names = [set(loader.index.tensor_paths) for loader in loaders]
    everywhere = sorted(set.intersection(*names), key=lambda name: _place(loaders[0], name))
    left_out = set.union(*names).difference(everywhere)
    sums, tensors, elements = _Sums(), 0, 0
    for name in tqdm(everywhere, unit="tensor", desc="distances", disable=quiet, leave=False):
        loaded = [loader.get_tensor(name) for loader in loaders]
        if not all(tensor.is_floating_point() for tensor in loaded):
            continue  # a mask or a counter
        if len({tensor.shape for tensor in loaded}) > 1:
            left_out.add(name)
            continue
        found = _of_tensor(loaded[0], loaded[1], loaded[2:])
        for which, total in (("pivot", found.pivot), ("model", found.merged)):
            if not math.isfinite(total):
                raise UserError(f"NaN or Inf in the tensor `{name}` of the {which}")
        sums.add(found)
        tensors, elements = tensors + 1, elements + loaded[0].numel()
    if not tensors:
        raise UserError("no tensor has one name and one shape in the merged model, the pivot and the targets")
    return {
        "pivot": _ratio(math.sqrt(sums.merged), math.sqrt(sums.pivot)),
        "targets": {name: dict(_of_target(sums, number)) for number, name in enumerate(targets)},
        "tensors": tensors,
        "elements": elements,
        "not_compared": {"tensors": len(left_out), "some": sorted(left_out)[:MOST_NAMED]},
    }


def _place(loader: LazyTensorLoader, name: str) -> tuple[str, str]:
    """The order of the files: each shard is opened once."""
    return loader.index.tensor_paths[name], name


def _of_tensor(pivot: Tensor, merged: Tensor, targets: Sequence[Tensor]) -> _Sums:
    found = tensor_math.agreement(pivot, [merged, *targets])
    count = len(targets)  # the first pairs are those of the merged model with each target
    both, opposite = found.moved[:count], found.opposite[:count]
    return _Sums(
        found.pivot,
        found.squares[0],
        found.squares[1:],
        [tensor_math.agreement(target, [merged]).squares[0] for target in targets],
        found.products[:count],
        [float(torch.count_nonzero(target != pivot)) for target in targets],
        [one - other for one, other in zip(both, opposite, strict=True)],
    )


def _of_target(sums: _Sums, number: int) -> Iterator[tuple[str, float | None]]:
    yield "distance", _ratio(math.sqrt(sums.apart[number]), math.sqrt(sums.pivot))
    yield "cosine", _ratio(sums.products[number], math.sqrt(sums.merged) * math.sqrt(sums.targets[number]))
    is_number = math.isfinite(sums.targets[number])
    yield "sign_agreement", _ratio(sums.same_sign[number], sums.moved[number]) if is_number else None


def _ratio(one: float, other: float) -> float | None:
    return one / other if other and math.isfinite(one / other) else None


def moved_layers(recipe: Mapping[str, Any], layers: int | None) -> str | None:
    """Why the layers of a recipe's output are not those of its pivot, which has ``layers``; None if they are."""
    modules = recipe["modules"].values() if isinstance(recipe.get("modules"), dict) else ()
    for output in (recipe, *modules):
        slices, place = output.get("slices"), 0
        for one in slices or ():
            ranges = [source["layer_range"] for source in one["sources"]]
            if any(first != place for first, _ in ranges):
                return f"its slices put other layers where the pivot has layer {place}"
            place += ranges[0][1] - ranges[0][0]
        if slices and output is recipe and layers is not None and place != layers:
            return f"it has {place} layers, the pivot {layers}"
    return None
