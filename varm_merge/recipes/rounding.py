"""How much of a fine-tune is left after rounding to 16 bits.

A light fine-tune moves weights by less than the spacing of bfloat16: most elements of a target saved in 16 bits
equal the pivot's, and the rest moved by one unit in the last place. Its deltas, and so its weights, are rounding.
Tensors that a target did not move at all are not counted: they were frozen.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import yaml
from mergekit.common import dtype_from_name
from mergekit.merge_methods import TensorGroup
from torch import Tensor

from varm_common.stored_tensors import stored_tensor
from varm_merge.recipes.headers import Model
from varm_merge.recipes.problems import Looked, Problem

__all__ = ["Counts", "Tally", "compared", "remarks"]

MOSTLY = 0.5
"""Share of elements above which a remark is made."""
SAMPLE_ELEMENTS = 4_000_000
SAMPLE_TENSORS = 24
CHUNK = 1 << 20
HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
WIDE = {"F32", "F64"}


@dataclass
class Counts:
    """Elements of the tensors that a target moved, compared in ``dtype``.

    Attributes:
        elements: All of them.
        equal: Those that equal the pivot's.
        close: Those within one unit in the last place of the pivot's, the equal ones included.
    """

    elements: int = 0
    equal: int = 0
    close: int = 0
    dtype: torch.dtype | None = None

    def add(self, other: "Counts") -> None:
        """Pool another tensor's counts."""
        self.elements += other.elements
        self.equal += other.equal
        self.close += other.close
        self.dtype = other.dtype or self.dtype


def compared(pivot: Tensor, target: Tensor) -> Counts:
    """Count the elements of a tensor that equal the pivot's or are one rounding step away, in the target's dtype.

    Args:
        pivot: Of any floating dtype.
        target: Of the same shape, in 16 bits; other dtypes are not counted.
    """
    if target.dtype not in HALF.values() or pivot.shape != target.shape:
        return Counts()
    counts = Counts(dtype=target.dtype)
    for start in range(0, target.numel(), CHUNK):
        pivot_C, target_C = (tensor.reshape(-1)[start : start + CHUNK] for tensor in (pivot, target))
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
    """Counts of each target, by its name, over the tensors of a merge."""

    looked: Looked
    counts: dict[str, Counts] = field(default_factory=dict)

    def add(self, group: TensorGroup) -> None:
        """Count one tensor as the merge loads it: a recipe's ``dtype`` may widen what a checkpoint has rounded."""
        for entry in group.non_base:
            dtypes = set() if getattr(entry.id, "lora", None) else self._saved_dtypes.get(str(entry.id), set())
            saved = HALF[min(dtypes)] if len(dtypes) == 1 and dtypes <= HALF.keys() else entry.tensor.dtype
            self.count(str(entry.id), group.base.tensor, entry.tensor.to(saved))

    def count(self, name: str, pivot: Tensor, target: Tensor) -> None:
        """Count one tensor of the target ``name``."""
        self.counts.setdefault(name, Counts()).add(compared(pivot, target))

    def remarks(self, recipe: Mapping[str, Any]) -> list[str]:
        """Remarks on targets that are mostly rounding; ``recipe`` is the one whose tensors were counted."""
        remarks, recipe_dtype = [], recipe.get("dtype")
        for name, counts in self.counts.items():
            if not counts.elements or counts.close / counts.elements <= MOSTLY:
                continue
            advice = "its weights are mostly rounding; merge the float32 checkpoint"
            if recipe_dtype and self._saved_dtypes.get(name, set()) & WIDE:
                better = f"`dtype: float32` and `out_dtype: {recipe_dtype}`"
                advice = f"`dtype: {recipe_dtype}` rounds it; merge with {better}"
            equal, close = counts.equal / counts.elements, counts.close / counts.elements
            remarks.append(
                f"{equal:.0%} of {name}'s elements equal the pivot's, and {close:.0%} are within one unit in the "
                f"last place of {str(counts.dtype).removeprefix('torch.')}: {advice}"
            )
        return remarks

    @cached_property
    def _saved_dtypes(self) -> dict[str, set[str]]:
        """The floating dtypes of each model's checkpoint."""
        return {
            str(reference): {dtype for _, dtype in model.tensors.values()} & (WIDE | HALF.keys())
            for reference, model in self.looked.models.items()
        }


def remarks(text: str, looked: Looked) -> Iterator[Problem]:
    """Remarks on targets of a sound recipe in which most deltas are rounding, by a sample of their tensors."""
    recipe = yaml.safe_load(text)
    dtype = dtype_from_name(recipe.get("dtype"))
    if not looked.has_base:
        return
    (_, pivot), *targets = looked.models.items()
    for reference, target in targets:
        tally = Tally(looked)
        for name in _sample(pivot, target):
            tensor = _read(target, name)
            if dtype is not None and dtype.itemsize < tensor.dtype.itemsize:
                tensor = tensor.to(dtype)
            tally.count(str(reference), _read(pivot, name), tensor)
        yield from (Problem(message, looked.lines[reference]) for message in tally.remarks(recipe))


def _sample(pivot: Model, target: Model) -> list[str]:
    """Names of floating tensors that both models have in files here, spread over the model."""
    here = pivot.files.keys() & target.files.keys()
    floats = {name: shape for name, (shape, stored) in target.tensors.items() if stored in ("F32", "F16", "BF16")}
    matrices = [name for name, shape in floats.items() if len(shape) > 1 and name in here]
    shared = [name for name in matrices if pivot.tensors[name][0] == floats[name]]
    return shared[:: max(len(shared) // SAMPLE_TENSORS, 1)][:SAMPLE_TENSORS]


def _read(model: Model, name: str) -> Tensor:
    """The first rows of a tensor: about SAMPLE_ELEMENTS over the whole sample."""
    rows = max(SAMPLE_ELEMENTS // SAMPLE_TENSORS // max(math.prod(model.tensors[name][0][1:]), 1), 1)
    return stored_tensor(model.files[name], name, rows)
