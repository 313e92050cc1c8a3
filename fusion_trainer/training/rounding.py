"""How much of a fine-tune a 16-bit dtype keeps.

bfloat16 has eight significant bits: a weight that training moves by less than 1/512 of itself is rounded back to
the pivot's. A light fine-tune moves most weights less than that, so a finished target is compared with its pivot.
Tensors are read one at a time; the cost is one more pass over both models' files.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from varm_common.files import read_json
from varm_common.models import weight_files

__all__ = ["rounding", "rounding_told"]

SIXTEEN_BITS = {"BF16": torch.bfloat16, "F16": torch.float16}
FLOATS = {*SIXTEEN_BITS, "F32"}
"""Dtypes as safetensors names them."""
logger = logging.getLogger(__name__)


def rounding(pivot: Path, target: Path, trained: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The share of the trained elements that still differ from the pivot in 16 bits.

    Target and pivot are both rounded to the target's dtype, or to the pivot's if the target is in float32. All
    elements of a tensor are counted if training moved any of them. A tensor that is float32 on both sides is left
    out, and so is one that only one side has by this name and shape.

    Args:
        pivot: Folder of the pivot.
        target: Folder of the target's finished files.
        trained: The target's weights before they were rounded to its dtype, by name. For a name that is not here,
            the files alone decide whether the tensor moved.

    Returns:
        ``dtype``, in which they are compared; ``written``, the target's own dtype; ``elements``, how many were
        counted; ``share``, between 0 and 1; ``trained_in_dtype``, whether training itself left values of ``dtype``
        alone. None if no 16-bit dtype is involved, if nothing moved, or if it cannot be measured: the reason is
        logged, and nothing is raised, since the training itself is done.
    """
    try:
        return _measured(pivot, target, trained)
    except Exception as error:
        logger.warning("it cannot be measured how much of the training 16 bits keep: %s", error)
        return None


def rounding_told(target: Path) -> str | None:
    """The same as a sentence, from the ``fusion.json`` of a finished target; None if it has no such figures."""
    found = read_json(target / "fusion.json").get("rounding")
    if not found:
        return None
    dtype, share = found["dtype"], f"{found['share']:.1%} of the elements in the tensors that training moved"
    if found["written"] != "float32":
        rest = "" if found["trained_in_dtype"] else "; `output_dtype: float32` keeps the rest"
        return f"The target is written in {dtype}: {share} differ from the pivot. This is all that is left{rest}."
    if found["trained_in_dtype"]:
        return f"The trained weights are {dtype} values, so float32 keeps no more: {share} differ from the pivot."
    return f"In {dtype}, the pivot's dtype, {share} would differ from the pivot; the target is written in float32."


def _measured(pivot: Path, target: Path, trained: Mapping[str, Tensor]) -> dict[str, Any] | None:
    elements: Counter[torch.dtype] = Counter()
    kept, exact, written = 0, True, torch.float32
    for name, dtype, start, end in _shared(pivot, target):
        before = trained[name].cpu() if name in trained else end
        if not (before != start).any():
            continue
        elements[dtype] += start.numel()
        kept += int((end.to(dtype) != start.to(dtype)).sum())
        exact = exact and bool((before.to(dtype) == before).all())
        written = end.dtype
    if not elements:
        return None
    ((dtype, _),) = elements.most_common(1)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "written": str(written).removeprefix("torch."),
        "elements": elements.total(),
        "share": kept / elements.total(),
        "trained_in_dtype": exact,
    }


def _shared(pivot: Path, target: Path) -> Iterator[tuple[str, torch.dtype, Tensor, Tensor]]:
    """Name, 16-bit dtype, the pivot's tensor and the target's, for the tensors of both that have such a dtype.

    Raises:
        ValueError: The two have no tensor in common.
    """
    with ExitStack() as opened:
        starts, ends = (_by_name(folder, opened) for folder in (pivot, target))
        common = [name for name in starts if name in ends and _shape(starts, name) == _shape(ends, name)]
        if not common:
            raise ValueError(f"`{pivot}` has no tensor with the name and shape of one in `{target}`")
        for name in common:
            dtypes = [_dtype(side, name) for side in (ends, starts)]
            narrow = next((SIXTEEN_BITS[dtype] for dtype in dtypes if dtype in SIXTEEN_BITS), None)
            if narrow is not None and FLOATS.issuperset(dtypes):
                yield name, narrow, starts[name].get_tensor(name), ends[name].get_tensor(name)


def _by_name(folder: Path, opened: ExitStack) -> dict[str, Any]:
    """The open file of each tensor; what is not read is not in memory."""
    files = [opened.enter_context(safe_open(path, "pt")) for path in weight_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _shape(files: Mapping[str, Any], name: str) -> list[int]:
    return list(files[name].get_slice(name).get_shape())


def _dtype(files: Mapping[str, Any], name: str) -> str:
    return str(files[name].get_slice(name).get_dtype())
