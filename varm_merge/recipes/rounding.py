"""How much of a fine-tune rounding has left.

A light fine-tune moves weights by less than bfloat16 can tell apart: most elements of a target saved in 16 bits
equal the pivot's, and the rest moved by one unit in the last place. Its deltas, and so its weights, are rounding.
Tensors that a target did not move at all are not counted: they were frozen.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import dtype_from_name
from mergekit.merge_methods import TensorGroup
from safetensors import safe_open
from torch import Tensor

from varm_merge.recipes.headers import Model
from varm_merge.recipes.problems import Looked, Problem

__all__ = ["Counts", "Tally", "compared", "remarks"]

MOSTLY = 0.5
"""Share of the elements from which on a target is remarked on."""
SAMPLE_ELEMENTS = 4_000_000
SAMPLE_TENSORS = 24
CHUNK = 1 << 20
HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


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
    """Counts of each target over the tensors of a merge, as they are loaded.

    Attributes:
        looked: The headers of the recipe's models. A recipe's ``dtype`` may widen what a checkpoint has rounded.
        counts: Of each target.
    """

    looked: Looked
    counts: dict[str, Counts] = field(default_factory=dict)

    def add(self, group: TensorGroup) -> None:
        """Count one tensor."""
        assert group.base is not None
        for entry in group.non_base:
            stored = self._stored.get(str(entry.id), entry.tensor.dtype)
            counts = compared(group.base.tensor, entry.tensor.to(stored))
            self.counts.setdefault(str(entry.id), Counts()).add(counts)

    @cached_property
    def _stored(self) -> dict[str, torch.dtype]:
        """The dtype of each model that is stored in one of 16 bits."""
        dtypes = {
            str(reference): {stored for _, stored in model.tensors.values()} & {"F64", "F32", "F16", "BF16"}
            for reference, model in self.looked.models.items()
            if reference.lora is None
        }
        return {name: HALF[next(iter(one))] for name, one in dtypes.items() if len(one) == 1 and one <= {*HALF}}

    def remarks(self, recipe: Mapping[str, Any]) -> list[str]:
        """What to tell of targets that are mostly rounding; ``recipe`` is the one whose tensors were counted."""
        wide = {
            str(reference)
            for reference, model in self.looked.models.items()
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
        and all(model.files.get(name) for model in (pivot, target))
    ]
    step = max(len(shared) // SAMPLE_TENSORS, 1)
    return shared[::step][:SAMPLE_TENSORS]


def _read(model: Model, name: str) -> Tensor:
    """The first rows of a tensor: about SAMPLE_ELEMENTS over the whole sample."""
    width = math.prod(model.tensors[name][0][1:])
    rows = max(SAMPLE_ELEMENTS // SAMPLE_TENSORS // max(width, 1), 1)
    result: Tensor
    if model.files[name].suffix != ".safetensors":
        result = _pickled(model.files[name])[name][:rows]
        return result
    with safe_open(model.files[name], "pt") as file:
        result = file.get_slice(name)[:rows]
        return result


@lru_cache(maxsize=2)
def _pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped: no more is read than is used."""
    content: dict[str, Tensor] = {}
    with suppress(RuntimeError):  # a file in the format of torch before 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content or torch.load(path, map_location="cpu", weights_only=True)
