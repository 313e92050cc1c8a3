"""Tensors that hold one matrix of every expert: their matrices, by name.

transformers packs the experts of a layer into few tensors, however the checkpoint stores them. In
``experts.gate_up_proj`` [E, 2·I, H], each of the E experts has two matrices, the gate and the up projection; in
``experts.down_proj`` [E, H, I] it has one. Granite's files call them ``input_linear`` and ``output_linear``. Each
matrix is a unit at ``matrix`` granularity, named as in checkpoints that keep experts apart:
``….experts.3.gate_proj.weight``.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

__all__ = ["PLAIN", "Layout", "layout_of", "layout_of_model", "layout_of_names", "matrices"]

Cut = Callable[[Tensor], Tensor]
"""A view on the part of a packed tensor that is one expert's matrix."""

_PACKED = re.compile(
    r"(?P<place>.+\.experts)\.(?P<projection>[a-z]\w*?)(?P<kind>_bias|\.weight|\.bias|)"
    r"|(?P<linear>.+)\.(?P<side>input_linear|output_linear)\.weight"
)
_SIDES = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}


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
        """The axis along which the halves of one expert's matrix lie; ``shape`` is that of the matrix."""
        if (shape[0] == self.hidden_size) != (shape[1] == self.hidden_size):
            return int(shape[0] == self.hidden_size)
        return int(self.last)


PLAIN = Layout()
_LAST = ("aria", "llama4", "openai_privacy_filter", "qwen3_vl_moe")
_LAYOUTS = {"gpt_oss": Layout(last=True, interleaved=True), **dict.fromkeys(_LAST, Layout(last=True))}


def layout_of(model_type: str | None, hidden_size: int | None = None) -> Layout:
    """The layout of an architecture, by the ``model_type`` and ``hidden_size`` of its config."""
    return replace(_LAYOUTS.get((model_type or "").removesuffix("_text"), PLAIN), hidden_size=hidden_size)


def layout_of_model(config: Any) -> Layout:
    """The layout of the model with a transformers config."""
    text = config.get_text_config()
    return layout_of(getattr(text, "model_type", None), getattr(text, "hidden_size", None))


def layout_of_names(names: Sequence[str]) -> Layout:
    """The layout where only the names of the tensors are known: the biases of gpt-oss have a name of their own."""
    return layout_of("gpt_oss" if any(name.endswith(".experts.gate_up_proj_bias") for name in names) else None)


def matrices(name: str | None, shape: Sequence[int], layout: Layout) -> list[tuple[str, Cut]]:
    """Name and cut of each expert's matrix (or bias) in a packed tensor [experts, …]; empty for other tensors."""
    if (match := _PACKED.fullmatch(name or "")) is None:
        return []
    kind = "bias" if match["kind"] in ("_bias", ".bias") else "weight"
    if len(shape) != (2 if kind == "bias" else 3):
        return []
    place = match["place"] or f"{match['linear']}.experts"
    projection = match["projection"] or _SIDES[match["side"]]
    axis = 0 if kind == "bias" else layout.axis(shape[1:])
    size, rows = shape[1 + axis], {projection: slice(None)}
    if projection == "gate_up_proj" and size % 2 == 0:
        rows = {"gate_proj": slice(0, size // 2), "up_proj": slice(size // 2, None)}
        if layout.interleaved:
            rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return [
        (f"{place}.{expert}.{part}.{kind}", partial(_cut, expert, axis, own_rows))
        for expert in range(shape[0])
        for part, own_rows in rows.items()
    ]


def _cut(expert: int, axis: int, rows: slice, packed: Tensor) -> Tensor:
    return packed[expert][(slice(None),) * axis + (rows,)]
