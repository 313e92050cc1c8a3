"""Adapters as models of a recipe: whether they fit the model they adapt, and whether a kept merge is of them.

mergekit lets peft merge an adapter into its model and keeps the result in the folder of ``--lora-merge-cache``. It
uses what lies there as it is, so beside each result a file tells of what it was made.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.options import MergeOptions

from varm_common.checkpoints import content_sha256, file_tensors, fingerprint_of, some
from varm_merge.merging.lineage import Place, weights_fingerprint

__all__ = ["merged_adapter", "stamped", "why_stale", "why_unfit"]

STAMP = "varm_adapter.json"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def merged_adapter(reference: ModelReference, cache: str) -> Path:
    """Where mergekit keeps the model that it makes of an adapter; it uses a folder that is there as it is."""
    return Path(cache) / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"


# What was made before


@contextmanager
def stamped(options: MergeOptions) -> Iterator[None]:
    """Let every merged adapter that is made in the block tell of what it was made."""
    merged = ModelReference.merged

    def merge(self: ModelReference, cache_dir: str | None = None, **settings: Any) -> ModelReference:
        new = self.lora is not None and cache_dir and not merged_adapter(self, cache_dir).exists()
        result: ModelReference = merged(self, cache_dir=cache_dir, **settings)
        if new and cache_dir:
            content = json.dumps(_parents(self, options.transformers_cache), indent=1)
            (merged_adapter(self, cache_dir) / STAMP).write_text(content, encoding="utf-8")
        return result

    ModelReference.merged = merge
    try:
        yield
    finally:
        ModelReference.merged = merged


def why_stale(reference: ModelReference, folder: Path, cache_dir: str | None) -> str | None:
    """Why the model in ``folder`` may not be that of the adapter and its base; None if it is."""
    try:
        told = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = None
    if told == _parents(reference, cache_dir):
        return None
    why = "was made of another version of it" if told else f"does not say of what it was made (no {STAMP})"
    return f"`{folder}` keeps a merge of `{reference}`, and {why}: remove that folder, and it is made again"


def _parents(reference: ModelReference, cache_dir: str | None) -> dict[str, str]:
    adapter = Place(reference.lora.path, reference.lora.revision, cache_dir)
    files = [path for name in (CONFIG, *WEIGHTS) if (path := adapter.file(name))]
    return {
        "adapter": fingerprint_of([(path.name, content_sha256(path)) for path in files]),
        "base": weights_fingerprint(Place(reference.model.path, reference.model.revision, cache_dir)),
    }


# Fit


def why_unfit(reference: ModelReference, options: MergeOptions) -> str | None:
    """Why peft could not merge all of an adapter into its model, by loading it into a model without weights."""
    name = str(reference.lora)
    place = Place(reference.lora.path, reference.lora.revision, options.transformers_cache)
    file = next((path for one in WEIGHTS if (path := place.file(one))), None)
    config = place.file(CONFIG)
    if file is None or config is None:
        return None  # told by others
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        kind = content["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the {CONFIG} of the adapter `{name}` is damaged ({error!r}): copy it again"
    try:
        tensors = dict(file_tensors(file))
    except ValueError as error:
        return f"the adapter `{name}`: {error}"
    if not tensors:
        return f"the adapter `{name}` has no tensors: train it, or leave it out"
    try:
        with _silent():
            missing, unexpected = _load(reference, file.parent, options)
    except _UnknownModelError:
        return None  # told by others
    except _NotMergeableError:
        return f"`{name}` is a {kind} adapter, which cannot be merged into weights: choose a LoRA adapter"
    except Exception as error:  # of whatever kind: it would end the run
        told = " ".join(str(error).split())[:300] or type(error).__name__
        return f"the adapter `{name}` does not fit `{reference.model}`: {told}"
    for names, what in ((missing, "lacks"), (unexpected, "has tensors that fit nothing:")):
        if names:
            return f"the adapter `{name}` does not fit `{reference.model}`: it {what} {some(names)}"
    return None


class _NotMergeableError(Exception):
    """This kind of adapter is no change of weights."""


class _UnknownModelError(Exception):
    """The config of the adapted model does not name its class."""


def _load(reference: ModelReference, folder: Path, options: MergeOptions) -> tuple[list[str], list[str]]:
    """Names that the adapter lacks, and those of its tensors that nothing takes."""
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise _NotMergeableError
    settings.inference_mode = True
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = False  # others measure the weights, which are not there
    own = reference.config(trust_remote_code=options.trust_remote_code)
    if not own.architectures:
        raise _UnknownModelError
    with torch.device("meta"):
        automatic = get_auto_cls(own.architectures[0])
        model = automatic.from_config(own, trust_remote_code=options.trust_remote_code)
        model = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    if not hasattr(model, "merge_and_unload"):
        raise _NotMergeableError
    tensors = peft.load_peft_weights(str(folder), device="cpu")
    for part, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"NaN or Inf in its `{part}`: its file is damaged or its training diverged")
    result: Any = peft.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    own_parts = {name for name, _ in model.named_parameters() if ".default" in name}
    return [name for name in result.missing_keys if name in own_parts], [*result.unexpected_keys]


@contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
