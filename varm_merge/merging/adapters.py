"""Adapters as models of a recipe: whether they fit the model they adapt, and whether a kept merge is up to date.

mergekit lets peft merge an adapter into its model and keeps the result in the folder of ``--lora-merge-cache``. It
uses what lies there unchecked, so a file beside each result records the adapter and the model it was made from.
"""

import json
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.options import MergeOptions

from varm_common.checkpoints import content_sha256, file_tensors, fingerprint_of
from varm_common.console import no_logs
from varm_common.errors import some
from varm_merge.merging.lineage import Place, weights_fingerprint

__all__ = ["merged_adapter", "stamp", "why_stale", "why_unfit"]

STAMP = "varm_adapter.json"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def merged_adapter(reference: ModelReference, cache: str) -> Path:
    """Where mergekit keeps the model that it makes from an adapter; it uses a folder that is there as it is."""
    return Path(cache) / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"


# Kept merges


def stamp(reference: ModelReference, folder: Path, cache_dir: str | None) -> None:
    """Record which adapter and model the model in ``folder`` was made from."""
    (folder / STAMP).write_text(json.dumps(_parents(reference, cache_dir), indent=1), encoding="utf-8")


def why_stale(reference: ModelReference, folder: Path, cache_dir: str | None) -> str | None:
    """Why the model in ``folder`` may not be that of the adapter and its base; None if it is."""
    try:
        recorded = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if recorded == _parents(reference, cache_dir):
        return None
    why = "was made from another version of it" if recorded else f"does not record its parents (no {STAMP})"
    problem = f"`{folder}` keeps a merge of `{reference}`, and {why}"
    return f"{problem}: remove that folder, and it will be written again"


def _parents(reference: ModelReference, cache_dir: str | None) -> dict[str, str]:
    adapter = Place(reference.lora.path, reference.lora.revision, cache_dir)
    files = [path for name in (CONFIG, *WEIGHTS) if (path := adapter.file(name))]
    return {
        "adapter": fingerprint_of([(path.name, content_sha256(path)) for path in files]),
        "base": weights_fingerprint(Place(reference.model.path, reference.model.revision, cache_dir)),
    }


# Fit


def why_unfit(reference: ModelReference, options: MergeOptions) -> str | None:
    """Why peft could not merge all of an adapter into its model, by loading it into a model without weights.

    None also where its files or the class of its model are missing, which other checks report.
    """
    name = f"the adapter `{reference.lora}`"
    place = Place(reference.lora.path, reference.lora.revision, options.transformers_cache)
    file = next((path for weights in WEIGHTS if (path := place.file(weights))), None)
    config = place.file(CONFIG)
    if file is None or config is None:
        return None
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the {CONFIG} of {name} is damaged ({error!r}): copy it again"
    try:
        tensors = dict(file_tensors(file))
    except ValueError as error:
        return f"{name}: {error}"
    if not tensors:
        return f"{name} has no tensors: train it, or leave it out"
    try:
        with no_logs():
            problem = _try_to_load(reference, file.parent, options, kind)
    except Exception as error:  # peft and the model's class raise errors of all kinds, which would end the run
        problem = f"does not fit `{reference.model}`: {' '.join(str(error).split())[:300] or type(error).__name__}"
    return problem and f"{name} {problem}"


def _try_to_load(reference: ModelReference, folder: Path, options: MergeOptions, kind: str) -> str | None:
    """The problem of the adapter in ``folder``, as the rest of a sentence."""
    import peft

    not_mergeable = f"is a {kind} adapter, which cannot be merged into weights: choose a LoRA adapter"
    settings = peft.PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        return not_mergeable
    settings.inference_mode = True
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = False  # some ways to initialise need the weights, which are not there
    own = reference.config(trust_remote_code=options.trust_remote_code)
    if not own.architectures:
        return None
    with torch.device("meta"):
        model = get_auto_cls(own.architectures[0]).from_config(own, trust_remote_code=options.trust_remote_code)
        model = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    if not hasattr(model, "merge_and_unload"):
        return not_mergeable
    tensors = peft.load_peft_weights(str(folder), device="cpu")
    for part, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"NaN or Inf in its `{part}`: its file is damaged or its training diverged")
    result: Any = peft.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    own_parts = {name for name, _ in model.named_parameters() if ".default" in name}
    if missing := [name for name in result.missing_keys if name in own_parts]:
        return f"does not fit `{reference.model}`: it lacks {some(missing)}"
    if result.unexpected_keys:
        return f"does not fit `{reference.model}`: it has tensors that fit nothing: {some(result.unexpected_keys)}"
    return None
