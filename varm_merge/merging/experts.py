"""Tensors that hold one matrix of every expert: their matrices, by name.

transformers packs the experts of a layer into few tensors, whatever the checkpoint has: ``experts.gate_up_proj``
[E, 2·I, H] holds two matrices of each of E experts, of the gate and of the up projection; ``experts.down_proj``
[E, H, I] holds one. Granite's files call them ``input_linear`` and ``output_linear``. Each matrix is a unit at
``matrix`` granularity, named as in checkpoints that keep experts apart: ``….experts.3.gate_proj.weight``.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["PLAIN", "Layout", "layout_of", "matrices"]

Cut = Callable[[Tensor], Tensor]
"""A view on the part of a packed tensor that is one expert's matrix."""

_PACKED = re.compile(
    r"(?P<place>.+\.experts)\.(?P<what>[a-z]\w*?)(?P<kind>_bias|\.weight|\.bias|)"
    r"|(?P<linear>.+)\.(?P<side>input_linear|output_linear)\.weight"
)
_HALVES = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Layout:
    """How ``gate_up_proj`` holds its two halves.

    Attributes:
        last: Along the last axis ([E, H, 2·I]), not the middle one.
        interleaved: Every other row, not one half after the other.
        hidden_size: Of the model, if known. Where one of the two axes has it, the halves lie along the other:
            Qwen3-VL-MoE is ``last`` on the Hub, and not as transformers 5 saves it.
    """

    last: bool = False
    interleaved: bool = False
    hidden_size: int | None = None

    def axis(self, shape: Sequence[int]) -> int:
        """Of one expert's matrix, along which its halves lie; ``shape`` is that of the matrix."""
        if (shape[0] == self.hidden_size) != (shape[1] == self.hidden_size):
            return int(shape[0] == self.hidden_size)
        return int(self.last)


PLAIN = Layout()
_LAYOUTS = {
    "gpt_oss": Layout(last=True, interleaved=True),
    **dict.fromkeys(
        (
            "aria",
            "aria_text",
            "llama4",
            "llama4_text",
            "openai_privacy_filter",
            "qwen3_vl_moe",
            "qwen3_vl_moe_text",
        ),
        Layout(last=True),
    ),
}


def layout_of(model_type: str | None, hidden_size: int | None = None) -> Layout:
    """The layout of an architecture, by the ``model_type`` and ``hidden_size`` of its config."""
    return replace(_LAYOUTS.get(model_type or "", PLAIN), hidden_size=hidden_size)


def matrices(name: str | None, shape: Sequence[int], layout: Layout) -> list[tuple[str, Cut]]:
    """Name and cut of each expert's matrix (or bias) in a packed tensor; empty for any other tensor.

    Args:
        name: Of the tensor.
        shape: [experts, …].
        layout: Of its architecture.
    """
    found = _PACKED.fullmatch(name or "")
    if found is None:
        return []
    is_bias = found["kind"] in ("_bias", ".bias")
    if len(shape) != (2 if is_bias else 3):
        return []
    return list(_matrices(found, shape, layout, is_bias))


def _matrices(
    found: "re.Match[str]", shape: Sequence[int], layout: Layout, is_bias: bool
) -> Iterator[tuple[str, Cut]]:
    place = found["place"] or f"{found['linear']}.experts"
    what = found["what"] or {"input_linear": "gate_up_proj", "output_linear": "down_proj"}[found["side"]]
    axis = 0 if is_bias else layout.axis(shape[1:])
    fused = what == "gate_up_proj" and shape[1 + axis] % 2 == 0
    for expert in range(shape[0]):
        for half, projection in enumerate(_HALVES if fused else (what,)):
            kind = "bias" if is_bias else "weight"
            yield f"{place}.{expert}.{projection}.{kind}", _cut(expert, half if fused else None, axis, layout)


def _cut(expert: int, half: int | None, axis: int, layout: Layout) -> Cut:
    def cut(packed: Tensor) -> Tensor:
        matrix = packed[expert]
        if half is None:
            return matrix
        if layout.interleaved:
            index = [slice(None)] * axis + [slice(half, None, 2)]
            return matrix[tuple(index)]
        size = matrix.shape[axis] // 2
        return matrix.narrow(axis, half * size, size)

    return cut
