"""Small state dicts with the names of real models, and ``varm`` run on them through ``merge_state_dicts``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

from varm_merge.merging.weights import Granularity

StateDict = Mapping[str, Tensor]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

TENSORS = {  # name: shape, its layer, its module
    "model.embed_tokens.weight": ((13, 6), "embedding", "embedding"),
    "model.layers.0.self_attn.q_proj.weight": ((6, 6), "layer 0", "attention 0"),
    "model.layers.0.self_attn.o_proj.weight": ((3, 5), "layer 0", "attention 0"),
    "model.layers.0.mlp.experts.gate_up_proj": ((2, 8, 6), "layer 0", "mlp 0"),  # gate above up, of two experts
    "model.layers.0.input_layernorm.weight": ((6,), "layer 0", "norm 0"),
    "model.layers.1.self_attn.q_proj.weight": ((6, 6), "layer 1", "attention 1"),
    "model.layers.1.mlp.down_proj.weight": ((6, 9), "layer 1", "mlp 1"),
    "model.layers.1.mlp.scale": ((), "layer 1", "mlp 1"),
    "model.norm.weight": ((6,), "norm", "norm"),
    "lm_head.weight": ((13, 6), "head", "head"),
}
UNIT_OF: dict[Granularity, Callable[[str], str] | None] = {
    "model": lambda _: "model",
    "layer": lambda name: TENSORS[name.partition(" of ")[0]][1],
    "module": lambda name: TENSORS[name.partition(" of ")[0]][2],
    "matrix": lambda name: name,
    "parameter": None,
}
LOW, HIGH = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def family(targets: int = 3, dtype: torch.dtype = torch.float64) -> list[StateDict]:
    """A pivot and its targets; every tensor of every target has moved by a length of its own."""
    generator = torch.Generator().manual_seed(targets)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def step() -> float:
        return 10 ** float(torch.empty(()).uniform_(-4, -2, generator=generator))

    pivot = {name: noise(shape) for name, (shape, *_) in TENSORS.items()}
    tuned = [
        {name: tensor + step() * noise(tensor.shape) for name, tensor in pivot.items()} for _ in range(targets)
    ]
    return [{name: tensor.to(dtype) for name, tensor in model.items()} for model in (pivot, *tuned)]


def apart(model: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the matrices of each expert taken apart: each is a unit at ``matrix`` granularity."""
    result: dict[str, Any] = {}
    for name, tensor in model.items():
        if name.endswith("gate_up_proj"):
            for expert in (0, 1):
                result[f"{name} of gate {expert}"] = tensor[expert, :4]
                result[f"{name} of up {expert}"] = tensor[expert, 4:]
        else:
            result[name] = tensor
    return result


def merge(models: Sequence[StateDict], method: str = "varm", **options: Any) -> dict[str, Tensor]:
    dtypes = {name: options.pop(name) for name in ("dtype", "out_dtype") if name in options}
    ids = ["pivot", *(f"target_{number}" for number in range(1, len(models)))]
    named = dict(zip(ids, models, strict=True))
    return merge_state_dicts(named, method, base="pivot", parameters=options, **dtypes)


def bits(tensor: Tensor) -> list[int]:
    """The bits of each element: tells −0.0 from 0.0."""
    return tensor.reshape(-1).view(BITS[tensor.element_size()]).tolist()


def all_bits(model: StateDict) -> dict[str, list[int]]:
    return {name: bits(tensor) for name, tensor in model.items()}
