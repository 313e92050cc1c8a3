"""Random checkpoints of a pivot and two targets near it, written without building a model.

Llama's layout has few and large tensors. Mixtral's, as on the Hub, has three small ones for each expert.
"""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig

__all__ = [
    "MODELS",
    "Config",
    "checkpoints",
    "llama_config",
    "mixtral_config",
    "parameter_count",
    "recipe",
    "tensor_count",
]

Config = LlamaConfig | MixtralConfig

MODELS = ("pivot", "target-a", "target-b")
# σ of a target's deltas in the first block and, nearly, in the last: the targets' weights differ by layer.
SIGMAS = {"target-a": (5e-4, 1.5e-3), "target-b": (3e-3, 1e-3)}
SHARD_ELEMENTS = 250_000_000


def llama_config(params: float) -> LlamaConfig:
    """The config nearest to ``params`` parameters in TinyLlama's proportions; 1.1e9 gives TinyLlama's own."""

    def scaled(hidden: int, extra_layers: int) -> LlamaConfig:
        heads = hidden // 64
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            hidden_size=hidden,
            intermediate_size=round(hidden * 2.75 / 64) * 64,
            num_hidden_layers=max(2, round(hidden * 22 / 2048) + extra_layers),
            num_attention_heads=heads,
            num_key_value_heads=max(k for k in range(1, heads // 8 + 2) if heads % k == 0),
            vocab_size=max(256, round(hidden * 32000 / 2048 / 64) * 64),
        )

    candidates = [scaled(hidden, extra) for hidden in range(64, 8193, 64) for extra in (-1, 0, 1)]
    return min(candidates, key=lambda config: abs(parameter_count(config) - params))


def mixtral_config(layers: int, experts: int) -> MixtralConfig:
    """Small matrices: the names of the tensors cost time here, not their values."""
    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=experts,
        vocab_size=256,
    )


def parameter_count(config: Config) -> int:
    return sum(torch.Size(shape).numel() for shape in _shapes(config).values())


def tensor_count(config: Config) -> int:
    return len(_shapes(config))


def checkpoints(work: Path, config: Config, seed: int) -> Path:
    """The folder of the three checkpoints; written if ``work`` does not hold it from an earlier call."""
    folder = work / f"{config.model_type}-{parameter_count(config)}-seed{seed}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for model in MODELS:
            (partial / model).mkdir(parents=True)
            _write(partial / model, config, seed)
        partial.rename(folder)
    return folder


def recipe(folder: Path, dtype: str, **parameters: Any) -> str:
    """A merge of the two targets by varm, as YAML."""
    models = {"base_model": str(folder / MODELS[0]), "models": [{"model": str(folder / n)} for n in MODELS[1:]]}
    return yaml.safe_dump({"merge_method": "varm", **models, "parameters": parameters, "dtype": dtype})


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, vocab = config.hidden_size, config.vocab_size
    key_value = 64 * (config.num_key_value_heads or config.num_attention_heads)
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        **_feed_forward_shapes(config),
    }
    layers = range(config.num_hidden_layers)
    return {
        "model.embed_tokens.weight": (vocab, hidden),
        **{f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in block.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }


def _feed_forward_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    up, down = (wide, hidden), (hidden, wide)
    if isinstance(config, LlamaConfig):
        return {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    matrices = {"w1": up, "w2": down, "w3": up}
    experts = range(config.num_local_experts)
    return {
        "block_sparse_moe.gate": (len(experts), hidden),
        **{f"block_sparse_moe.experts.{i}.{name}": shape for i in experts for name, shape in matrices.items()},
    }


def _write(folder: Path, config: Config, seed: int) -> None:
    """Write one checkpoint in bfloat16, holding one shard of it in memory."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    files = (f"model-{number:05}.safetensors" for number in count(1))

    def flush() -> None:
        file = next(files)
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in _tensors(folder.name, config, seed):
        if shard and sum(map(torch.numel, shard.values())) + tensor.numel() > SHARD_ELEMENTS:
            flush()
        shard[name] = tensor
    flush()
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(model: str, config: Config, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors, bfloat16: Gaussian for the pivot, the pivot plus Gaussian deltas for a target."""
    for position, (name, shape) in enumerate(_shapes(config).items()):
        normals = torch.Generator().manual_seed((seed << 32) + len(MODELS) * position)
        tensor = torch.randn(shape, generator=normals).mul_(0.02).add_(float("norm" in name)).bfloat16()
        if model in SIGMAS:
            first, last = SIGMAS[model]
            block = re.search(r"layers\.(\d+)\.", name)
            depth = int(block[1]) / config.num_hidden_layers if block else 0.5
            normals.manual_seed((seed << 32) + len(MODELS) * position + MODELS.index(model))
            delta = torch.randn(shape, generator=normals).mul_(first + (last - first) * depth)
            tensor = delta.add_(tensor).bfloat16()
        yield name, tensor
