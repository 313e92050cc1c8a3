"""The inputs of a training, checked together: settings, pivot, dialogues and stores; and their record."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import GenerationConfig, TrainingArguments

from fusion_trainer.config import NOT_OF_THE_RESULT, TrainConfig, recorded
from fusion_trainer.data.dialogues import Dialogues
from fusion_trainer.representations.store import RepresentationStore
from fusion_trainer.text.tokenizer import TextTokenizer, load_tokenizer
from fusion_trainer.training.trainer import argument_problems
from varm_common import models
from varm_common.checkpoints import read_header
from varm_common.errors import UserError, listed, reason_of

__all__ = ["Inputs", "fixed_settings", "identity_of", "load_pivot", "open_inputs", "place_of_setting", "unusable"]

FORMAT, VERSION = "fusion-trainer target", 1


@dataclass
class Inputs:
    """The opened inputs of a training."""

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


def open_inputs(config: TrainConfig) -> Inputs:
    """Open and check everything that ``config`` names.

    Raises:
        UserError: Arguments cannot be used (all of them are listed), or pivot, stores and dialogues do not fit.
    """
    fast = torch.accelerator.is_available()
    defaults = {"report_to": "none", "dataloader_pin_memory": fast, "use_cpu": not fast}
    own = {"remove_unused_columns": False, "label_names": ["labels"]}
    try:
        arguments = TrainingArguments(**{**defaults, **_public_arguments(config), **own})
        arguments.get_process_log_level()  # a wrong log_level is a KeyError here
    except Exception as error:  # only transformers' code has run
        raise unusable(config, error) from error
    _demand_processes(arguments)
    if problems := [*argument_problems(arguments), *_problems(config, arguments)]:
        named = [(re.findall(r"\w+", text)[0], text) for text in problems]
        lines = [place_of_setting(config, f"training.{name}") + text for name, text in named]
        raise UserError(f"these training arguments cannot be used:{listed(lines)}")
    folder, revision = models.local_folder(config.pivot, config.pivot_revision, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.pivot, config.trust_remote_code)
    stores = _stores(config, tokenizer)
    dtype = _output_dtype(config, folder)
    return Inputs(config, arguments, folder, revision, tokenizer, _dialogues(config, stores), stores, dtype)


def _public_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments without secrets: transformers pickles its arguments into every checkpoint."""
    return {name: value for name, value in config.training.items() if not name.endswith("_token")}


def _problems(config: TrainConfig, arguments: TrainingArguments) -> Iterator[str]:
    """Arguments that do not fit the rest of the config or the machine, or train nothing."""
    if config.training.get("output_dir") is None:
        yield "`training` has no output_dir; set it to the folder of the target"
    if config.load_in and config.lora is None:
        yield f"`load_in: {config.load_in}` needs `lora`: quantised weights themselves cannot be trained"
    for name in ("eval_strategy", "eval_on_start"):
        if getattr(arguments, name) not in ("no", False) and not config.held_out:
            yield f"`{name}` needs rows to evaluate on; set `held_out`, for instance to 0.02"
    if arguments.fp16 and arguments.device.type == "cpu":
        yield "fp16 needs a GPU; on a CPU leave it out, or set bf16"
    if not 0 < arguments.learning_rate < math.inf:
        yield f"learning_rate: {arguments.learning_rate} trains nothing; set it above 0"
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        yield f"max_steps: {arguments.max_steps} trains nothing; set it above 0, or leave it out"
    if arguments.max_steps == -1 and not 0 < arguments.num_train_epochs < math.inf:
        yield f"num_train_epochs: {arguments.num_train_epochs} cannot be trained; set a number"


