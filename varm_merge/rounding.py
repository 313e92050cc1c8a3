"""How much of a fine-tune rounding has left.

A light fine-tune moves weights by less than bfloat16 can tell apart: most elements of a target saved in 16 bits
equal the pivot's, and the rest moved by one unit in the last place. Its deltas, and so its weights, are rounding.
Tensors that a target did not move at all are not counted: they were frozen.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from mergekit.common import dtype_from_name
from mergekit.merge_methods import TensorGroup
from safetensors import safe_open
from torch import Tensor

from varm_merge.headers import Model
from varm_merge.recipe import Looked, Problem

__all__ = ["Counts", "Tally", "compared", "remarks"]

MOSTLY = 0.5
"""Share of the elements from which on a target is remarked on."""
SAMPLE_ELEMENTS = 4_000_000
SAMPLE_TENSORS = 24
CHUNK = 1 << 20


@dataclass
class Counts:
    """Elements of the tensors that a target moved.

    Attributes:
        elements: All.
        equal: Those that equal the pivot's.
        close: Those within one unit in the last place of the pivot's, the equal ones included.
        stored: The dtype they were compared in.
    """

    elements: int = 0
    equal: int = 0
    close: int = 0
    stored: torch.dtype | None = None

    def add(self, other: "Counts") -> None:
        """Pool another tensor's counts."""
        self.elements += other.elements
        self.equal += other.equal
        self.close += other.close
        self.stored = other.stored or self.stored

    def remark(self, target: str, asked: str | None) -> str | None:
        """What to tell the user; None if most deltas are more than rounding.

        Args:
            target: Its name.
            asked: The recipe's ``dtype``, if that is what rounds it and not the checkpoint.
        """
        if not self.elements or self.close / self.elements <= MOSTLY:
            return None
        dtype = str(self.stored).removeprefix("torch.")
        equal, close = self.equal / self.elements, self.close / self.elements
        advice = (
            f"`dtype: {asked}` rounds it; merge with `dtype: float32` and `out_dtype: {asked}`"
            if asked
            else "its weights are mostly rounding; merge the float32 checkpoint"
        )
        return (
            f"{equal:.0%} of {target}'s elements equal the pivot's, and {close:.0%} are within one unit in the "
            f"last place of {dtype}: {advice}"
        )


def compared(pivot: Tensor, target: Tensor) -> Counts:
    """Count the elements of a tensor that rounding to the target's dtype holds at the pivot's, or beside them.

    Args:
        pivot: Of any floating dtype.
        target: Of the same shape, in 16 bits; other dtypes are not counted.
    """
    if target.dtype not in (torch.bfloat16, torch.float16) or pivot.shape != target.shape:
        return Counts()
    counts = Counts(stored=target.dtype)
    flat_pivot, flat_target = pivot.reshape(-1), target.reshape(-1)
    for start in range(0, target.numel(), CHUNK):
        pivot_C, target_C = (flat[start : start + CHUNK] for flat in (flat_pivot, flat_target))
        steps_C = (_ordered(pivot_C.to(target.dtype)) - _ordered(target_C)).abs_()
        counts.elements += steps_C.numel()
        counts.equal += int((steps_C == 0).sum())
        counts.close += int((steps_C <= 1).sum())
    return Counts() if counts.equal == counts.elements else counts


def _ordered(values_C: Tensor) -> Tensor:
    """Whole numbers in the order of 16-bit floats: neighbours differ by one."""
    bits_C = values_C.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits_C < 0, -(bits_C & 0x7FFF), bits_C)


@dataclass
class Tally:
    """Counts of each target over the tensors of a merge, as they are loaded."""

    counts: dict[str, Counts] = field(default_factory=dict)

    def add(self, group: TensorGroup) -> None:
        """Count one tensor."""
        assert group.base is not None
        for entry in group.non_base:
            self.counts.setdefault(str(entry.id), Counts()).add(compared(group.base.tensor, entry.tensor))

    def remarks(self, recipe: Mapping[str, Any], looked: Looked) -> list[str]:
        """What to tell of targets that are mostly rounding.

        Args:
            recipe: Whose tensors were counted.
            looked: Its models' headers.
        """
        wide = {
            str(reference)
            for reference, model in looked.models.items()
            if any(stored in ("F32", "F64") for _, stored in model.tensors.values())
        }
        found = (
            counts.remark(target, recipe.get("dtype") if target in wide else None)
            for target, counts in self.counts.items()
        )
        return [remark for remark in found if remark]


def remarks(text: str, looked: Looked) -> Iterator[Problem]:
    """Remark on targets of a recipe in which most deltas are rounding, by a sample of their tensors.

    Args:
        text: A sound recipe.
        looked: Its models' headers, the base's first.
    """
    recipe = yaml.safe_load(text)
    if not looked.has_base or len(looked.models) < 2:
        return
    dtype = dtype_from_name(recipe.get("dtype"))
    (_, pivot), *targets = looked.models.items()
    for reference, target in targets:
        counts, rounded = Counts(), False
        for name in _sample(pivot, target):
            pivot_tensor, tensor = _read(pivot, name), _read(target, name)
            rounded |= dtype is not None and dtype.itemsize < tensor.dtype.itemsize
            counts.add(compared(pivot_tensor, tensor.to(dtype) if rounded and dtype is not None else tensor))
        if message := counts.remark(str(reference), recipe.get("dtype") if rounded else None):
            yield Problem(message, looked.line_of(reference))


def _sample(pivot: Model, target: Model) -> list[str]:
    """Names of floating tensors that both have in files here, spread over the model."""
    shared = [
        name
        for name, (shape, stored) in target.tensors.items()
        if stored in ("F32", "F16", "BF16")
        and len(shape) > 1
        and pivot.tensors.get(name, ((), ""))[0] == shape
        and all(model.files.get(name) and model.files[name].suffix == ".safetensors" for model in (pivot, target))
    ]
    step = max(len(shared) // SAMPLE_TENSORS, 1)
    return shared[::step][:SAMPLE_TENSORS]


def _read(model: Model, name: str) -> Tensor:
    """The first rows of a tensor: about SAMPLE_ELEMENTS over the whole sample."""
    with safe_open(model.files[name], "pt") as file:
        part = file.get_slice(name)
        shape = part.get_shape()
        width = 1
        for size in shape[1:]:
            width *= size
        rows = max(SAMPLE_ELEMENTS // SAMPLE_TENSORS // max(width, 1), 1)
        result: Tensor = part[:rows]
        return result
