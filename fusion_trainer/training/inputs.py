"""What a training begins with: settings, stores, dialogues, the pivot as it is loaded, and the record of these."""

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, TrainingArguments, set_seed

from fusion_trainer.config import NOT_OF_THE_RESULT, TrainConfig
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer
from varm_common.errors import UserError, unlike
from varm_common.files import (
    TEMPORARY,
    sha256_of,
)
from varm_common.models import (
    load_causal_lm,
)

__all__ = [
    "FORMAT",
    "FUSION",
    "PLAN",
    "RESULT",
    "UNUSABLE",
    "VERSION",
    "Inputs",
    "demand_same",
    "described_arguments",
    "first_word",
    "loaded",
    "place_of_setting",
    "reason_of",
    "with_adapters",
]

FUSION, PLAN = "fusion.json", "training.json"
FORMAT, VERSION = "fusion-trainer target", 1
RESULT = "target" + TEMPORARY
"""The folder in which the target is written before its files take their names."""
UNUSABLE = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What transformers and torch raise for arguments and checkpoints that they cannot use."""


@dataclass
class Inputs:
    """What a training is made of."""

    config: TrainConfig
    arguments: TrainingArguments
    folder: Path
    revision: str | None
    tokenizer: TextTokenizer
    dialogues: Dialogues
    stores: list[RepresentationStore]
    output_dtype: str

    @property
    def output(self) -> Path:
        return Path(self.arguments.output_dir)


def first_word(text: str) -> str:
    word: str = re.findall(r"\w+", text)[0]
    return word


def place_of_setting(config: TrainConfig, name: str) -> str:
    """File and line at which a setting stands, to begin a sentence with; empty if it comes from no file."""
    places: Mapping[str, str] = getattr(config, "_places", {})
    found = places.get(name) or places.get(name.partition(".")[0])
    return f"{found}: " if found else ""


def reason_of(error: Exception) -> str:
    """The error on one line; its kind as well, where its message may be a bare key or value."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"


def described_arguments(store: RepresentationStore) -> dict[str, Any]:
    names = ("kind", "model", "revision", "positions", "map", "top_k")
    of_store = {name: store.identity[name] for name in names if store.identity.get(name) is not None}
    return {**of_store, "folder": str(store.folder), "sha256": sha256_of(store.folder / "manifest.json")}


def fixed_settings(identity: dict[str, Any]) -> dict[str, Any]:
    """What must not change between the parts of a training, flat; an update's rows may be divided otherwise."""
    training = {k: v for k, v in identity["training"].items() if k not in NOT_OF_THE_RESULT}
    training |= {"mixed precision": identity.get("mixed_precision")}
    division = ("per_device_train_batch_size", "gradient_accumulation_steps")
    of_process = math.prod(training.pop(name, getattr(TrainingArguments, name)) for name in division)
    training["rows of an update"] = identity["processes"] * of_process
    pivot = {f"pivot's {key}": identity["pivot"][key] for key in ("weights", "config", "tokenizer")}
    stores = {f"store {number}": store["sha256"] for number, store in enumerate(identity["stores"])}
    both = {**identity["config"], **training}
    return {"dialogues": identity["dialogues"], **pivot, **stores, **both}


def demand_same(output: Path, identity: dict[str, Any], found: Any, trained: bool) -> None:
    """``trained``: there is something that was trained with the settings found."""
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise UserError(f"`{output}` holds something else; give a new output_dir")
    if not trained:
        return
    try:
        fixed = fixed_settings(found)
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"the description of the training in `{output}` is damaged ({reason_of(error)}); remove that "
            "folder, or give another output_dir"
        ) from error
    if difference := unlike(f"`{output}` is another training:", fixed_settings(identity), fixed):
        raise UserError(f"{difference}\nGive another output_dir, or remove that folder.")


def loaded(inputs: Inputs, dtype: str, load_in: str | None) -> Any:
    """The pivot, with generation settings that can be saved: transformers reads some that it refuses to write."""
    model = load_causal_lm(
        inputs.folder,
        inputs.config.pivot,
        dtype=dtype,
        attention=inputs.config.attention,
        device=inputs.arguments.device if load_in else torch.device("cpu"),  # else the Trainer places it
        device_map=None,
        load_in=load_in,
        trust_remote_code=inputs.config.trust_remote_code,
    )
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def with_adapters(model: Any, config: TrainConfig) -> Any:
    """The model with the adapters that the config asks for."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in:
        for module in model.modules():  # bitsandbytes repacks for CPUs what is once evaluated: no gradients then
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=bool(config.training.get("gradient_checkpointing"))
        )
    set_seed(config.training.get("seed", TrainingArguments.seed))  # new adapters are random
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **(config.lora or {})}))
    except UNUSABLE as error:
        raise UserError(f"{place_of_setting(config, 'lora')}`lora` cannot be used: {reason_of(error)}") from error
