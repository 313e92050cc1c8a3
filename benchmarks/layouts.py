"""The random models that the benchmarks measure: speed does not depend on their weights."""

from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config

__all__ = ["LARGE", "LAYOUTS", "gemma3", "llama", "qwen2"]


def shared(hidden: int, layers: int, dtype: str) -> dict[str, Any]:
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "max_position_embeddings": 4096}
    return {**size, "tie_word_embeddings": True, "dtype": dtype}


def llama(hidden: int, layers: int) -> LlamaConfig:
    widths = {"intermediate_size": hidden * 8 // 3, "num_attention_heads": max(1, hidden // 64)}
    return LlamaConfig(vocab_size=32_000, **widths, **shared(hidden, layers, "float32"))


def qwen2(hidden: int, layers: int, dtype: str) -> Qwen2Config:
    heads = {"num_attention_heads": max(1, hidden // 128), "num_key_value_heads": 2 if hidden > 256 else 1}
    widths = {"intermediate_size": hidden * 35 // 6, **heads}
    return Qwen2Config(vocab_size=152_064, **widths, **shared(hidden, layers, dtype))


def gemma3(hidden: int, layers: int, dtype: str) -> Gemma3TextConfig:
    """Gemma-3-270M is 640 wide and has 18 layers; two thirds of its weights are the vocabulary's."""
    heads = {"num_attention_heads": max(1, hidden // 160), "num_key_value_heads": 1}
    widths = {"intermediate_size": hidden * 16 // 5, "head_dim": 256 if hidden > 256 else 32, **heads}
    return Gemma3TextConfig(vocab_size=262_144, sliding_window=512, **widths, **shared(hidden, layers, dtype))


LAYOUTS: dict[str, tuple[PretrainedConfig, int]] = {  # and how many ids have a token
    "tiny": (llama(192, 4), 32_000),
    "llama-110m": (llama(768, 12), 32_000),
    "qwen2-1.5b": (qwen2(1536, 28, "bfloat16"), 151_936),
    "gemma3-270m": (gemma3(640, 18, "float32"), 262_144),
    "tiny-262k": (gemma3(192, 2, "float32"), 262_144),
    "narrow-32k": (llama(48, 1), 32_000),  # for the size of a store, and its rows
    "narrow-152k": (qwen2(48, 1, "float32"), 151_936),
    "narrow-262k": (gemma3(48, 1, "float32"), 262_144),
}
LARGE = {"tiny": "tiny-262k"}
"""The layout with a large vocabulary that is measured beside one; gemma3-270m by default."""
