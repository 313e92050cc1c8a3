"""How much of a fine-tune a 16-bit dtype keeps.

bfloat16 has eight significant bits: a weight that training moves by less than 1/512 of itself rounds back to the
pivot's. A light fine-tune moves most weights less than that, so a finished target is compared with its pivot.
Tensors are read one at a time. The cost is one more pass over both models' files.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varm_common.checkpoints import read_header
from varm_common.files import read_json
from varm_common.stored_tensors import stored_tensor

__all__ = ["rounding", "rounding_sentence"]

SIXTEEN_BITS = {"BF16": torch.bfloat16, "F16": torch.float16}
FLOATS = {*SIXTEEN_BITS, "F32"}
"""safetensors' names of dtypes."""
logger = logging.getLogger(__name__)


def rounding(pivot: Path, target: Path, trained: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The share of the trained elements that still differ from the pivot in 16 bits.

    Target and pivot are rounded to the target's dtype, or to the pivot's if the target is float32. All elements
    of a tensor count if training moved any of them. Left out are tensors that are float32 on both sides, and
    those that only one side has by this name and shape.

    Args:
        pivot: Folder of the pivot.
        target: Folder of the target's finished files.
        trained: The target's weights before they were rounded to its dtype. For a name that is not here, the file
            decides whether the tensor moved.

    Returns:
        ``dtype``, in which they are compared; ``written``, the target's dtype; ``elements``, how many count;
        ``share``, between 0 and 1; ``trained_in_dtype``, whether training left only values of ``dtype``. None if
        no 16-bit dtype is involved, if nothing moved, or if it cannot be measured: then the reason is logged and
        nothing is raised, since the training itself is done.
    """
    try:
        return _measured(pivot, target, trained)
    except Exception as error:
        logger.warning("cannot measure how much of the training survives in 16 bits: %s", error)
        return None


def rounding_sentence(target: Path) -> str | None:
    """The rounding in a finished target's ``fusion.json``, as a sentence; None if there is none."""
    rounding = read_json(target / "fusion.json").get("rounding")
    if not rounding:
        return None
    dtype, share = rounding["dtype"], f"{rounding['share']:.1%} of the elements in the tensors that training moved"
    if rounding["written"] != "float32":
        rest = "" if rounding["trained_in_dtype"] else "; `output_dtype: float32` keeps the rest"
        return f"The target is written in {dtype}: {share} differ from the pivot. This is all that is left{rest}."
    if rounding["trained_in_dtype"]:
        return f"The trained weights are {dtype} values, so float32 keeps no more: {share} differ from the pivot."
    return f"In {dtype}, the pivot's dtype, {share} would differ from the pivot; the target is written in float32."


def _measured(pivot: Path, target: Path, trained: Mapping[str, Tensor]) -> dict[str, Any] | None:
    starts, ends = read_header(pivot), read_header(target)
    shapes = {name: shape for name, (shape, _) in ends.tensors.items()}
    common = [name for name, (shape, _) in starts.tensors.items() if shapes.get(name) == shape]
    if not common:
        raise ValueError(
            "; ".join(starts.problems) or f"`{pivot}` and `{target}` have no tensor with the same name and shape"
        )
    elements: Counter[torch.dtype] = Counter()
    kept, exact, written = 0, True, torch.float32
    for name in common:
        dtypes = ends.tensors[name][1], starts.tensors[name][1]
        dtype = next((SIXTEEN_BITS[stored] for stored in dtypes if stored in SIXTEEN_BITS), None)
        if dtype is None or not FLOATS.issuperset(dtypes):
            continue
        start, end = (stored_tensor(side.files[name], name) for side in (starts, ends))
        before_rounding = trained[name].cpu() if name in trained else end
        if not (before_rounding != start).any():
            continue
        elements[dtype] += start.numel()
        kept += int((end.to(dtype) != start.to(dtype)).sum())
        exact = exact and bool((before_rounding.to(dtype) == before_rounding).all())
        written = end.dtype
    if not elements:
        return None
    shown = {"dtype": elements.most_common(1)[0][0], "written": written}
    names = {key: str(dtype).removeprefix("torch.") for key, dtype in shown.items()}
    total = elements.total()
    return {**names, "elements": total, "share": kept / total, "trained_in_dtype": exact}