def _demand_processes(arguments: TrainingArguments) -> None:
    """Check that the processes that were started train together, and turn on FSDP where it was requested."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and arguments.world_size == 1:
        raise UserError(
            f"{started} processes were started, but each trains alone; on CPU set `use_cpu: true` in `training`"
        )
    state = arguments.distributed_state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or bool(arguments.fsdp)
    if wanted and state is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # on CPU, accelerate ignores FSDP silently


def unusable(config: TrainConfig, error: Exception) -> UserError:
    """Explain an error of transformers or torch about the arguments. It names the argument and its line."""
    reason = reason_of(error)
    plain = reason.lower().replace("_", " ")
    named = [name for name in config.training if re.search(rf"\b{name.lower().replace('_', ' ')}\b", plain)]
    texts = {name: value for name, value in config.training.items() if isinstance(value, str) and len(value) > 2}
    named += [name for name, text in texts.items() if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reason)]
    place = place_of_setting(config, f"training.{named[0]}" if named else "training")
    subject = f"`{named[0]}`: " if named else ""
    return UserError(f"{place}the training arguments cannot be used: {subject}{reason}")


def place_of_setting(config: TrainConfig, name: str) -> str:
    """``FILE, line N: `` of a setting, to begin a message with; empty if it comes from no file."""
    places: Mapping[str, str] = getattr(config, "_places", {})
    place = places.get(name) or places.get(name.partition(".")[0])
    return f"{place}: " if place else ""


def _output_dtype(config: TrainConfig, folder: Path) -> str:
    """The dtype of the target: the configured one, or that of the pivot's config, or of its first tensor."""
    if config.output_dtype != "auto":
        return config.output_dtype
    name = models.resolved_dtype(folder, "auto", config.trust_remote_code)
    if name == "auto":
        _, stored = next(iter(read_header(folder).tensors.values()))
        name = {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _stores(config: TrainConfig, tokenizer: TextTokenizer) -> list[RepresentationStore]:
    """The pivot's own store and the aligned ones; none for CLM alone."""
    if config.clm_weight == 1 and config.clm_weight_schedule != "soft":
        return []
    aligned = [RepresentationStore(folder) for folder in config.aligned_stores]
    if not aligned:
        raise UserError("`aligned_stores` has no store to fuse; for CLM alone set `clm_weight: 1`")
    if len({folder.resolve() for folder in config.aligned_stores}) < len(aligned):
        raise UserError("`aligned_stores` names a store twice")
    for store in aligned:
        if not store.aligned:
            raise UserError(
                f"the store `{store.folder}` is not aligned to the pivot; run `fusion-trainer align` and give "
                "its output"
            )
    without = [store.folder for store in aligned if not store.has_chunks]
    if config.alm_weight and without:
        raise UserError(
            f"{place_of_setting(config, 'alm_weight')}`alm_weight` matches likelihoods of chunks of text, and "
            f"these aligned stores have none:{listed([f'`{folder}`' for folder in without])}\nAlign their "
            "sources again with `chunks: true` (--chunks), each into a new folder"
        )
    if config.pivot_store is None:
        raise UserError("`pivot_store` is not set: the pivot's own distributions take part in the fusion")
    own = RepresentationStore(config.pivot_store)
    common = {name: aligned[0].identity[name] for name in ("data", "top_k")}
    for store in (own, *aligned):
        store.demand(tokenizer=tokenizer.sha256, **common)
    for store in aligned:
        store.demand(pivot_store=own.sha256)
    _demand_known(config, [own, *aligned])
    return [store.check() for store in (own, *aligned)]


def _demand_known(config: TrainConfig, stores: Sequence[RepresentationStore]) -> None:
    """Refuse settings that need what an imported store does not have."""
    needs = (
        ("tail", "bucket", "tail", "the probability outside the top k", "renormalise"),
        ("compare", "token", "gold_logprob", "the probability of every next token", "conversation"),
    )
    for name, value, column, what, instead in needs:
        lacking = [f"`{store.folder}`" for store in stores if column in store.unknown]
        if getattr(config, name) == value and lacking:
            raise UserError(
                f"{place_of_setting(config, name)}`{name}: {value}` needs {what}, which is not known everywhere "
                f"in {', '.join(lacking)}: it was imported from published logits. Set `{name}: {instead}`"
            )


def _dialogues(config: TrainConfig, stores: Sequence[RepresentationStore]) -> Dialogues:
    """The dialogues that the config names, or those beside a store."""
    if config.dialogues is not None:
        dialogues = Dialogues(config.dialogues)
        for store in stores:
            store.demand(data=dialogues.fingerprint)
        return dialogues
    folders = [*config.aligned_stores, *([config.pivot_store] if config.pivot_store else [])]
    for store in stores or map(RepresentationStore, folders):  # CLM alone still uses their dialogues
        if (beside := Dialogues.beside(store.folder, store.identity["data"])) is not None:
            return beside
    raise UserError("the dialogues are not next to the stores; set `dialogues` to their folder")


def load_pivot(inputs: Inputs, dtype: str, load_in: str | None) -> Any:
    """The pivot, with generation settings that can be saved: transformers reads some that it refuses to write."""
    config = inputs.config
    device = inputs.arguments.device if load_in else torch.device("cpu")  # else the Trainer places it
    how: dict[str, Any] = {"attention": config.attention, "trust_remote_code": config.trust_remote_code}
    model = models.load_causal_lm(inputs.folder, config.pivot, dtype=dtype, device=device, load_in=load_in, **how)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def identity_of(inputs: Inputs) -> dict[str, Any]:
    """Everything that the target depends on; the same for every part of one training run.

    Raises:
        UserError: The pivot's store was made from another pivot.
    """
    config, arguments = inputs.config, inputs.arguments
    model = {"weights": models.weights_fingerprint(inputs.folder, config.pivot)}
    model["config"] = models.config_fingerprint(inputs.folder, config.trust_remote_code)
    for store in inputs.stores:
        if not store.aligned:
            store.demand(**model)
    settings = recorded(config, "training", "pivot", "pivot_revision", "dialogues")
    versions = {name: version(name) for name in ("varm-merge", "transformers", "accelerate", "torch", "peft")}
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else ""
    return {
        "format": FORMAT,
        "version": VERSION,
        "pivot": {
            "model": config.pivot,
            "revision": inputs.revision,
            **model,
            "tokenizer": inputs.tokenizer.sha256,
        },
        "dialogues": inputs.dialogues.fingerprint,
        "stores": [_described(store) for store in inputs.stores],
        "config": {key: value for key, value in settings.items() if not key.endswith(("store", "stores"))},
        "training": _public_arguments(config),
        "mixed_precision": precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "processes": arguments.world_size,
        "versions": versions,
    }


def _described(store: RepresentationStore) -> dict[str, Any]:
    names = ("kind", "model", "revision", "positions", "map", "top_k")
    known = {name: store.identity[name] for name in names if store.identity.get(name) is not None}
    return {**known, "folder": str(store.folder), "sha256": store.sha256}


def fixed_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that must not change within a training, flat.

    The rows of an update may be divided otherwise between processes, batches and accumulation.
    """
    training = {name: value for name, value in identity["training"].items() if name not in NOT_OF_THE_RESULT}
    division = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows = math.prod(training.pop(name, getattr(TrainingArguments, name)) for name in division)
    return {
        "version": identity["version"],
        "dialogues": identity["dialogues"],
        **{f"pivot's {key}": identity["pivot"][key] for key in ("weights", "config", "tokenizer")},
        **{f"store {number}": store["sha256"] for number, store in enumerate(identity["stores"])},
        **identity["config"],
        **training,
        "mixed precision": identity.get("mixed_precision"),
        "rows of an update": identity["processes"] * rows,
    }
