"""Random checkpoints in Llama's layout: a pivot and two targets near it, written without building a model."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

__all__ = ["MODELS", "checkpoints", "llama_config", "parameter_count"]

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


def parameter_count(config: LlamaConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in _shapes(config).values())


def checkpoints(work: Path, config: LlamaConfig, seed: int) -> Path:
    """The folder of the three checkpoints; written if ``work`` does not hold it from an earlier call."""
    folder = work / f"llama-{parameter_count(config)}-seed{seed}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for model in MODELS:
            (partial / model).mkdir(parents=True)
            _write(partial / model, config, seed)
        partial.rename(folder)
    return folder


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    key_value = 64 * (config.num_key_value_heads or config.num_attention_heads)
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    layers = range(config.num_hidden_layers)
    return {
        "model.embed_tokens.weight": (vocab, hidden),
        **{f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in block.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }


def _write(folder: Path, config: LlamaConfig, seed: int) -> None:
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
        if shard and sum(t.numel() for t in shard.values()) + tensor.numel() > SHARD_ELEMENTS:
            flush()
        shard[name] = tensor
    flush()
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(model: str, config: LlamaConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
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
