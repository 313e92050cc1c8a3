"""The engines by name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_trainer.config import ExtractConfig
from varm_common.models import resolved_dtype

if TYPE_CHECKING:
    import torch

    from fusion_trainer.representations.engine import Engine

__all__ = ["engine_identity", "open_engine", "unused_settings"]

OF_TRANSFORMERS = ("attention", "device_map", "load_in", "tensor_parallel")
OF_VLLM = ("engine_options", *(name for name in ExtractConfig.model_fields if name.startswith("server_")))
HARMLESS_OPTIONS = (
    "tensor_parallel_size pipeline_parallel_size data_parallel_size enable_expert_parallel "
    "distributed_executor_backend gpu_memory_utilization cpu_offload_gb swap_space max_num_seqs "
    "max_num_batched_tokens enforce_eager disable_log_stats compilation_config load_format download_dir"
)
"""Options of vLLM that change speed and rounding only; they may differ when an extraction is resumed."""


def unused_settings(config: ExtractConfig) -> str | None:
    """The problem, if a setting of one engine is given to another."""
    others = OF_VLLM if config.engine == "transformers" else OF_TRANSFORMERS
    given = [name for name in others if name in config.model_fields_set and getattr(config, name) is not None]
    if config.server_url and config.engine_options:
        given.append("engine_options")
    if not given:
        return None
    names = ", ".join(f"`{name}`" for name in given)
    needed = "it needs `engine: vllm`" if config.engine == "transformers" else "remove it"
    engine = f"{config.engine} at a server" if config.server_url else config.engine
    return f"{names}: no effect with the engine {engine}; {needed}"


def engine_identity(config: ExtractConfig, folder: Path) -> dict[str, Any]:
    """What the engine adds to a store's identity. Stores of transformers name no engine."""
    dtype = resolved_dtype(folder, config.dtype, config.trust_remote_code)
    if config.engine == "transformers":
        return {"dtype": dtype, "attention": config.attention, "load_in": config.load_in}
    given = config.engine_options or {}
    options = {name: value for name, value in given.items() if name not in HARMLESS_OPTIONS.split()}
    return {"dtype": dtype, "engine": config.engine, **({"engine_options": options} if options else {})}


def open_engine(config: ExtractConfig, folder: Path, known: frozenset[int], device: "torch.device") -> "Engine":
    """The engine that ``config`` names, with its model.

    Args:
        config: The settings of the extraction.
        folder: The model's folder; with a server it may hold no weights.
        known: The ids that stand for a token; others are never among the k.
        device: Where this process computes.

    Raises:
        UserError: The model cannot be loaded, or the server cannot be used.
    """
    if config.engine == "transformers":
        from fusion_trainer.representations.transformers_engine import TransformersEngine

        return TransformersEngine(config, folder, known, device)
    if config.server_url:
        from fusion_trainer.representations.vllm_server import VllmServer

        return VllmServer(config, known)
    from fusion_trainer.representations.vllm_engine import VllmEngine

    return VllmEngine(config, folder, known)
